"""Scales, loss and gradients of a quantised model do not depend on the layout; they are saved and loaded exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mcore_spec.config.quantization import RECIPES
from mcore_spec.parallel.layout import Layout
from tests.parallel.quantization_cases import recipe_of
from tests.pool import RankPool
from tests.reference.quantization import block_amax
from tests.tiny import drawn, write_hf_model

CASES = "tests.parallel.quantization_cases"
# float64 sums in another order.
TOLERANCE = 1e-9
LAYOUTS = {
    "TP2": (Layout(tensor=2), 2),
    "TP2+SP": (Layout(tensor=2, sequence_parallel=True), 2),
    "PP2": (Layout(pipeline=2), 2),
    "CP2": (Layout(context=2), 2),
    "DP2": (Layout(), 2),
}
# Such that blocks of 128 divide every rank's part of every matrix.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("base"), "llama", tied=False)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("wide"), "llama", tied=False, **WIDE)


def joined(ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Scales of all stages; ranks that hold the same whole scale agree."""
    scales: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for name, scale in rank["scales"].items():
            assert torch.equal(scales.setdefault(name, scale), scale), name
    return scales


def check_same(found: list[dict[str, Any]], expected: dict[str, Any], where: str, *, sums: bool) -> None:
    scales = joined(found)
    assert scales.keys() == expected["scales"].keys()
    differing = [name for name, scale in scales.items() if not torch.equal(scale, expected["scales"][name])]
    assert differing == [], where
    steps = [rank["step"] for rank in found if rank["step"] is not None]
    assert steps, where
    for step in steps if sums else ():
        torch.testing.assert_close(step["loss"], expected["step"]["loss"], rtol=TOLERANCE, atol=0)
        for name, gradient in expected["step"]["gradients"].items():
            bound = TOLERANCE * float(gradient.abs().max())
            assert float((step["gradients"][name] - gradient).abs().max()) <= bound, (where, name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["fp8", "fp8_per_channel", "int8_per_channel"])
def test_no_layout_changes_scales_loss_or_gradients(
    name: str, layout: str, rank_pool: RankPool, directory: Path
) -> None:
    recipe = recipe_of(name, with_kv=True)
    case = f"{CASES}:quantize_in"
    (expected,) = rank_pool.run(case, world_size=1, directory=directory, layout=Layout(), recipe=recipe)
    assert all(bool((scale != 1).all()) for scale in expected["scales"].values())
    where, world_size = LAYOUTS[layout]
    found = rank_pool.run(case, world_size=world_size, directory=directory, layout=where, recipe=recipe)
    # Under context parallelism a rank's loss and gradients are a part of a sum.
    check_same(found, expected, layout, sums=layout != "CP2")


@pytest.mark.parametrize("layout", ["TP2", "TP2+SP"])
def test_blocks_on_several_ranks(layout: str, rank_pool: RankPool, wide: Path) -> None:
    recipe, case = recipe_of("fp8_blockwise", with_kv=False), f"{CASES}:quantize_in"
    (expected,) = rank_pool.run(case, world_size=1, directory=wide, layout=Layout(), recipe=recipe)
    where, world_size = LAYOUTS[layout]
    found = rank_pool.run(case, world_size=world_size, directory=wide, layout=where, recipe=recipe)
    check_same(found, expected, layout, sums=True)


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_cuts_do_not_depend_on_who_saw_what(method: str, rank_pool: RankPool, directory: Path) -> None:
    options = {"directory": directory, "recipe": recipe_of("fp8", with_kv=True), "method": method}
    (expected,) = rank_pool.run(f"{CASES}:quantize_in", world_size=1, layout=Layout(), **options)
    (widest,) = rank_pool.run(f"{CASES}:quantize_in", world_size=1, layout=Layout(), **{**options, "method": "max"})
    cut = [name for name, scale in expected["scales"].items() if bool((scale < widest["scales"][name]).all())]
    # A ten-thousandth of so few values is none.
    assert bool(cut) == (method == "mse")
    assert all("activation" in name or "attentions" in name for name in cut)
    for layout, world_size in (LAYOUTS["DP2"], LAYOUTS["TP2+SP"]):
        found = rank_pool.run(f"{CASES}:quantize_in", world_size=world_size, layout=layout, **options)
        check_same(found, expected, str(layout), sums=False)


@pytest.mark.parametrize("name", RECIPES)
def test_scales_are_those_of_the_engines_matrices(name: str, rank_pool: RankPool, wide: Path) -> None:
    """Query, key and value, gate and up: each whole matrix of the files has the scales that it has by itself."""
    recipe = recipe_of(name, with_kv=False)
    (found,) = rank_pool.run(f"{CASES}:quantize_in", world_size=1, directory=wide, layout=Layout(), recipe=recipe)
    weights = {key: value.double().numpy() for key, value in load_file(wide / "model.safetensors").items()}
    largest = {"e4m3": 448, "int8": 127, "int4": 7}[recipe.weight.number]
    matrices = {
        "self_attention.linear_qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "mlp.linear_fc1": ["mlp.gate_proj", "mlp.up_proj"],
        "self_attention.linear_proj": ["self_attn.o_proj"],
        "mlp.linear_fc2": ["mlp.down_proj"],
    }
    for ours, theirs in matrices.items():
        whole = [weights[f"model.layers.1.{each}.weight"] for each in theirs]
        expected = {
            "tensor": [np.array([max(np.abs(each).max() for each in whole)])],
            "channel": [np.abs(each).max(axis=1, keepdims=True) for each in whole],
            "block": [block_amax(each, (128, 128))[::128, ::128] for each in whole],
        }[recipe.weight.granularity]
        for index, amax in enumerate(expected):
            scale = found["scales"][f"linears.decoder.layers.1.{ours}.weight.scale_{index}"].numpy()
            np.testing.assert_array_equal(scale, np.float32(amax) / np.float32(largest))
    if recipe.weight.granularity == "tensor":
        # Engines join these maps of the draft, and would take the largest of their scales.
        attention = {"q_proj": (512, 512), "k_proj": (256, 512), "v_proj": (256, 512)}
        mlp = {"gate_proj": (256, 256), "up_proj": (256, 256)}
        for block, shapes in (("self_attn", attention), ("mlp", mlp)):
            own = [drawn(f"layers.0.{block}.{each}.weight", shape).abs().max() for each, shape in shapes.items()]
            assert len(set(map(float, own))) > 1
            for each in shapes:
                scale = found["scales"][f"linears.eagle_module.layers.0.{block}.{each}.weight.scale_0"]
                assert torch.equal(scale, (max(own).float() / largest).reshape(1)), each


@pytest.mark.parametrize("name", ["fp8", "int8_per_channel"])
def test_every_layout_loads_the_same_scales(name: str, rank_pool: RankPool, directory: Path, tmp_path: Path) -> None:
    layout, world_size = LAYOUTS["TP2+SP"]
    recipe = recipe_of(name, with_kv=True)
    saved = rank_pool.run(
        f"{CASES}:quantize_in", world_size=world_size, directory=directory, layout=layout, recipe=recipe, save=tmp_path
    )
    expected = {"scales": joined(saved), "step": saved[0]["step"]}
    for layout, world_size in ((Layout(), 1), LAYOUTS["TP2"], LAYOUTS["PP2"], (Layout(tensor=2, pipeline=2), 4)):
        found = rank_pool.run(f"{CASES}:load_in", world_size=world_size, directory=tmp_path, layout=layout)
        check_same(found, expected, str(layout), sums=True)


@pytest.mark.parametrize("layout", ["TP2+SP", "PP2"])
def test_weights_that_are_rounded_once_give_the_same(layout: str, rank_pool: RankPool, directory: Path) -> None:
    where, world_size = LAYOUTS[layout]
    recipe = recipe_of("fp8", with_kv=True)
    found = rank_pool.run(
        f"{CASES}:rounded_once", world_size=world_size, directory=directory, layout=where, recipe=recipe
    )
    losses = [each for each in found if each is not None]
    assert losses
    assert all(before == after for before, after in losses)


def test_one_ranks_nan_is_every_ranks_error(rank_pool: RankPool, directory: Path) -> None:
    recipe = recipe_of("fp8_per_channel", with_kv=False)
    poison = "decoder.layers.0.self_attention.linear_qkv.weight"
    found = rank_pool.run(
        f"{CASES}:refused", world_size=2, directory=directory, layout=Layout(tensor=2), recipe=recipe, poison=poison
    )
    assert found[0] == found[1]
    assert "the weight of decoder.layers.0.self_attention.linear_qkv holds NaN or infinity" in found[0]


def test_an_activation_without_numbers_is_named(rank_pool: RankPool, directory: Path) -> None:
    """The norm of a layer, which is not quantised, spoils what the next linear map reads."""
    poison = "decoder.layers.1.pre_mlp_layernorm.weight"
    (found,) = rank_pool.run(
        f"{CASES}:refused",
        world_size=1,
        directory=directory,
        layout=Layout(),
        recipe=recipe_of("fp8", with_kv=False),
        poison=poison,
    )
    assert "the input of decoder.layers.1.mlp.linear_fc1 holds NaN or infinity" in found


def test_blocks_that_two_ranks_would_share_are_refused(rank_pool: RankPool, directory: Path) -> None:
    found = rank_pool.run(
        f"{CASES}:refused",
        world_size=2,
        directory=directory,
        layout=Layout(tensor=2),
        recipe=recipe_of("fp8_blockwise", with_kv=False),
    )
    assert all("blocks of 128 do not divide" in each and "tensor_model_parallel_size = 2" in each for each in found)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"exclude": ("*.q_prog",)}, "exclude pattern '*.q_prog' of recipe fp8 matches no linear map"),
        ({"include": ("*lm_head*",)}, "heads, embeddings and routers are never quantised"),
        ({"exclude": ("*",)}, "leaves nothing to quantise"),
        ({"exclude": ("*.k_proj",)}, "name a part of eagle_module.layers.0.self_attn.q_proj+k_proj+v_proj"),
    ],
)
def test_patterns_that_cannot_be_meant(
    changes: dict[str, Any], part: str, rank_pool: RankPool, directory: Path
) -> None:
    recipe = recipe_of("fp8", with_kv=False).model_copy(update=changes)
    found = rank_pool.run(
        f"{CASES}:refused", world_size=2, directory=directory, layout=Layout(pipeline=2), recipe=recipe
    )
    assert all(part in each for each in found), found


@pytest.mark.parametrize("layout", ["TP2+SP", "PP2"])
def test_the_unquantised_teacher_is_the_base_as_it_was(layout: str, rank_pool: RankPool, directory: Path) -> None:
    where, world_size = LAYOUTS[layout]
    recipe = recipe_of("int4_per_channel", with_kv=False)
    *_, found = rank_pool.run(
        f"{CASES}:teachers", world_size=world_size, directory=directory, layout=where, recipe=recipe
    )
    assert found["is the one before"] and found["is another"]
    quantised, unquantised = found["losses"]
    assert quantised != unquantised
    of_draft = recipe.model_copy(update={"include": ("eagle_module.*",)})
    *_, found = rank_pool.run(
        f"{CASES}:teachers", world_size=world_size, directory=directory, layout=where, recipe=of_draft
    )
    assert not found["is another"] and found["losses"][0] == found["losses"][1]

"""FP8 products and learned scales in every layout of a layer; what they refuse; runs that are resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mcore_spec.config.quantization import Recipe
from mcore_spec.parallel.layout import Layout
from tests.parallel.checks import check_resumed
from tests.parallel.quantization_cases import recipe_of
from tests.parallel.trainer_cases import Run
from tests.pool import RankPool
from tests.tiny import write_hf_model

CASES = "tests.parallel.quantization_cases"
# float64 sums in another order.
TOLERANCE = 1e-9
LEAST_SQNR = 25.0
TP2, TP2_SP = Layout(tensor=2), Layout(tensor=2, sequence_parallel=True)
# Multiples of 16 on each of two ranks.
SIZES = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
# Blocks of 128 inputs on each of two ranks.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("base"), "llama", tied=False, **SIZES)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("wide"), "llama", tied=False, **WIDE)


def sqnr(found: Tensor, expected: Tensor) -> float:
    return float(10 * torch.log10(expected.double().square().sum() / (found - expected).double().square().sum()))


def train(pool: RankPool, directory: Path, layout: Layout, name: str, scaling: str | None) -> list[dict[str, Any]]:
    options = {"directory": directory, "layout": layout, "name": name, "scaling": scaling}
    return pool.run(f"{CASES}:trained_in", world_size=layout.tensor, **options)


@pytest.mark.parametrize("name", ["fp8", "int8_per_channel"])
def test_gradients_of_learned_scales_are_those_of_one_rank(name: str, rank_pool: RankPool, directory: Path) -> None:
    (expected,) = train(rank_pool, directory, Layout(), name, None)
    learned = set(expected["learned"])
    assert learned and all("eagle_module" in each for each in learned)
    # Those that engines join are one, and named once.
    assert learned >= set(expected["scales"])
    for layout in (TP2, TP2_SP):
        for found in train(rank_pool, directory, layout, name, None):
            assert found["scales"].keys() == expected["scales"].keys()
            torch.testing.assert_close(found["loss"], expected["loss"], rtol=TOLERANCE, atol=0)
            for each, gradient in expected["scales"].items():
                bound = TOLERANCE * float(gradient.abs().max())
                assert bound > 0 and float((found["scales"][each] - gradient).abs().max()) <= bound, each


@pytest.mark.parametrize("name", ["fp8", "fp8_per_channel", "fp8_blockwise"])
def test_fp8_products_on_several_ranks(name: str, rank_pool: RankPool, directory: Path, wide: Path) -> None:
    where = wide if name == "fp8_blockwise" else directory
    (expected,) = train(rank_pool, where, Layout(), name, None)
    for layout in (Layout(), TP2, TP2_SP):
        for found in train(rank_pool, where, layout, name, "current"):
            torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-4, atol=0)
            assert found["gradients"].keys() == expected["gradients"].keys()
            mine, theirs = (
                torch.cat([each["gradients"][key].flatten() for key in expected["gradients"]])
                for each in (found, expected)
            )
            assert LEAST_SQNR <= sqnr(mine, theirs) < 100, (layout, sqnr(mine, theirs))


@pytest.mark.parametrize(
    ("recipe", "scaling", "part"),
    [
        (None, "current", "the model is not quantised; quantise it first"),
        (recipe_of("int8_per_channel", with_kv=False), "current", "recipe int8_per_channel has no FP8 numbers"),
        (recipe_of("fp8_per_channel", with_kv=False), "delayed", "choose current, or recipe fp8"),
        (recipe_of("fp8_blockwise", with_kv=False), "current", "multiples of 16 outputs and 128 inputs"),
    ],
)
def test_refusals(recipe: Recipe | None, scaling: str, part: str, rank_pool: RankPool, directory: Path) -> None:
    options = {"directory": directory, "layout": Layout(), "recipe": recipe, "scaling": scaling}
    (found,) = rank_pool.run(f"{CASES}:modes_refused", world_size=1, **options)
    assert found is not None and part in found


RUNS = {
    "learned": (Run(TP2, recipe="fp8", learns_scales=True), 2),
    "learned, FP8, bf16, distributed optimizer": (
        Run(
            Layout(),
            dtype="bfloat16",
            recipe="fp8",
            gradient_scaling="delayed",
            learns_scales=True,
            options={"bf16": True, "use_distributed_optimizer": True},
        ),
        2,
    ),
    "FP8 by channel": (Run(TP2_SP, recipe="fp8_per_channel", gradient_scaling="current"), 2),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_run_that_never_stopped(
    name: str, rank_pool: RankPool, directory: Path, tmp_path: Path
) -> None:
    run, world_size = RUNS[name]
    results = check_resumed(rank_pool, run, world_size=world_size, directory=directory, save=tmp_path)
    whole, _ = results[0]["logs"]
    losses = [line["loss"] for line in whole if "loss" in line]
    assert losses[2] < losses[0]


def test_learned_scales_and_their_moments_go_into_another_layout(
    rank_pool: RankPool, directory: Path, tmp_path: Path
) -> None:
    run = Run(TP2, dtype="float64", recipe="fp8", learns_scales=True)
    case = "tests.parallel.trainer_cases"
    options = {"directory": directory, "save": tmp_path}
    (expected, _) = rank_pool.run(f"{case}:train_and_save", world_size=2, run=run, **options)
    (found,) = rank_pool.run(f"{case}:load_and_train", world_size=1, run=run._replace(layout=Layout()), save=tmp_path)
    for when in ("saved", "next"):
        assert any("log_growth" in key for key in found[when])
        for key, value in expected[when].items():
            torch.testing.assert_close(
                found[when][key], value, rtol=1e-6, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}"
            )

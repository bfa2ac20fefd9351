"""A quantised export, read as an engine reads it, computes what the quantised modules compute.

The engine's side is `tests.reference.quantized_engine` in front of `tests.reference.engine`; in float64, so that no
value lies by rounding on the other side of the middle between two numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mcore_spec.config import eagle_preset
from mcore_spec.config.quantization import KV_CACHE_FP8, QuantFormat, find_recipe
from mcore_spec.parallel.layout import Layout
from tests.parity.hf_models import randomise
from tests.pool import RankPool
from tests.reference import drafts, engine, quantized_engine
from tests.tiny import write_hf_model

pytestmark = pytest.mark.parallel
CASES = "tests.parity.export_quantized_cases"
TOLERANCE = 1e-9
LAYOUTS = {"TP1": Layout(), "TP2": Layout(tensor=2), "PP2": Layout(pipeline=2)}
EAGLE3: Any = [("eagle", {})]
EAGLE1: Any = eagle_preset("eagle1")
TOKENS = torch.randint(103, (2, 12), generator=torch.Generator().manual_seed(4))
FORMS: list[tuple[str, QuantFormat]] = [
    ("fp8", "modelopt"),
    ("fp8", "compressed-tensors"),
    ("fp8_per_channel", "modelopt"),
    ("fp8_per_channel", "compressed-tensors"),
    ("int8_per_channel", "compressed-tensors"),
]
# Such that blocks of 128 divide every rank's part of every matrix.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "tiny": write_hf_model(root / "tiny", "llama", tied=False),
        "wide": write_hf_model(root / "wide", "llama", tied=True, **WIDE),
        "phi3": phi3(root / "phi3"),
    }


def phi3(directory: Path) -> Path:
    """A base whose files have query, key and value in one matrix."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "phi3", **sizes, num_key_value_heads=2, vocab_size=103, pad_token_id=0, tie_word_embeddings=False
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    randomise(model, torch.Generator().manual_seed(3))
    model.save_pretrained(directory)
    return directory


def engines_logits(
    directory: Path, target: Path, monkeypatch: pytest.MonkeyPatch, *, has_draft: bool
) -> tuple[Tensor, list[Tensor]]:
    """Of the base and of each step of the draft, [s, b, v], from the files alone."""
    read = quantized_engine.read(directory)
    base = engine.Base.load(quantized_engine.write_plain(directory, read, target / "base"), torch.float64)
    for name, module in base.model.named_modules():
        if name in read.inputs:
            module.register_forward_pre_hook(lambda _m, args, name=name: (read.inputs[name](args[0]), *args[1:]))
    _, last = base.hidden_states(TOKENS)
    logits = last @ base.head.t()
    if not has_draft:
        return logits, []
    of_draft = quantized_engine.read(directory / "draft")
    plain = quantized_engine.write_plain(directory / "draft", of_draft, target / "draft")
    inputs = {name.replace("midlayer.", "layers.0."): rounding for name, rounding in of_draft.inputs.items()}
    linear = drafts.linear

    def rounded(weights: Any, name: str, x: Tensor) -> Tensor:
        return linear(weights, name, inputs[name](x) if name in inputs else x)

    monkeypatch.setattr(drafts, "linear", rounded)
    draft = engine.load(plain, base)
    num_rows = TOKENS.shape[1] - 3
    features = draft.features(base, TOKENS[:, :num_rows])
    embeddings = [base.embed(TOKENS[:, 1 + step : 1 + step + num_rows]) for step in range(3)]
    return logits, draft.logits(features, embeddings)


def check_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_an_engine_computes_what_the_modules_compute(
    name: str,
    form: QuantFormat,
    layout: str,
    rank_pool: RankPool,
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if layout != "TP1" and form == "compressed-tensors" and name != "int8_per_channel":
        pytest.skip("the forms differ in shapes alone, which one layout shows")
    ranks = rank_pool.run(
        f"{CASES}:export_quantized",
        world_size=1 if layout == "TP1" else 2,
        base_directory=bases["tiny"],
        directory=tmp_path / "out",
        layout=LAYOUTS[layout],
        mode=EAGLE3,
        d2t=None,
        recipe=find_recipe(name),
        form=form,
        token_ids=TOKENS,
    )
    found = next(rank for rank in reversed(ranks) if rank is not None)
    logits, steps = engines_logits(tmp_path / "out", tmp_path, monkeypatch, has_draft=True)
    check_close(found["base"], logits)
    for ours, theirs in zip(found["draft"]["logits"], steps, strict=True):
        check_close(ours, theirs)
    if layout == "TP1":
        stored = quantized_engine.read(tmp_path / "out")
        assert len(found["weights"]) == 6 * 7
        assert all(torch.equal(stored.weights[key], weight) for key, weight in found["weights"].items())


@pytest.mark.parametrize(
    ("base", "name", "form", "mode"),
    [
        ("wide", "fp8_blockwise", "modelopt", EAGLE3),
        ("wide", "fp8_blockwise", "compressed-tensors", EAGLE3),
        ("phi3", "fp8_per_channel", "modelopt", None),
        ("phi3", "fp8", "modelopt", None),
        ("tiny", "fp8", "modelopt", EAGLE1),
    ],
)
def test_other_bases_and_drafts(
    base: str,
    name: str,
    form: QuantFormat,
    mode: Any,
    rank_pool: RankPool,
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (found,) = rank_pool.run(
        f"{CASES}:export_quantized",
        world_size=1,
        base_directory=bases[base],
        directory=tmp_path / "out",
        layout=Layout(),
        mode=mode,
        d2t=None,
        recipe=find_recipe(name),
        form=form,
        token_ids=TOKENS,
    )
    logits, steps = engines_logits(tmp_path / "out", tmp_path, monkeypatch, has_draft=mode is not None)
    check_close(found["base"], logits)
    for ours, theirs in zip(found["draft"]["logits"] if mode else [], steps, strict=True):
        check_close(ours, theirs)
    stored = quantized_engine.read(tmp_path / "out")
    assert all(torch.equal(stored.weights[key], weight) for key, weight in found["weights"].items())


@pytest.mark.parametrize("form", ["modelopt", "compressed-tensors"])
def test_patterns_and_key_value_scales_are_declared(
    form: QuantFormat, rank_pool: RankPool, bases: dict[str, Path], tmp_path: Path
) -> None:
    changes = {"kv_cache": KV_CACHE_FP8, "exclude": ("decoder.layers.2.*", "eagle_module.fc")}
    rank_pool.run(
        f"{CASES}:export_quantized",
        world_size=2,
        base_directory=bases["tiny"],
        directory=tmp_path / "out",
        layout=Layout(pipeline=2),
        mode=EAGLE3,
        d2t=None,
        recipe=find_recipe("fp8").model_copy(update=changes),
        form=form,
        token_ids=TOKENS,
    )
    base, draft = (quantized_engine.read(tmp_path / "out" / name) for name in (".", "draft"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    layer = [
        f"model.layers.2.{block}"
        for block in (
            "self_attn.o_proj",
            "mlp.down_proj",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        )
    ]
    assert config["ignore"] == ["lm_head", *layer]
    assert config["kv_cache_scheme"]["num_bits"] == 8
    file = tmp_path / "out" / "hf_quant_config.json"
    assert file.exists() == (form == "modelopt")
    if form == "modelopt":
        said = json.loads(file.read_text())["quantization"]
        expected = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": config["ignore"]}
        assert said == expected
    place = "self_attn.{}_proj.{}_scale" if form == "modelopt" else "self_attn.{1}_scale"
    for letter in "kv":
        names = {f"model.layers.{layer}.{place.format(letter, letter)}" for layer in range(6)}
        assert names == {name for name in base.scales if name.endswith(f".{letter}_scale")}
        assert f"midlayer.{place.format(letter, letter)}" in draft.scales
    # vLLM's name of it is `model.fc`: in ModelOpt's form it looks for a part of that, in the other for all of it.
    said = json.loads((tmp_path / "out" / "draft" / "config.json").read_text())["quantization_config"]["ignore"]
    assert said == (["lm_head", "fc"] if form == "modelopt" else ["lm_head", "fc", "model.fc"])
    assert draft.weights["fc.weight"].dtype is torch.float64
    assert "fc" not in draft.inputs and "midlayer.mlp.up_proj" in draft.inputs


def test_a_draft_that_is_left_out_has_no_scales(rank_pool: RankPool, bases: dict[str, Path], tmp_path: Path) -> None:
    """Of keys and values neither."""
    rank_pool.run(
        f"{CASES}:export_quantized",
        world_size=1,
        base_directory=bases["tiny"],
        directory=tmp_path / "out",
        layout=Layout(),
        mode=EAGLE3,
        d2t=None,
        recipe=find_recipe("fp8").model_copy(update={"kv_cache": KV_CACHE_FP8, "exclude": ("eagle_module.*",)}),
        form=None,
        token_ids=TOKENS,
    )
    base, draft = (quantized_engine.read(tmp_path / "out" / name) for name in (".", "draft"))
    assert any(name.endswith(".k_scale") for name in base.scales) and not draft.scales and not draft.inputs
    assert "quantization_config" not in json.loads((tmp_path / "out" / "draft" / "config.json").read_text())


@pytest.mark.parametrize(
    ("mode", "name", "changes", "form", "part"),
    [
        (EAGLE3, "int8_per_channel", {}, None, "give --export-quant-format compressed-tensors"),
        (EAGLE3, "int4_per_channel", {}, "compressed-tensors", "is for experiments: no engine reads it"),
        (EAGLE3, "fp8_blockwise", {}, None, "no multiple of 128"),
        (EAGLE3, "fp8", {"exclude": ("*.mlp.down_proj",)}, None, "quantise all of eagle_module.layers.* or none"),
        ("medusa", "fp8", {}, None, "engines read no scales there; quantise the base alone"),
        (EAGLE3, "fp8", {"include": ("eagle*",), "kv_cache": KV_CACHE_FP8}, None, "no declaration says that"),
    ],
)
def test_what_no_engine_would_read_is_not_written(
    mode: Any,
    name: str,
    changes: dict[str, Any],
    form: QuantFormat | None,
    part: str,
    rank_pool: RankPool,
    bases: dict[str, Path],
    tmp_path: Path,
) -> None:
    (message,) = rank_pool.run(
        f"{CASES}:refused",
        world_size=1,
        base_directory=bases["tiny"],
        directory=tmp_path / "out",
        mode=mode,
        recipe=find_recipe(name).model_copy(update=changes),
        form=form,
        token_ids=TOKENS,
    )
    assert message.startswith("UnsupportedError") and part in message
    assert list(tmp_path.iterdir()) == []

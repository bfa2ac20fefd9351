"""Quantised transformers models through ``save_pretrained`` and ``from_pretrained``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import mcore_spec
from mcore_spec import CheckpointError, ConfigError
from mcore_spec.config import eagle_preset
from mcore_spec.quantization.installed import CHILD, quantization_of
from tests.tiny import VOCAB_SIZE, write_hf_model

RECIPES = ("fp8", "int8_per_channel")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("base") / "llama", "llama", tied=False, dtype=torch.float64)


def token_ids() -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))


def quantised(base_dir: Path, recipe: str, *, with_draft: bool) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(base_dir)
    if with_draft:
        mcore_spec.convert(model, eagle_preset("eagle3"))
    loop = (lambda live: live(input_ids=token_ids(), labels=token_ids())) if recipe == "fp8" else None
    return mcore_spec.quantize(model.eval(), recipe, loop)


@pytest.mark.parametrize("with_draft", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_scales_come_back(recipe: str, with_draft: bool, base_dir: Path, tmp_path: Path) -> None:
    mcore_spec.enable_huggingface_checkpointing()
    model = quantised(base_dir, recipe, with_draft=with_draft)
    model.save_pretrained(tmp_path / "saved")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    before, after = quantization_of(model), quantization_of(loaded)
    assert before is not None and after is not None
    assert before.record == after.record
    for name, scale in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], scale), name
    with torch.no_grad():
        expected, found = model(token_ids()).logits, loaded(token_ids()).logits
        plain = AutoModelForCausalLM.from_pretrained(base_dir)(token_ids()).logits
        # Weights lie elsewhere in memory, so that products add up in another order.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert not torch.allclose(found, plain)
        if with_draft:
            losses = [each(input_ids=token_ids(), labels=token_ids()).loss for each in (model, loaded)]
            torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("state", ["quantised", "loaded", "loaded without its scales"])
def test_a_quantised_base_takes_no_draft(state: str, base_dir: Path, tmp_path: Path) -> None:
    """Neither a new one nor one from files: the recipe covers it, and it would have no scales."""
    mcore_spec.save(mcore_spec.convert(AutoModelForCausalLM.from_pretrained(base_dir), "eagle"), tmp_path / "draft")
    model = quantised(base_dir, "int8_per_channel", with_draft=False)
    if state != "quantised":
        model.save_pretrained(tmp_path / "base")
        if state == "loaded":
            mcore_spec.enable_huggingface_checkpointing()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = [name for name, _ in model.named_modules()]
    message = "the model is quantised .*convert the one that it was made from, and quantise base and draft together"
    with pytest.raises(ConfigError, match=message):
        mcore_spec.convert(model, "eagle")
    with pytest.raises(ConfigError, match=message):
        mcore_spec.restore(model, tmp_path / "draft")
    assert [name for name, _ in model.named_modules()] == before and "mcore_spec" not in vars(model.config)


def test_the_draft_of_a_quantised_model_is_not_taken_alone(base_dir: Path, tmp_path: Path) -> None:
    quantised(base_dir, "int8_per_channel", with_draft=True).save_pretrained(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(base_dir)
    with pytest.raises(CheckpointError, match=r"holds a quantised model \(int8_per_channel\).*load it whole"):
        mcore_spec.restore(plain, tmp_path / "saved")


def test_damaged_directories(base_dir: Path, tmp_path: Path) -> None:
    mcore_spec.enable_huggingface_checkpointing()
    quantised(base_dir, "int8_per_channel", with_draft=False).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if name.startswith(f"{CHILD}."))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="scales of its recipe int8_per_channel are missing or too many"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["mcore_spec_quantization"]["format_version"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has format_version 7; this package reads 1"):
        AutoModelForCausalLM.from_pretrained(tmp_path)

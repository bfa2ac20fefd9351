"""A transformers model that is trained with its draft: what takes gradients, is refused, saved, resumed, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import mcore_spec
from mcore_spec import ConfigError, UnsupportedError
from mcore_spec.config import eagle_preset
from mcore_spec.export.plan import TRAINED_BASE
from mcore_spec.hosting.base_run import LAST_STATES
from mcore_spec.huggingface.arguments import parse_arguments
from mcore_spec.huggingface.train import run
from mcore_spec.weights.safetensors_io import WeightDirectory
from tests.tiny import VOCAB_SIZE, joint_mode, write_hf_model
from tests.unit.test_huggingface_trainer import train, weights

JOINT = joint_mode("eagle3")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("base") / "llama", "llama", tied=True, dtype=torch.float64)


@pytest.fixture
def model(base_dir: Path) -> Any:
    return mcore_spec.convert(AutoModelForCausalLM.from_pretrained(base_dir), JOINT).train()


def tokens() -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(3))


def test_both_take_gradients_and_a_step_lowers_both_losses(model: Any) -> None:
    assert all(parameter.requires_grad for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = []
    for _ in range(4):
        outputs.append(model(input_ids=tokens(), labels=tokens()))
        optimizer.zero_grad()
        outputs[-1].loss.backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    assert outputs[-1].lm_loss < outputs[0].lm_loss
    own = [output.loss.detach() - output.lm_loss for output in outputs]
    assert own[-1] < own[0]


def test_a_frozen_base_runs_without_autograd(model: Any, base_dir: Path) -> None:
    frozen: Any = mcore_spec.convert(AutoModelForCausalLM.from_pretrained(base_dir), eagle_preset("eagle3")).train()
    frozen(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is None for parameter in frozen.model.parameters())
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.parameters())


def test_evaluation_measures_the_same_loss(model: Any) -> None:
    trained = model(input_ids=tokens(), labels=tokens())
    with torch.no_grad():
        measured = model.eval()(input_ids=tokens(), labels=tokens())
    assert not measured.loss.requires_grad and measured.logits is not None
    torch.testing.assert_close(measured.loss, trained.loss.detach())
    torch.testing.assert_close(measured.lm_loss, trained.lm_loss)


def test_layers_are_computed_again_where_transformers_is_told_to(model: Any) -> None:
    """In backward, and without one not at all; they are left as transformers set them up."""
    calls: list[bool] = []
    model.model.layers[2].mlp.register_forward_pre_hook(lambda module, _inputs: calls.append(module.training))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    model.activation_checkpointing_enable()
    before = [(layer.training, layer._gradient_checkpointing_func) for layer in model.model.layers]
    assert calls == [False]
    loss = model(input_ids=tokens(), labels=tokens()).loss
    assert calls == [False] * 2
    loss.backward()
    with torch.no_grad():
        model(input_ids=tokens(), labels=tokens())
    assert calls == [False] * 4
    assert [(layer.training, layer._gradient_checkpointing_func) for layer in model.model.layers] == before
    assert model.config._attn_implementation == "sdpa"


def test_what_is_refused(model: Any, base_dir: Path, tmp_path: Path) -> None:
    batch = {"input_ids": tokens(), "labels": tokens()}
    with pytest.raises(ConfigError, match=f"{LAST_STATES} given with eagle_freeze_base_model = false"):
        model(**batch, **{LAST_STATES: torch.zeros(2, 12, 16, dtype=torch.float64)})
    mcore_spec.quantize(model, "int8_per_channel")
    with pytest.raises(UnsupportedError, match="eagle_freeze_base_model = false on a quantised LlamaForCausalLM"):
        model(**batch)


def test_the_script_refuses_stored_states(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcore_spec.huggingface.train.load_tokenizer", lambda _directory: None)
    config = tmp_path / "eagle.json"
    config.write_text(json.dumps({"eagle_freeze_base_model": False}))
    words = f"--model_name_or_path {base_dir} --offline_data {tmp_path} --eagle_config {config} --use_cpu True"
    arguments = parse_arguments([*words.split(), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="--offline_data with eagle_freeze_base_model = false"):
        run(arguments.draft, arguments.training, say=print)


def test_a_resumed_run_is_bitwise(base_dir: Path, tmp_path: Path) -> None:
    """Base and draft; what is loaded goes on training both, as its record says."""
    mcore_spec.enable_huggingface_checkpointing()
    options: dict[str, Any] = {"mode": JOINT, "gradient_checkpointing": True}
    whole = train(base_dir, tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = train(base_dir, tmp_path / "resumed", resume=str(checkpoint), **options)
    expected, found = weights(whole), weights(resumed)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    before = AutoModelForCausalLM.from_pretrained(base_dir).state_dict()
    assert [name for name, value in before.items() if torch.equal(expected[name], value)] == []
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    frozen: Any = mcore_spec.convert(AutoModelForCausalLM.from_pretrained(base_dir), eagle_preset("eagle3"))
    frozen.save_pretrained(tmp_path / "frozen")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "frozen")
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_the_trained_base_lies_in_the_export_of_its_draft(model: Any, base_dir: Path, tmp_path: Path) -> None:
    mcore_spec.enable_huggingface_checkpointing()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.125)
    mcore_spec.export_speculative_decoding(model, export_dir=tmp_path / "draft")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "draft" / "base")
    assert not any("eagle" in name for name in base.state_dict())
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in base.state_dict().items())
    plain = json.loads((base_dir / "config.json").read_text())
    assert json.loads((tmp_path / "draft" / "base" / "config.json").read_text()) == plain
    identity = json.loads((tmp_path / "draft" / "mcore_spec_export.json").read_text())["identity"]
    assert identity["source"] == TRAINED_BASE
    assert identity["fingerprint"] == WeightDirectory(tmp_path / "draft" / "base").fingerprint()
    card = (tmp_path / "draft" / "README.md").read_text()
    assert "in `base/` of this directory" in card and str(base_dir) not in card
    # The model is as it was.
    assert model.config.mcore_spec["base"] == str(base_dir)
    mcore_spec.restore(base, tmp_path / "draft")
    with torch.no_grad():
        theirs, ours = (each.eval()(input_ids=tokens(), labels=tokens()) for each in (base, model))
    assert torch.equal(theirs.loss, ours.loss)

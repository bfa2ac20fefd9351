"""EAGLE-1 and EAGLE-MTP through the commands: converted, trained, measured, exported and read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mcore_spec.config import EagleAlgorithm
from mcore_spec.weights.safetensors_io import WeightDirectory
from tests.e2e.conftest import Run, check_refused
from tests.e2e.interrupted import log_of
from tests.e2e.test_finetune import words
from tests.tiny import write_hf_model

pytestmark = pytest.mark.e2e
ARCHITECTURES = {"eagle1": "LlamaForCausalLM", "eagle-mtp": "EagleMTPModel"}


def convert(run: Run, base: Path, save: Path, member: EagleAlgorithm, **fields: object) -> Path:
    config = save.with_suffix(".json")
    config.write_text(json.dumps({"eagle_architecture_config": FLAGS[member], **fields}))
    chosen = ("--export-algorithm", "eagle", "--export-eagle-algorithm", member, "--algorithm-config", config)
    done = run("convert", "--pretrained-model-path", base, *chosen, "--save", save)
    assert done.code == 0, done.err
    return save


FLAGS = {
    "eagle1": {"use_input_layernorm_in_first_layer": False},
    "eagle-mtp": {"use_mtp_layernorm": True, "use_last_layernorm": True},
}


@pytest.mark.parametrize("member", ["eagle1", "eagle-mtp"])
def test_from_conversations_to_an_exported_draft(
    member: EagleAlgorithm, run: Run, base: Path, data: Path, tmp_path: Path
) -> None:
    fields = {"eagle_feature_noise": 0.001} if member == "eagle1" else {}
    converted, save = convert(run, base, tmp_path / "converted", member, **fields), tmp_path / "trained"
    done = run("finetune", *words(converted, data, save, "--train-iters", 3, "--eval-acceptance-interval", 2))
    assert done.code == 0, done.err
    trained = [entry for entry in log_of(save) if "loss" in entry]
    assert len(trained) == 3
    assert all(("regression_by_step" in entry) == (member == "eagle1") for entry in trained)
    assert any("acceptance_length" in entry for entry in log_of(save))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Name three colours.\nSay hello.\n")
    asked = ("--prompts-path", prompts, "--steps", 2, "--osl", 8)
    done = run("validate", "--load", save, *asked, "--output", tmp_path / "first.json")
    assert done.code == 0, done.err
    draft = tmp_path / "draft"
    done = run("export", "--load", save, "--export-dir", draft, "--export-extra-modules")
    assert done.code == 0, done.err
    assert json.loads((draft / "config.json").read_text())["architectures"] == [ARCHITECTURES[member]]
    done = run("validate", "--base", base, "--draft", draft, *asked, "--output", tmp_path / "second.json")
    assert done.code == 0, done.err
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("first.json", "second.json"))
    assert first["lossless"] and second["lossless"]
    assert first["acceptance_length"] == second["acceptance_length"]


def test_a_log_without_accuracy(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    converted = convert(run, base, tmp_path / "converted", "eagle-mtp", eagle_report_acc=False)
    done = run("finetune", *words(converted, data, tmp_path / "trained", "--train-iters", 1))
    assert done.code == 0, done.err
    for entry in log_of(tmp_path / "trained"):
        assert not any("accuracy" in name or "simulated" in name for name in entry)


def test_what_these_drafts_do_not_have(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    chosen = ("--export-algorithm", "eagle", "--export-eagle-algorithm", "eagle1", "--draft-init", "base")
    done = run("convert", "--pretrained-model-path", base, *chosen, "--save", tmp_path / "refused")
    check_refused(done, "draft_init = base is not built for EAGLE-1", "choose draft_init = random")
    assert not (tmp_path / "refused").exists()
    reusing = convert(run, base, tmp_path / "converted", "eagle-mtp", eagle_reuse_base_decoder=True)
    done = run("finetune", *words(reusing, data, tmp_path / "save", "--train-iters", 1, "--fit-start", 1))
    check_refused(done, "fit_start = 1: this draft has no such start", "leave it at 0")
    assert not (tmp_path / "save").exists()


def test_a_base_that_is_trained_with_its_draft(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    converted, save = tmp_path / "converted", tmp_path / "trained"
    convert(run, base, converted, "eagle1", eagle_freeze_base_model=False)
    done = run("finetune", *words(converted, data, save, "--train-iters", 3))
    assert done.code == 0, done.err
    own = [entry["lm_loss"] for entry in log_of(save) if "lm_loss" in entry]
    assert len(own) == 3
    assert own[-1] < own[0]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Name three colours.\nSay hello.\n")
    asked = ("--prompts-path", prompts, "--steps", 2, "--osl", 8)
    done = run("validate", "--load", save, *asked, "--output", tmp_path / "first.json")
    assert done.code == 0, done.err
    both = tmp_path / "both"
    done = run("export", "--load", save, "--export-dir", both)
    assert done.code == 0, done.err
    with WeightDirectory(base) as before, WeightDirectory(both) as after:
        assert before.tensors.keys() == after.tensors.keys()
        for name in before.tensors:
            assert not torch.equal(before.read(name), after.read(name).to(before.tensors[name].dtype)), name
    extraction = ("--load", save, "--data-path", data, "--output-dir", tmp_path / "states", "--seq-length", 64)
    check_refused(run("extract", *extraction), "has trained the base of", "extract-hf --pretrained-model-path")
    # The base that it was made from is not the one to serve it with.
    assert str(base) not in (both / "draft" / "README.md").read_text()
    done = run("validate", "--base", both, "--draft", both / "draft", *asked, "--output", tmp_path / "second.json")
    assert done.code == 0, done.err
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("first.json", "second.json"))
    assert first["lossless"] and second["lossless"]
    assert first["acceptance_length"] == second["acceptance_length"]


def test_a_draft_that_starts_as_the_layer_of_its_base(run: Run, tmp_path: Path) -> None:
    base = write_hf_model(tmp_path / "base", "qwen2", tied=False, dtype=torch.float32)
    convert(run, base, tmp_path / "first", "eagle-mtp")
    done = run("export", "--load", tmp_path / "first", "--export-dir", tmp_path / "mimo", "--export-format", "mimo")
    assert done.code == 0, done.err
    chosen = ("--export-algorithm", "eagle", "--export-eagle-algorithm", "eagle-mtp", "--draft-init", "mtp")
    done = run("convert", "--pretrained-model-path", base, *chosen, "--save", tmp_path / "refused")
    check_refused(done, "is no base with a layer for multi-token prediction", "choose draft_init = random")
    source = ("--pretrained-model-path", tmp_path / "mimo")
    done = run("convert", *source, *chosen, "--seed", 7, "--save", tmp_path / "second")
    assert done.code == 0, done.err
    done = run("export", "--load", tmp_path / "second", "--export-dir", tmp_path / "again", "--export-format", "mimo")
    assert done.code == 0, done.err
    for name in ("model.safetensors", "draft.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "mimo" / name).read_bytes()
    assert not (tmp_path / "refused").exists()

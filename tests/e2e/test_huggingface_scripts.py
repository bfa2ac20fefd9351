"""examples/hf as a user runs it: the one-line script, resume, the draft vocabulary, and what users get wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from mcore_spec.huggingface.train import DraftArguments
from mcore_spec.huggingface.train import run as train
from mcore_spec.weights.safetensors_io import WeightDirectory
from tests.e2e.conftest import Run, subprocess_environment

pytestmark = pytest.mark.e2e
REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "examples" / "hf"
TIMEOUT_S = 280


@pytest.fixture(scope="module")
def conversations(base: Path) -> Path:
    file = base.parent / "conversations.jsonl"
    lines = [
        [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": f"{word}, gladly."}]
        for word in ("hello", "goodbye", "thanks", "sorry")
    ]
    file.write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines))
    return file


def start(words: Sequence[object]) -> subprocess.CompletedProcess[str]:
    # accelerate tells the processes that it starts by these.
    kept = {name: value for name, value in subprocess_environment().items() if not name.startswith("ACCELERATE_")}
    environment = {**kept, "PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [str(word) for word in words], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def test_the_one_line_script(base: Path, conversations: Path, tmp_path: Path) -> None:
    words = [
        *("bash", SCRIPTS / "train_eagle3_and_export.sh", "--base_model", base, "--num_gpu", 1),
        *("--data", conversations, "--output_dir", tmp_path / "out", "--num_epochs", 1, "--train_bs", 2),
        *("--training_seq_len", 64, "--num_prompts", 2, "--osl", 4, "--logging_steps", 1),
    ]
    done = start(words)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    validated = json.loads((out / "validate.json").read_text())
    assert validated["lossless"] and validated["acceptance_length"] >= 1
    config = json.loads((out / "export" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    record = json.loads((out / "export" / "mcore_spec_export.json").read_text())
    assert record["identity"]["fingerprint"] == WeightDirectory(base).fingerprint()
    assert record["identity"]["source"] == str(base)
    with WeightDirectory(out / "export") as exported, WeightDirectory(out / "model", below="eagle_module.") as trained:
        assert torch.equal(exported.read("fc.weight"), trained.read("fc.weight"))
    state = json.loads((out / "model" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and "accuracy_0" in state["log_history"][0]
    assert "tokenizer.json" in os.listdir(out / "model")


def test_a_draft_vocabulary_and_two_processes(run_script: Run, base: Path, conversations: Path, tmp_path: Path) -> None:
    words = ("--model", base, "--data", conversations, "--draft_vocab_size", 50, "--save_dir", tmp_path / "vocab")
    done = run_script(SCRIPTS / "calibrate_draft_vocab.py", *words)
    assert done.code == 0, done.err
    (tmp_path / "eagle.json").write_text(json.dumps({"eagle_ttt_steps": 2}))
    words = [
        *("bash", SCRIPTS / "launch_train.sh", "--model", base, "--output_dir", tmp_path / "out", "--num_gpu", 2),
        *("--data", conversations, "--num_epochs", 1, "--train_bs", 1, "--training_seq_len", 64),
        *("--eagle_config", tmp_path / "eagle.json", "--draft_vocab_cache", tmp_path / "vocab" / "d2t.pt"),
    ]
    done = start(words)
    assert done.returncode == 0, done.stderr[-3000:]
    with WeightDirectory(tmp_path / "out", below="eagle_module.") as trained:
        assert trained.tensors["lm_head.weight"].shape == (50, 32)
        assert torch.equal(trained.read("d2t"), torch.load(tmp_path / "vocab" / "d2t.pt"))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mcore_spec"]["config"]["eagle_ttt_steps"] == 2


def test_stored_hidden_states(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    """Steps have the losses that they have beside the base."""
    words = ("--pretrained-model-path", base, "--data-path", data, "--output-dir", tmp_path / "states")
    extracted = run("extract-hf", *words, "--seq-length", 64, "--storage-dtype", "fp32")
    assert extracted.code == 0, extracted.err
    logged = []
    for name, learned in (
        ("beside", {"data_path": [str(data)]}),
        ("stored", {"offline_data": str(tmp_path / "states")}),
    ):
        arguments = DraftArguments(model_name_or_path=str(base), training_seq_len=64, **learned)
        options: dict[str, Any] = {"max_steps": 3, "logging_steps": 1, "use_cpu": True, "report_to": []}
        train(arguments, TrainingArguments(output_dir=str(tmp_path / name), **options))
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        logged.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    beside, stored = logged
    assert stored == pytest.approx(beside, rel=1e-4)
    assert stored[-1] < stored[0]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["--offline-data", "states"],
            "--data_path or --offline_data: both are given; give conversations or stored hidden states",
        ),
        (["--eagle_config", "nowhere.json"], "--eagle_config = nowhere.json: no such file"),
        (["--eval_strategy", "epoch"], "--eval_strategy and --eval_data_path need each other"),
    ],
)
def test_bad_input(
    run_script: Run, base: Path, conversations: Path, tmp_path: Path, extra: list[str], message: str
) -> None:
    words = ["--model_name_or_path", base, "--data_path", conversations]
    done = run_script(SCRIPTS / "main.py", *words, "--output_dir", tmp_path / "out", "--use_cpu", "True", *extra)
    assert done.code == 2 and message in done.err, done.err[-2000:]
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_launch_without_its_flags() -> None:
    for script, flag in (("launch_train.sh", "--model"), ("train_eagle3_and_export.sh", "--base_model")):
        done = start(["bash", SCRIPTS / script])
        assert done.returncode == 2 and f"error: {flag} is missing" in done.stderr
        assert "num_gpu" in start(["bash", SCRIPTS / script, "--help"]).stdout


def test_a_directory_without_a_draft_is_told(run_script: Run, base: Path, tmp_path: Path) -> None:
    script = SCRIPTS / "export_hf_checkpoint.py"
    done = run_script(script, "--model_path", base, "--export_path", tmp_path / "export")
    assert done.code == 2 and "has no draft; attach one first" in done.err
    done = run_script(script, "--model_path", tmp_path / "nowhere", "--export_path", tmp_path / "export")
    assert done.code == 2 and "nowhere" in done.err

"""examples/hf as a user runs it: the one-line script, resume, the draft vocabulary, and what users get wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, TrainingArguments

import mcore_spec
from mcore_spec import CheckpointError, ConfigError
from mcore_spec.data.chat import load_tokenizer
from mcore_spec.huggingface.arguments import DraftArguments
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
    assert "the draft starts as the least-squares solution of" in done.stdout
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
    assert done.stdout.count("the draft starts as the least-squares solution of") == 1
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
        train(arguments, TrainingArguments(output_dir=str(tmp_path / name), **options), say=lambda _line: None)
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
        (["--lerning_rate", "1"], "error: --lerning_rate: unknown option; did you mean --learning_rate?"),
        (["--num_train_epochs", "0"], "--num_train_epochs = 0.0: nothing would be learned"),
        (["--training_seq_len", "257"], "--training_seq_len 257 is above the base's 256 positions; lower it"),
        (
            ["--mode", "medusa", "--fit_start", "2", "--training_seq_len", "64"],
            "fit_start = 2: this draft has no such start",
        ),
    ],
)
def test_bad_input(
    run_script: Run, base: Path, conversations: Path, tmp_path: Path, extra: list[str], message: str
) -> None:
    words = ["--model_name_or_path", base, "--data_path", conversations]
    done = run_script(SCRIPTS / "main.py", *words, "--output_dir", tmp_path / "out", "--use_cpu", "True", *extra)
    assert done.code == 2 and message in done.err, done.err[-2000:]
    assert not (tmp_path / "out" / "model.safetensors").exists()


def short_run(base: Path, conversations: Path, output: Path, **options: Any) -> list[str]:
    """A run in this process, a checkpoint a step; what it says."""
    said: list[str] = []
    own = ("mode", "fit_start", "eval_data_path", "eagle_config", "draft_vocab_cache", "training_seq_len")
    draft = {"training_seq_len": 64} | {name: options.pop(name) for name in own if name in options}
    arguments = DraftArguments(model_name_or_path=str(base), data_path=[str(conversations)], **draft)
    settings = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": []}
    train(arguments, TrainingArguments(output_dir=str(output), **{**settings, **options}), say=said.append)
    return said


def test_a_run_goes_on_from_the_last_whole_checkpoint(base: Path, conversations: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = short_run(base, conversations, out)
    assert [line.split(" ")[0] for line in said] == ["data:", "the"]
    assert said[1].startswith("the draft starts as the least-squares solution of")
    with WeightDirectory(out) as trained:
        expected = trained.fingerprint()
    # What a kill in the middle of a save leaves.
    (out / "checkpoint-2" / "trainer_state.json").unlink()
    (out / "checkpoint-2" / "model.safetensors").write_bytes(b"half")
    config = (out / "config.json").read_text()
    assert short_run(base, conversations, out) == [said[0], f"goes on from {out / 'checkpoint-1'}"]
    assert (out / "config.json").read_text() == config
    with WeightDirectory(out) as trained:
        assert trained.fingerprint() == expected
    done = [
        said[0],
        f"goes on from {out / 'checkpoint-2'}",
        "all 2 steps were done before; raise --num_train_epochs or --max_steps",
    ]
    assert [line.partition(" to go on")[0] for line in short_run(base, conversations, out)] == done
    # What a kill behind the last checkpoint leaves is made up for.
    (out / "model.safetensors").unlink()
    assert short_run(base, conversations, out)[-1].startswith("all 2 steps were done before")
    epochs = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 3}
    assert short_run(base, conversations, tmp_path / "epochs", **epochs)[-1].startswith("the draft starts")
    said_then = short_run(base, conversations, tmp_path / "epochs", **epochs)
    assert said_then[-1].startswith("all 2 steps were done before")
    with pytest.raises(CheckpointError, match="trains another draft than --mode and --eagle_config say"):
        short_run(base, conversations, out, mode="medusa")
    with pytest.raises(CheckpointError, match="other data, or from the same with another --training_seq_len"):
        short_run(base, conversations, out, training_seq_len=63)
    other = shutil.copytree(base, tmp_path / "other")
    with WeightDirectory(base) as weights:
        tensors = {name: weights.read(name) for name in weights.tensors}
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}, other / "model.safetensors")
    with pytest.raises(CheckpointError, match="checkpoint-2 is of a run on another base than --model_name_or_path"):
        short_run(other, conversations, out)
    with WeightDirectory(out) as trained:
        assert trained.fingerprint() == expected


def test_a_run_is_measured_between(base: Path, conversations: Path, tmp_path: Path) -> None:
    """And the best of its checkpoints is what is written."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    short_run(base, conversations, tmp_path / "out", eval_data_path=[str(conversations)], **options)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert sorted(losses) == [1, 2] and state["best_metric"] == min(losses.values())
    with WeightDirectory(Path(state["best_model_checkpoint"])) as best, WeightDirectory(tmp_path / "out") as written:
        assert written.fingerprint() == best.fingerprint()


def test_stored_states_are_not_measured_between(base: Path, tmp_path: Path) -> None:
    arguments = DraftArguments(model_name_or_path=str(base), offline_data="states", eval_data_path=["more.jsonl"])
    training = TrainingArguments(output_dir=str(tmp_path), eval_strategy="epoch", use_cpu=True)
    with pytest.raises(ConfigError, match="--eval_data_path with --offline_data.*ar_validate.py"):
        train(arguments, training, say=lambda _line: None)


def test_places_that_are_not_written_to(base: Path, conversations: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is the base's directory, whose files would be replaced"):
        short_run(base, conversations, base)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file; give a directory"):
        short_run(base, conversations, tmp_path / "file")


def test_a_model_that_cannot_be_loaded_is_told(base: Path, conversations: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(base, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="transformers cannot load it .*give a model that is whole"):
        short_run(damaged, conversations, tmp_path / "out")


def test_what_transformers_cannot_load_is_told(
    run_script: Run, base: Path, conversations: Path, tmp_path: Path
) -> None:
    """A package that it needs for such weights is not there."""
    packed = shutil.copytree(base, tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (packed / "config.json").write_text(json.dumps(config))
    words = ["--data_path", conversations, "--output_dir", tmp_path / "out", "--use_cpu", "True"]
    done = run_script(SCRIPTS / "main.py", "--model_name_or_path", packed, *words)
    assert done.code == 2 and "transformers cannot load it" in done.err and "compressed" in done.err


@pytest.fixture(scope="module")
def quantised(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `save_pretrained` writes of a quantised model with a draft."""
    directory = tmp_path_factory.mktemp("quantised") / "model"
    model = mcore_spec.convert(AutoModelForCausalLM.from_pretrained(base), "eagle")
    mcore_spec.quantize(model, "int8_per_channel").save_pretrained(directory)
    load_tokenizer(base).save_pretrained(directory)
    return directory


def test_commands_that_read_no_scales_of_it(
    run: Run, run_script: Run, quantised: Path, conversations: Path, tmp_path: Path
) -> None:
    message = f"= {quantised} is a quantised model (mcore_spec_quantization in its config.json)"
    save = tmp_path / "converted"
    done = run(
        *("convert", "--pretrained-model-path", quantised, "--save", save, "--export-algorithm", "eagle"),
    )
    assert done.code == 2 and f"pretrained_model_path {message}" in done.err and not save.exists()
    done = run_script(SCRIPTS / "ar_validate.py", "--model_path", quantised)
    assert done.code == 2 and f"base {message}" in done.err


def test_conversations_without_anything_to_learn_are_told(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "conversations.jsonl"
    turns = [
        [{"role": "user", "content": "word " * count}, {"role": "assistant", "content": "Yes."}] for count in (1, 99)
    ]
    file.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    said = short_run(base, file, tmp_path / "out", max_steps=1)
    assert "data: 1 conversations" in said[0] and "1 without a token of the model's left out" in said[0]
    assert "0 truncated at --training_seq_len" in said[0]


@pytest.mark.parametrize("with_scales", [True, False])
def test_a_draft_goes_on(base: Path, quantised: Path, conversations: Path, tmp_path: Path, with_scales: bool) -> None:
    """Where it was, on the model as it was saved: quantised or not, over a kill, and exported."""
    start, out = quantised, tmp_path / "out"
    if not with_scales:
        start = tmp_path / "start"
        short_run(base, conversations, start, max_steps=1)
    said = short_run(start, conversations, out, learning_rate=1e-3)
    assert said[0].startswith(f"goes on with the EAGLE-3 draft of {start}") and len(said) == 2
    assert ("quantised" in said[0]) == with_scales
    with WeightDirectory(start) as before, WeightDirectory(out) as after:
        assert before.tensors.keys() == after.tensors.keys()
        changed = {name for name in before.tensors if not torch.equal(before.read(name), after.read(name))}
        expected = after.fingerprint()
    assert changed and all(name.startswith("eagle_module.") for name in changed)
    if not with_scales:
        # Behind a start from data matrices keep their rates.
        rates = json.loads((start / "config.json").read_text())["mcore_spec"]["rates"]
        optimizer = torch.load(out / "checkpoint-1" / "optimizer.pt", weights_only=True)
        found = [group["initial_lr"] for group in optimizer["param_groups"]]
        assert sorted(found) == pytest.approx(sorted([1e-3, *(1e-3 * rate for rate in rates.values())]))
    (out / "checkpoint-2" / "trainer_state.json").unlink()
    assert short_run(start, conversations, out, learning_rate=1e-3)[-1] == f"goes on from {out / 'checkpoint-1'}"
    with WeightDirectory(out) as again:
        assert again.fingerprint() == expected
    other = base if with_scales else quantised
    with pytest.raises(CheckpointError, match="quantised in another way"):
        short_run(other, conversations, out)


def test_options_of_a_new_draft_where_there_is_one(quantised: Path, conversations: Path, tmp_path: Path) -> None:
    (tmp_path / "eagle.json").write_text("{}")
    for option, value in (
        ("mode", "medusa"),
        ("mode", "eagle1"),
        ("eagle_config", str(tmp_path / "eagle.json")),
        ("draft_vocab_cache", "d2t.pt"),
        ("fit_start", 1),
    ):
        with pytest.raises(ConfigError, match=rf"--{option} {value}: .* has a draft already \(eagle3\)"):
            short_run(quantised, conversations, tmp_path / "out", **{option: value})
    assert not (tmp_path / "out").exists()


def test_scales_in_the_other_form(run_script: Run, quantised: Path, tmp_path: Path) -> None:
    words = ("--model_path", quantised, "--export_path", tmp_path / "export")
    done = run_script(SCRIPTS / "export_hf_checkpoint.py", *words)
    assert done.code == 2 and "compressed-tensors (quant_format from Python and in examples/hf)" in done.err
    assert not (tmp_path / "export").exists()
    done = run_script(SCRIPTS / "export_hf_checkpoint.py", *words, "--quant_format", "compressed-tensors")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--num_gpu", 0), "--num_gpu 0: give a whole number of at least 1"),
        (("--num_gpu", "two"), "--num_gpu two: give a whole number"),
        (("--num_epochs", -1), "--num_epochs -1: nothing would be learned"),
        (("--num_epochs", "0.0"), "--num_epochs 0.0: nothing would be learned"),
        (("--use_fsdp", "yes"), "--use_fsdp yes: give True or False"),
        (("--use_fsdp", "true"), "--use_fsdp True and --cp_size above 1 need GPUs"),
        (("--num_gpu", 3, "--cp_size", 2), "--cp_size 2 does not divide --num_gpu 3"),
    ],
)
def test_what_is_not_launched(option: tuple[object, ...], message: str) -> None:
    done = start(["bash", SCRIPTS / "launch_train.sh", "--model", "m", "--output_dir", "o", "--data", "d", *option])
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}")


def test_what_the_program_refuses_the_script_refuses(base: Path, conversations: Path, tmp_path: Path) -> None:
    words = ("--model", base, "--output_dir", tmp_path / "out", "--data", conversations, "--eval_strategy", "epoch")
    done = start(["bash", SCRIPTS / "launch_train.sh", *words])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: --eval_strategy and --eval_data_path need each other")
    assert not (tmp_path / "out").exists()


def test_every_file_is_learned_from(tmp_path: Path) -> None:
    """What the one-line script starts, by an interpreter that only notes its arguments."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(f'#!/bin/bash\n[[ "$1" == -c ]] && exec {sys.executable} "$@"\necho "$@" >> {calls}\n')
    python.chmod(0o755)
    (tmp_path / "base").mkdir()

    def begin(*words: object) -> subprocess.CompletedProcess[str]:
        command = ["bash", SCRIPTS / "train_eagle3_and_export.sh", "--base_model", tmp_path / "base", *words]
        environment = {**subprocess_environment(), "PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    assert begin("--data", "a", "--data=b", "--output_dir", tmp_path / "out").returncode == 0
    trained, validated, exported = calls.read_text().splitlines()
    assert " --data_path a b --mode eagle3 " in trained and trained.startswith(f"{SCRIPTS}/main.py ")
    assert validated.startswith(f"{SCRIPTS}/ar_validate.py --model_path {tmp_path}/out/model")
    assert exported.startswith(f"{SCRIPTS}/export_hf_checkpoint.py --model_path {tmp_path}/out/model")
    # Nothing is trained that could not be validated behind it.
    (tmp_path / "base" / "config.json").write_text('{"mcore_spec_quantization": {}}')
    done = begin("--data", "a", "--output_dir", tmp_path / "other")
    assert done.returncode == 2 and "is quantised, and is not validated here" in done.stderr
    assert not (tmp_path / "other").exists() and len(calls.read_text().splitlines()) == 3


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

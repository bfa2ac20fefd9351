"""speculators' scripts by their names and flags: data, vocabulary, draft, and what an interrupted run goes on from."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mcore_spec.cli.main import run_script
from mcore_spec.data.foreign_states.form import LeftOpen
from mcore_spec.data.foreign_states.speculators_v1 import SPECULATORS_V1
from tests.e2e.conftest import CONVERSATIONS, Done, check_refused

SCRIPTS = Path(__file__).parents[2] / "examples" / "speculators"
NUM_LAYERS = 8
Script = Callable[..., Done]


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Script:
    """`script("train", "--flag", value, ...)` runs examples/speculators/train.py."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def call(name: str, *words: object) -> Done:
        command = runpy.run_path(str(SCRIPTS / f"{name}.py"))["COMMAND"]
        capsys.readouterr()
        code = run_script(command, [str(word) for word in words], prog=f"{name}.py")
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("conversations") / "chats.json"
    path.write_text(
        json.dumps(
            [
                {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
                for question, answer in CONVERSATIONS
            ]
        )
    )
    return path


def generation(base: Path, conversations: Path, output: Path) -> list[object]:
    given = ["--target-model-path", base, "--train-data-path", conversations]
    return [*given, "--output-dir", output, "--seq-length", 64]


def test_data_are_the_bases_hidden_states_by_boundary(
    script: Script, tmp_path: Path, base: Path, conversations: Path
) -> None:
    words = generation(base, conversations, tmp_path / "data")
    done = script("data_generation_offline", *words, "--max-samples", 4, "--batch-size", 3)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "data" / "data_config.json").read_text())
    assert config["hidden_states"]["layer_ids"] == [2, 4, 5, NUM_LAYERS]
    assert config["data"]["num_samples"] == 4

    model = AutoModelForCausalLM.from_pretrained(base)
    counts: dict[int, int] = {}
    lengths = json.loads((tmp_path / "data" / "sample_lengths.json").read_text())
    final_norm_input: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _norm, inputs: final_norm_input.append(inputs[0][0]))
    for index in range(4):
        file = torch.load(tmp_path / "data" / f"data_{index}.pt", weights_only=True)
        ids, mask = file["input_ids"], file["loss_mask"].bool()
        assert lengths[str(index)] == len(ids)
        final_norm_input.clear()
        with torch.no_grad():
            # Entry i is what enters layer i; the last entry is normed, so the norm's input is taken instead.
            entries = model(ids[None], output_hidden_states=True).hidden_states
        expected = [entries[boundary][0] for boundary in (2, 4, 5)] + final_norm_input
        for found, wanted in zip(file["hidden_states"], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        for token in ids[mask].tolist():
            counts[token] = counts.get(token, 0) + 1
    handle.remove()
    assert torch.load(tmp_path / "data" / "token_freq.pt", weights_only=True) == counts
    check_refused(script("data_generation_offline", *words), "finished set")


def test_layers_and_order_can_be_chosen(script: Script, tmp_path: Path, base: Path, conversations: Path) -> None:
    files = []
    for seed in (0, 0, 1):
        output = tmp_path / f"data{len(files)}"
        words = ("--layer-ids", 1, 3, 8, "--seed", seed, "--max-samples", 5)
        done = script("data_generation_offline", *generation(base, conversations, output), *words)
        assert done.code == 0, done.err
        reader = SPECULATORS_V1.open(output, LeftOpen())
        assert reader.facts.aux_layer_ids == (0, 2)
        assert not reader.facts.last_is_normed
        files.append([reader.states(index).token_ids.tolist() for index in range(5)])
    assert files[0] == files[1] != files[2]


def test_the_vocabulary_is_that_of_the_counts(script: Script, tmp_path: Path, base: Path) -> None:
    torch.save({5: 3, 900: 10, 7: 3, 2: 1}, tmp_path / "token_freq.pt")
    words = ("--token-freq-path", tmp_path / "token_freq.pt", "--output-path", tmp_path / "vocab")
    done = script("build_vocab_mapping", *words, "--draft-vocab-size", 6, "--target-vocab-size", 1000)
    assert done.code == 0, done.err
    d2t, t2d = (np.load(tmp_path / "vocab" / name) for name in ("d2t.npy", "t2d.npy"))
    # The counted ones, filled up from the lowest ids.
    assert (d2t + np.arange(6)).tolist() == [0, 1, 2, 5, 7, 900]
    assert np.flatnonzero(t2d).tolist() == [0, 1, 2, 5, 7, 900]
    assert (d2t.dtype, t2d.dtype, len(t2d)) == (np.int64, np.bool_, 1000)
    size = ("--draft-vocab-size", 6)
    check_refused(script("build_vocab_mapping", *words, *size), "--target-vocab-size")
    check_refused(script("build_vocab_mapping", *words, *size, "--target-vocab-size", 500), "token 900")
    torch.save([1, 2], tmp_path / "token_freq.pt")
    check_refused(script("build_vocab_mapping", *words, *size, "--target-model-path", base), "no dictionary")


def test_one_command_trains_a_draft_for_vllm(script: Script, tmp_path: Path, base: Path, conversations: Path) -> None:
    output = tmp_path / "out"
    words = ["--verifier-name-or-path", base, "--train-data-path", conversations, "--output-path", output]
    words += ["--draft-vocab-size", 300, "--seq-length", 64, "--total-seq-len", 64, "--ttt-steps", 2]
    done = script("gen_and_train", *words, "--epochs", 2, "--ttt-step-loss-decay", 0.9, "--run-name", "first")
    assert done.code == 0, done.err
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["0", "1"]
    for epoch in "01":
        config = json.loads((output / "checkpoints" / epoch / "config.json").read_text())
        assert config["architectures"] == ["Eagle3Speculator"]
        assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
        assert config["draft_vocab_size"] == 300
        weights = load_file(output / "checkpoints" / epoch / "model.safetensors")
        expected = np.load(output / "vocab_mapping" / "d2t.npy")
        assert torch.equal(weights["d2t"], torch.from_numpy(expected))
    log = (output / "logs" / "first" / "training" / "train_log.jsonl").read_text().splitlines()
    assert len(log) >= 2

    train = ["--verifier-name-or-path", base, "--data-path", output / "gen", "--save-path", output / "checkpoints"]
    train += ["--log-dir", output / "logs", "--run-name", "first", "--total-seq-len", 64, "--epochs", 2]
    train += ["--d2t-path", output / "vocab_mapping" / "d2t.npy", "--t2d-path", output / "vocab_mapping" / "t2d.npy"]
    check_refused(script("train", *train, "--ttt-steps", 3, "--ttt-step-loss-decay", 0.9), "ttt_steps = 2", "is 3")
    done = script("train", *train, "--ttt-steps", 2, "--ttt-step-loss-decay", 0.9)
    assert done.code == 0, done.err
    assert "nothing to do" in done.out


def test_what_training_cannot_use_is_refused(script: Script, tmp_path: Path, base: Path) -> None:
    words = ("--verifier-name-or-path", base, "--log-dir", tmp_path / "logs")
    check_refused(script("train", *words, "--data-path", tmp_path), "data_config.json")
    check_refused(script("train", *words, "--data-format-version", 0), "--data-format-version")
    assert not (tmp_path / "logs").exists()

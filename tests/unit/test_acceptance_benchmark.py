"""The acceptance benchmark: which conversations are learnt from and asked, how they become batches, and its table."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tools.benchmark import acceptance_data, acceptance_table, acceptance_timed
from tools.benchmark.acceptance_data import Batches
from tools.benchmark.acceptance_table import describe_target, format_table, read_results

REPOSITORY = Path(__file__).resolve().parents[2]


def conversation(number: int, answer: str = "Blue and green.") -> dict[str, Any]:
    """One, with its number in the question."""
    turns = [("user", f"Question {number}?"), ("assistant", answer), ("user", "And?"), ("assistant", "Red.")]
    return {"id": number, "conversations": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark of 4 conversations of at most 40 tokens, 2 at a time, and 3 questions."""
    for name, value in (("NUM_CONVERSATIONS", 4), ("BATCH_SIZE", 2), ("NUM_PROMPTS", 3), ("MAX_TOKENS", 40)):
        monkeypatch.setattr(acceptance_data, name, value)


def prepare(demo_base: Path, directory: Path, lines: list[dict[str, Any]]) -> int:
    """Run the command."""
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return acceptance_data.main(
        ["--base", str(demo_base), "--data-path", str(data), "--work-dir", str(directory / "work")]
    )


def test_the_first_ones_are_learnt_and_the_next_ones_asked(few: None, demo_base: Path, tmp_path: Path) -> None:
    assert prepare(demo_base, tmp_path, [conversation(number) for number in range(9)]) == 0
    learnt, asked = (
        [json.loads(line) for line in (tmp_path / "work" / name).read_text().splitlines()]
        for name in ("train.jsonl", "prompts.jsonl")
    )
    assert [each["conversations"] for each in learnt] == [conversation(n)["conversations"] for n in range(4)]
    assert asked == [{"turns": [f"Question {number}?"]} for number in range(4, 7)]


def test_batches_are_the_files_tokens_cut_and_padded(few: None, demo_base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    lines = [conversation(number, answer="Blue. " * (40 if number == 1 else 1)) for number in range(7)]
    assert prepare(demo_base, tmp_path, lines) == 0
    batches = Batches(tmp_path / "work" / "train.safetensors", pad_id=7)
    assert len(batches) == 2
    tokenizer = AutoTokenizer.from_pretrained(demo_base)
    for index in range(2):
        batch = batches[index]
        assert batch.input_ids.shape == batch.loss_mask.shape == batch.attention_mask.shape == (2, 40)
        for row in range(2):
            rendered = tokenizer.apply_chat_template(lines[2 * index + row]["conversations"], tokenize=False)
            ids = tokenizer(rendered, add_special_tokens=False)["input_ids"][:40]
            assert batch.input_ids[row].tolist() == ids + [7] * (40 - len(ids))
            assert int(batch.attention_mask[row].sum()) == len(ids)
            learnt = tokenizer.decode(batch.input_ids[row][batch.loss_mask[row].bool()])
            assert learnt.startswith("Blue.")
            assert "Question" not in learnt and "assistant" not in learnt
    assert batches[0].attention_mask[1].all(), "the long one is cut"


def test_a_file_that_is_too_short_damaged_or_another_is_refused(
    few: None, demo_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(demo_base, tmp_path, [conversation(number) for number in range(6)]) == 2
    assert "has 6 conversations" in capsys.readouterr().err
    assert prepare(demo_base, tmp_path, [conversation(0), {"conversations": "none"}]) == 2
    assert "data.jsonl:2" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
    assert prepare(demo_base, tmp_path, [conversation(number) for number in range(7)]) == 0
    assert prepare(demo_base, tmp_path, [conversation(number) for number in range(8)]) == 0
    assert prepare(demo_base, tmp_path, [conversation(number) for number in range(1, 8)]) == 2
    assert "choose another --work-dir" in capsys.readouterr().err


def test_one_without_a_token_to_learn_is_kept_in_its_place(
    few: None, demo_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [conversation(number) for number in range(7)]
    lines[2]["conversations"][0]["content"] = "long " * 60
    assert prepare(demo_base, tmp_path, lines) == 0
    assert "1 of 4 conversations" in capsys.readouterr().out
    batch = Batches(tmp_path / "work" / "train.safetensors", pad_id=0)[1]
    assert [bool(row.any()) for row in batch.loss_mask] == [False, True]


def write_result(directory: Path, name: str, accepted: list[int], *, seconds: float = 100.0) -> None:
    """A contender that is done."""
    (directory / f"{name}.time.json").write_text(json.dumps({"seconds": seconds, "peak_mib": 2048.4}))
    served = {"num_forwards": 1000, "accepted_by_step": accepted, "acceptance_length": 1 + sum(accepted) / 1000}
    (directory / f"{name}.serve.json").write_text(json.dumps(served))


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_result(tmp_path, "modelopt", [171, 13, 2], seconds=1807.2)
    write_result(tmp_path, "ours", [350, 40, 10])
    write_result(tmp_path, "ours-random", [100, 0, 0])
    (tmp_path / "ours-unfinished.time.json").write_text("{}")
    assert acceptance_table.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| ours | 100 s | 2,048 MiB | 1.400 | 0.350, 0.040, 0.010 | 0.400 | 2.15 |"
    assert lines[3].startswith("| ours-random | ") and lines[3].endswith(" | 0.100 | 0.54 |")
    assert lines[4] == "| modelopt | 1,807 s | 2,048 MiB | 1.186 | 0.171, 0.013, 0.002 | 0.186 | 1.00 |"
    assert lines[6] == "ours: 2.15 times modelopt's, target 2: met"
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [each["contender"] for each in results] == ["ours", "ours-random", "modelopt"]
    assert results[2]["acceptance_length"] == pytest.approx(1.186)


def test_the_table_of_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert acceptance_table.main([str(tmp_path)]) == 2
    assert "no contender" in capsys.readouterr().err
    write_result(tmp_path, "ours", [300, 0, 0])
    results = read_results(tmp_path)
    assert describe_target(results) == ""
    assert format_table(results).endswith("| 0.300 | - |")
    write_result(tmp_path, "modelopt", [171, 0, 0])
    assert describe_target(read_results(tmp_path)).endswith("missed")
    write_result(tmp_path, "modelopt", [0, 0, 0])
    assert describe_target(read_results(tmp_path)) == ""


def test_a_command_is_measured_only_where_it_succeeds(tmp_path: Path) -> None:
    file = tmp_path / "time.json"
    assert acceptance_timed.main(["--output", str(file), "--", "false"]) == 1
    assert not file.exists()
    assert acceptance_timed.main(["--output", str(file), "--", "sleep", "0.2"]) == 0
    measured = json.loads(file.read_text())
    assert 0.2 <= measured["seconds"] < 60
    assert measured["peak_mib"] > 0


def test_batches_of_a_file_that_does_not_divide(tmp_path: Path) -> None:
    lengths = [3, 2, 4, 1, 5]
    tensors = {
        "token_ids": torch.arange(15),
        "loss_mask": torch.ones(15, dtype=torch.bool),
        "lengths": torch.tensor(lengths),
    }
    save_file(tensors, tmp_path / "t.safetensors")
    batches = Batches(tmp_path / "t.safetensors", pad_id=-1)
    assert len(batches) == 1, "the fifth is no batch"
    assert batches[0].input_ids[2, :5].tolist() == [5, 6, 7, 8, -1]


def test_a_variants_options_replace_the_benchmarks(tmp_path: Path) -> None:
    command = tmp_path / "bin" / "mcore-spec"
    command.parent.mkdir()
    command.write_text('#!/bin/bash\necho "$*" >>"$CALLS"\n')
    command.chmod(0o755)
    calls = tmp_path / "calls"
    environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "CALLS": str(calls)}
    words = ["work", "ours-x", "--draft-init random", "--lr 1e-3 --train-iters=7 --lr-scaling none"]
    script = REPOSITORY / "tools" / "benchmark" / "acceptance_ours.sh"
    subprocess.run(["bash", str(script), *words], env=environment, check=True)
    convert, finetune, export = (line.split() for line in calls.read_text().splitlines())
    assert convert[:3] == ["convert", "--draft-init", "random"]
    assert convert[convert.index("--save") + 1] == finetune[finetune.index("--load") + 1] == "work/ours-x.converted"
    assert [word for word in finetune if word.startswith("--train-iters")] == ["--train-iters=7"]
    assert [finetune[at + 1] for at, word in enumerate(finetune) if word == "--lr"] == ["1e-3"]
    assert finetune[finetune.index("--lr-warmup-iters") + 1] == "10", "another option that begins alike"
    assert {"--no-packing", "--seq-length", "--clip-grad"} <= set(finetune)
    assert export[export.index("--export-dir") + 1] == "work/ours-x.export"

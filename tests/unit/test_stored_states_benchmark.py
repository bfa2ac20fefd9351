"""The benchmark of stored dtypes: its commands are the package's own, what succeeded is not run again, its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mcore_spec.cli.arguments import ConvertArguments
from mcore_spec.cli.evaluation_arguments import ValidateArguments
from mcore_spec.cli.extract_arguments import ExtractArguments
from mcore_spec.cli.parser import parse_arguments
from mcore_spec.cli.training_arguments import FinetuneArguments
from tools.benchmark import stored_states
from tools.benchmark.commands import Finished, check_settings, run_once
from tools.benchmark.stored_states import Row, format_table, main

CLASSES: dict[str, Any] = {
    "convert": ConvertArguments,
    "extract": ExtractArguments,
    "finetune": FinetuneArguments,
    "validate": ValidateArguments,
}


def test_commands_are_the_packages_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("one\ntwo\nthree\n")
    seen: list[tuple[str, Any]] = []

    def fake(place: Path, words: list[str]) -> Finished:
        parsed = parse_arguments(CLASSES[words[0]], words[1:], prog=words[0], description="")
        seen.append((words[0], parsed))
        if words[0] == "validate":
            raise SystemExit(f"validated {place.parent.name}")
        return Finished("", 0.0)

    monkeypatch.setattr(stored_states, "run_once", fake)
    monkeypatch.setattr(stored_states, "STORES", ())
    words = ["--base", "/base", "--data-path", str(data), "--prompts-path", "/prompts.jsonl", "--num-samples", "2"]
    with pytest.raises(SystemExit, match="validated online"):
        main([*words, "--work-dir", str(tmp_path / "work"), "--train-iters", "40"])
    assert [name for name, _ in seen] == ["convert", "finetune", "validate"]
    assert (tmp_path / "work" / "conversations.jsonl").read_text() == "one\ntwo\n"
    finetune = seen[1][1]
    assert (finetune.train_iters, finetune.global_batch_size, finetune.seq_length) == (40, 4, 256)
    assert finetune.data_path == (str(tmp_path / "work" / "conversations.jsonl"),)
    with pytest.raises(SystemExit, match="other settings"):
        main([*words, "--work-dir", str(tmp_path / "work"), "--train-iters", "41"])


def test_a_command_that_succeeded_is_not_run_again(tmp_path: Path) -> None:
    first = run_once(tmp_path / "help", ["convert", "--help"])
    assert "usage" in first.output
    assert first.peak_mib > 1
    (tmp_path / "help.log").unlink()
    assert run_once(tmp_path / "help", ["convert", "--help"]) == first
    assert not (tmp_path / "help.log").exists()
    with pytest.raises(SystemExit, match="ended with 2"):
        run_once(tmp_path / "wrong", ["nothing"])
    assert not (tmp_path / "wrong.done.json").exists()
    check_settings(tmp_path, {"a": 1})
    check_settings(tmp_path, {"a": 1})
    with pytest.raises(SystemExit, match="other settings"):
        check_settings(tmp_path, {"a": 2})


def test_the_table_compares_with_bf16() -> None:
    rows = [Row("bf16", 4613.0, 10.5, 1.25, True), Row("fp8", 2325.5, 10.6, 1.2375, False)]
    assert format_table(rows).splitlines()[2:] == [
        "| bf16 | 4,613.0 | 10.5000 | 1.2500 | +0.00% | equal |",
        "| fp8 | 2,325.5 | 10.6000 | 1.2375 | -1.00% | differ |",
    ]
    assert "| online | - | 10.5000 | 1.2500 | - | equal |" in format_table([Row("online", None, 10.5, 1.25, True)])

"""The benchmark of starts: what it runs, what it keeps, and its table."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mcore_spec.cli.arguments import ConvertArguments
from mcore_spec.cli.parser import parse_arguments
from mcore_spec.cli.training_arguments import FinetuneArguments
from tools.benchmark import starts
from tools.benchmark.starts import Cell, Result, Settings, convert_command, finetune_command, format_table

SETTINGS = Settings("/base", "/data.jsonl", 100, 10, 40, "90,10,0", "", "--clip-grad 1.0")


def split_command(command: Sequence[str]) -> list[str]:
    """What the package's command reads, after checking who runs it."""
    assert list(command[:3]) == [sys.executable, "-m", "mcore_spec.cli.main"]
    return list(command[4:])


@pytest.mark.parametrize(
    ("start", "draft_init", "fit_start"), [("random", "random", 0), ("base", "base", 0), ("fit", "random", 40)]
)
def test_commands_are_the_packages_own(start: str, draft_init: str, fit_start: int) -> None:
    cell = Cell(start, 5e-5, "none", 7)
    argv = split_command(convert_command(cell, SETTINGS, Path("/elsewhere/cell")))
    convert = parse_arguments(ConvertArguments, argv, prog="convert", description="")
    assert (convert.draft_init, convert.seed, convert.save) == (draft_init, 7, "/elsewhere/cell/converted")
    argv = split_command(finetune_command(cell, SETTINGS, Path("/elsewhere/cell")))
    finetune = parse_arguments(FinetuneArguments, argv, prog="finetune", description="")
    assert (finetune.load, finetune.save) == ("/elsewhere/cell/converted", "/elsewhere/cell/run")
    assert (finetune.fit_start, finetune.seed, finetune.lr, finetune.lr_scaling) == (fit_start, 7, 5e-5, "none")
    assert (finetune.train_iters, finetune.lr_warmup_iters, finetune.split) == (100, 10, "90,10,0")
    assert (finetune.micro_batch_size, finetune.global_batch_size, finetune.seq_length) == (4, 4, 256)
    assert not finetune.packing
    assert finetune.clip_grad == 1.0, "further options are handed on"
    assert finetune.eval_interval is None, "one validation, at the end"


def test_finetune_chooses_the_batches_of_a_fit_where_none_are_given() -> None:
    settings = SETTINGS._replace(fit_batches=None)
    has_flag = {
        start: "--fit-start" in finetune_command(Cell(start, 1e-4, "none", 1), settings, Path("/elsewhere/cell"))
        for start in starts.STARTS
    }
    assert has_flag == {"random": True, "base": True, "fit": False}


def result(start: str, seed: int, loss: float, *, lr: float = 5e-4) -> Result:
    return Result(Cell(start, lr, "none", seed), loss, [0.5, loss / 10], 1 + loss / 4)


def test_the_table_has_means_and_ranges_by_start_and_rate() -> None:
    results = [
        result("fit", 1, 1.0),
        result("random", 2, 4.0),
        result("random", 1, 2.0),
        result("fit", 1, 1.5, lr=1e-5),
    ]
    assert format_table(results).splitlines() == [
        "| start | learning rate | scaling | seeds | held-out loss | accuracy by step | acceptance length |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| random | 0.0005 | none | 1, 2 | 3.000 (2.000 to 4.000) | 50.0 (50.0 to 50.0); 30.0 (20.0 to 40.0) % "
        "| 1.750 (1.500 to 2.000) |",
        "| fit | 1e-05 | none | 1 | 1.500 | 50.0; 15.0 % | 1.375 |",
        "| fit | 0.0005 | none | 1 | 1.000 | 50.0; 10.0 % | 1.250 |",
    ]


class Commands:
    """Stands for the package's commands: notes them, and writes a log with two validations."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.fails_at: str | None = None

    def __call__(self, command: Sequence[str], **_options: Any) -> None:
        name, saved = command[3], Path(command[command.index("--save") + 1])
        self.names.append(name)
        if name == self.fails_at:
            raise subprocess.CalledProcessError(2, list(command))
        saved.mkdir()
        if name == "convert":
            (saved / "latest_checkpointed_iteration.txt").write_text("1")
            return
        entries = [{"iteration": 2, "loss": 9.0}]
        for loss in (3.0, 2.5):
            figures = {"loss": loss, "accuracy": [0.25, 0.125], "simulated_acceptance_length": 1.25}
            entries.append({"iteration": 2, **{f"validation_{key}": value for key, value in figures.items()}})
        (saved / "train_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands()
    monkeypatch.setattr(subprocess, "run", made)
    return made


def argv(directory: Path, *more: str) -> list[str]:
    given = {"--base": "/base", "--data-path": "/data.jsonl", "--work-dir": str(directory), "--lr-scaling": "none"}
    return [*(word for pair in given.items() for word in pair), "--seeds", "1", *more]


def test_finished_cells_are_kept(commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"
    commands.fails_at = "finetune"
    assert starts.main(argv(work, "--starts", "random")) == 1
    assert f"finetune ended with exit code 2; see {work / 'random-0.0005-none-seed1' / 'finetune.log'}" in (
        capsys.readouterr().err
    )
    commands.fails_at = None
    assert starts.main(argv(work, "--starts", "random")) == 0
    assert commands.names == ["convert", "finetune", "finetune"], "what was converted is used"
    # Other starts join the table; the first is not trained again.
    assert starts.main(argv(work, "--starts", "random", "fit")) == 0
    assert commands.names[3:] == ["convert", "finetune"]
    table = capsys.readouterr().out
    assert "| random | 0.0005 | none | 1 | 2.500 | 25.0; 12.5 % | 1.250 |" in table, "the last validation counts"
    assert "| fit | 0.0005 | none | 1 |" in table
    assert not list(work.glob("*/converted")) and not list(work.glob("*/run"))
    assert len(list(work.glob("*/train_log.jsonl"))) == 2


def test_other_settings_want_another_directory(commands: Commands, tmp_path: Path) -> None:
    assert starts.main(argv(tmp_path, "--starts", "base")) == 0
    with pytest.raises(SystemExit, match="iterations was 100, is 50; choose another"):
        starts.main(argv(tmp_path, "--starts", "base", "--iterations", "50"))

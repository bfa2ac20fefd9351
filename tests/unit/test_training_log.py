"""Where the figures of a run go, read back from there: the loggers of other projects, and the bar on a terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pytest

from mcore_spec.cli.finetune import _Lines
from mcore_spec.training.log import ProgressBar
from tests.unit.log_cases import ENTRIES, SETTINGS, STOPPED_AT

REPOSITORY = Path(__file__).parents[2]
NUM_ITERATIONS = 5000
ENTRY: dict[str, Any] = {
    "iteration": 1234,
    "loss": 2.1234,
    "accuracy": [0.512, 0.424, 0.339],
    "simulated_acceptance_length": 2.437,
    "tokens_per_second": 12345.6,
}


def run_cases(directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.unit.log_cases", str(directory / "out")],
        cwd=REPOSITORY,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "TRACKIO"))},
            "HOME": str(directory),
            "TRACKIO_DIR": str(directory / "trackio"),
            # Whoever tries to speak to a host finds nobody there.
            "WANDB_BASE_URL": "http://127.0.0.1:9",
            "WANDB_ERROR_REPORTING": "false",
            **environment,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_wandb_and_trackio_hold_what_was_logged(tmp_path: Path) -> None:
    """Bit for bit, in one run although it was interrupted, and nobody else was spoken to."""
    process = run_cases(tmp_path, WANDB_MODE="offline")
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    lines = [json.loads(line) for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()]
    assert lines == ENTRIES
    expected: dict[str, dict[str, float]] = {}
    for line in lines:
        figures = expected.setdefault(str(line.pop("iteration")), {})
        for name, value in line.items():
            by_step = {f"{name}/step_{k}": each for k, each in enumerate(value)} if isinstance(value, list) else None
            figures |= {key: each for key, each in (by_step or {name: value}).items() if each is not None}

    name = f"out-{found['run_id']}"
    assert found["trackio"] == [[name, SETTINGS, expected]]
    first = {step: figures for step, figures in expected.items() if int(step) <= STOPPED_AT}
    second = {step: figures for step, figures in expected.items() if int(step) > STOPPED_AT}
    # What is not sent yet is kept by the part; with one id it becomes one run.
    assert found["wandb"] == [[found["run_id"], "out", SETTINGS, figures] for figures in (first, second)]
    assert found["addresses"] == []


def test_wandb_without_a_login_is_refused(tmp_path: Path) -> None:
    process = run_cases(tmp_path)
    assert process.returncode != 0
    error = process.stderr.splitlines()[-1]
    assert error.startswith("mcore_spec.errors.ConfigError: --logger wandb: No API key configured"), process.stderr
    assert error.endswith(f"WANDB_MODE=offline keeps the run in {tmp_path / 'out'})")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()], "nothing is half begun"


class Terminal(NamedTuple):
    """A terminal that only the test looks at; written to through `stream`."""

    reader: int
    stream: TextIO
    columns: int

    def frames(self) -> list[str]:
        """What was drawn, a line each time; of a line that was drawn over, each state."""
        os.set_blocking(self.reader, False)
        drawn = b""
        while True:
            try:
                drawn += os.read(self.reader, 2**16)
            except BlockingIOError:
                return [frame for frame in re.split(r"[\r\n]+", drawn.decode()) if frame.strip()]


@pytest.fixture(params=[80])
def terminal(request: pytest.FixtureRequest) -> Iterator[Terminal]:
    """One of so many columns."""
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, request.param, 0, 0))
    with open(writer, "w") as stream:
        yield Terminal(reader, stream, request.param)
    os.close(reader)


def train(stderr: TextIO, *, is_shown: bool, entry: dict[str, Any] = ENTRY, note: str | None = None) -> None:
    """A thousand iterations, of which each tenth is logged."""
    with redirect_stderr(stderr):
        bar = ProgressBar(num_iterations=NUM_ITERATIONS, iteration=ENTRY["iteration"] - 1000, is_shown=is_shown)
        for number in range(1000):
            bar.advance()
            if number % 10 == 9:
                bar.show(entry)
        if note is not None:
            bar.note(note)
        bar.close()


def test_the_bar_shows_loss_accuracy_acceptance_speed_and_time_left(terminal: Terminal) -> None:
    train(terminal.stream, is_shown=True)
    *_, last = terminal.frames()
    assert len(last) <= terminal.columns
    shown = re.fullmatch(r"1234/5000 \|.+\| (\S+) left, (.*)", last.strip())
    assert shown is not None, last
    assert re.fullmatch(r"(\d+:)?\d\d:\d\d", shown[1]), "a time is left, not a question mark"
    assert shown[2] == "loss 2.123, acc 51 42 34 %, AL 2.44, 12,346 tok/s"


@pytest.mark.parametrize("terminal", [100], indirect=True)
def test_seven_steps_fit_into_a_hundred_columns(terminal: Terminal) -> None:
    accuracy = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    train(terminal.stream, is_shown=True, entry={**ENTRY, "accuracy": accuracy, "tokens_per_second": 123456.0})
    *_, last = terminal.frames()
    assert len(last.strip()) <= terminal.columns
    assert last.strip().endswith("loss 2.123, acc 100 90 80 70 60 50 40 %, AL 2.44, 123,456 tok/s")


def test_what_is_said_stands_above_the_bar(terminal: Terminal) -> None:
    train(terminal.stream, is_shown=True, note="iteration 7: skipped", entry={**ENTRY, "loss": None})
    frames = terminal.frames()
    assert frames.count("iteration 7: skipped") == 1
    last = frames[-1]
    assert last.strip().endswith("left, no step counted")


def test_other_ranks_show_nothing(terminal: Terminal) -> None:
    train(terminal.stream, is_shown=False, note="iteration 7: skipped")
    assert terminal.frames() == []


def test_a_pipe_gets_no_bar() -> None:
    stream = io.StringIO()
    train(stream, is_shown=True, note="iteration 7: skipped")
    assert stream.getvalue() == "iteration 7: skipped\n"


def write_lines(stderr: TextIO) -> None:
    """An entry of training and one of validation."""
    figures = ("loss", "accuracy", "simulated_acceptance_length")
    lines = _Lines()
    with redirect_stderr(stderr):
        lines.write(ENTRY)
        lines.write({"iteration": 1234, **{f"validation_{name}": ENTRY[name] for name in figures}})
    lines.close()


def test_lines_take_the_place_of_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """One for each entry of the log, which is all that a pipe gets."""
    write_lines(io.StringIO())
    training, validation = capsys.readouterr().out.splitlines()
    assert training.startswith("iteration 1234: loss 2.1234, accuracy 0.512 0.424 0.339, acceptance length 2.437, ")
    assert validation.startswith("iteration 1234: validation loss 2.1234, accuracy 0.512 0.424 0.339, ")


def test_a_terminal_shows_validation_above_the_bar(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(terminal.stream)
    (line,) = terminal.frames()
    assert line.startswith("iteration 1234: validation loss 2.1234, accuracy 0.512 0.424 0.339, ")
    assert capsys.readouterr().out == ""

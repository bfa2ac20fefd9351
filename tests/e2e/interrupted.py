"""Training that is stopped at some moment, and what it must be equal to when it went on."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mcore_spec.checkpoint.store import find_checkpoint
from tests.e2e.conftest import Run
from tests.forked import start_command

TIMEOUT_S = 300

# The command line of a run that saves in a directory, but for its length.
Words = Callable[[Path], list[object]]


class Length(NamedTuple):
    """Of a run.

    Attributes:
        iterations: in all.
        save_interval: between two checkpoints.
    """

    iterations: int
    save_interval: int

    @property
    def words(self) -> list[object]:
        """On the command line."""
        return ["--train-iters", self.iterations, "--save-interval", self.save_interval]

    def random_moment(self) -> int:
        """Entries of the log: behind the first checkpoint, before the last."""
        moment = random.randint(self.save_interval + 1, self.iterations - self.save_interval)
        print(f"killed behind {moment} entries of the log")
        return moment


def log_of(save: Path) -> list[dict[str, Any]]:
    """Entries without what depends on the clock."""
    entries = [json.loads(line) for line in (save / "train_log.jsonl").read_text().splitlines()]
    dropped = ("tokens_per_second", "data_wait")
    return [{key: value for key, value in entry.items() if key not in dropped} for entry in entries]


def train_whole(words: Words, length: Length, save: Path) -> Path:
    """A run from its beginning to its end; returns where it saved."""
    said = save.with_suffix(".txt")
    process = start_command("finetune", [*words(save), *length.words], said)
    process.join(TIMEOUT_S)
    assert process.exitcode == 0, said.read_text()
    return save


def check_interrupted(
    run: Run, how: signal.Signals, words: Words, length: Length, *, whole: Path, parts: Path, num_entries: int
) -> None:
    """A run that is sent a signal behind so many entries of its log goes on to what `whole` is, bit for bit."""
    log, said = parts / "train_log.jsonl", parts.with_suffix(".txt")
    process = start_command("finetune", [*words(parts), *length.words], said)
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= num_entries):
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, how)
    process.join(TIMEOUT_S)
    assert process.exitcode == (-signal.SIGKILL if how is signal.SIGKILL else 0), said.read_text()
    stopped = find_checkpoint(parts).iteration
    assert length.save_interval <= stopped < length.iterations
    if how is signal.SIGKILL:
        assert stopped % length.save_interval == 0
    train_whole(words, length, parts)
    assert "resumed" in said.read_text()
    assert log_of(parts) == log_of(whole)
    exports = [save.parent / f"export_{save.name}" for save in (whole, parts)]
    for save, export in zip((whole, parts), exports, strict=True):
        if not export.exists():
            assert run("export", "--load", save, "--export-dir", export, "--export-extra-modules").code == 0
    one, two = ((export / "model.safetensors").read_bytes() for export in exports)
    assert one == two

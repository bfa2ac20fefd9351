"""Kill a saving process by its id at random moments, and see what the directory still gives.

    python -m tests.parallel.kill_during_save DIRECTORY TRIES

Imports cost seconds and a try costs tenths, so this process imports everything and each try is forked from
it, before any thread has run. Prints one JSON object a try. In every iteration each weight has the value of
the iteration's number: a mixture of two would show.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mcore_spec.bases.megatron_build import build_gpt_model
from mcore_spec.checkpoint.store import TRACKER, find_checkpoint, load_checkpoint, make_record, save_checkpoint
from mcore_spec.config import BaseIdentity
from mcore_spec.conversion import convert
from mcore_spec.parallel.layout import Layout, parallel_runtime
from tests.tiny import base_architecture

# Longer than a few saves of this model, so that a kill may fall anywhere in one.
LONGEST_WAIT_S = 0.5
IDENTITY = BaseIdentity(source="killed", fingerprint="killed")


def set_values(model: torch.nn.Module, value: int) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def keep_saving(directory: Path, started: int) -> None:
    """Save iterations 1, 2, ... until killed; say when the first is there."""
    with parallel_runtime(Layout()):
        model = build_gpt_model(base_architecture(dtype="float32", num_layers=2), Layout())
        convert(model, "medusa")
        iteration = 0
        while True:
            iteration += 1
            set_values(model, iteration)
            save_checkpoint(model, directory, make_record(model, IDENTITY))
            if iteration == 1:
                os.write(started, b"1")


def check(directory: Path, answer: int, result: dict[str, Any]) -> None:
    """Load the newest iteration, compare its values, save the next one."""
    try:
        with parallel_runtime(Layout()):
            checkpoint = find_checkpoint(directory)
            model = load_checkpoint(checkpoint, Layout())
            result["loaded"] = checkpoint.iteration
            # The padding of a vocabulary is zero by definition; there is none on one rank.
            wrong = [n for n, p in model.named_parameters() if not bool((p == checkpoint.iteration).all())]
            result["error"] = f"iteration {checkpoint.iteration}: other values in {wrong}" if wrong else ""
            set_values(model, checkpoint.iteration + 1)
            save_checkpoint(model, directory, make_record(model, IDENTITY))
            result["next"] = find_checkpoint(directory).iteration
            leftovers = [path.name for path in directory.glob(".*")]
            if leftovers:
                result["error"] = f"left behind: {leftovers}"
    except BaseException as error:  # noqa: BLE001  # whatever it was, the test tells
        result["error"] = repr(error)
    os.write(answer, json.dumps(result).encode())


def forked(function: Any, *arguments: Any) -> tuple[int, int]:
    """Run a function in a child; its process id, and the end of a pipe whose other end it was given."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            function(*arguments[:1], writing, *arguments[1:])
        finally:
            os._exit(1)
    os.close(writing)
    return pid, reading


def one_try(directory: Path) -> dict[str, Any]:
    saver, started = forked(keep_saving, directory)
    assert os.read(started, 1) == b"1", "the first save failed"
    delay = random.uniform(0, LONGEST_WAIT_S)
    time.sleep(delay)
    announced = int((directory / TRACKER).read_text())
    os.kill(saver, signal.SIGKILL)
    os.waitpid(saver, 0)
    os.close(started)
    result = {
        "delay": delay,
        "announced_before_the_kill": announced,
        "partial": sorted(path.name for path in directory.glob(".*")),
    }
    checker, answer = forked(check, directory, result)
    with os.fdopen(answer) as pipe:
        text = pipe.read()
    os.waitpid(checker, 0)
    return json.loads(text)


def main() -> None:
    torch.set_num_threads(1)
    root, tries = Path(sys.argv[1]), int(sys.argv[2])
    for index in range(tries):
        print(json.dumps(one_try(root / str(index))), flush=True)


if __name__ == "__main__":
    main()

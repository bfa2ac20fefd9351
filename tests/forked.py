"""Processes of their own without the seconds that imports take: forked from one server that has done them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from mcore_spec.cli.main import run_command

# What commands and ranks run imports these or what these import. The server starts with the first process.
_IMPORTED = [
    "transformers.models.llama.modeling_llama",
    *(f"mcore_spec.cli.{name}" for name in ("convert", "export", "finetune", "validate", "extract")),
]


def process_context() -> BaseContext:
    """Where processes come from; it has `Process` and `Pipe`.

    Not forked from this one, whose threads and locks a child would have in whatever state they are. Where there is a
    GPU every process starts from nothing: a fork of one that has looked at the device cannot use it.
    """
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


def start_command(command: str, words: Sequence[object], said: Path) -> BaseProcess:
    """Start a command of the program on one thread; it says into `said`, and ends with the command's exit code."""
    process = process_context().Process(target=_run, args=(command, [str(word) for word in words], str(said)))
    process.start()
    return process


def _run(command: str, words: list[str], said: str) -> None:
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    raise SystemExit(run_command(command, words))

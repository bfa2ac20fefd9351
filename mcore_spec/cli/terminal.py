"""The only place of the package that writes to the terminal.

Under `torchrun` every rank runs the same command. What is news once is said once; an error is told by
every rank that meets it, because nobody can know whether the others met the same one.
"""

from __future__ import annotations

import os
import sys


def say(line: str) -> None:
    """Write one line to stdout, on rank 0 only."""
    if _rank() == "0":
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def say_part(text: str) -> None:
    """Write a part of a line to stdout, on rank 0 only."""
    if _rank() == "0":
        sys.stdout.write(text)
        sys.stdout.flush()


def has_colour() -> bool:
    """Whether stdout shows colours: a terminal, unless NO_COLOR is set (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def say_error(message: str) -> None:
    """Write ``error: message`` to stderr, behind ``[rank N]`` on every rank but the first."""
    prefix = "" if _rank() == "0" else f"[rank {_rank()}] "
    # One write: lines of several ranks must not mix.
    sys.stderr.write(f"{prefix}error: {message}\n")
    sys.stderr.flush()


def _rank() -> str:
    """The rank that torchrun gave to this process; a process group need not exist yet."""
    return os.environ.get("RANK", "0")

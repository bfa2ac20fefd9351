"""What the ranks do in the tests of commands on several ranks."""

from __future__ import annotations

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from mcore_spec.cli.main import run_command


def exit_code(*, command: str, words: list[str]) -> int:
    """Run a command on this rank."""
    return run_command(command, words)


def outcome(*, command: str, words: list[str]) -> tuple[int, str]:
    """Run a command on this rank: its code and what it said."""
    said = StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        code = run_command(command, words)
    return code, said.getvalue()

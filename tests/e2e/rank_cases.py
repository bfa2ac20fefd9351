"""What the ranks do in the tests of commands on several ranks."""

from __future__ import annotations

from mcore_spec.cli.main import run_command


def exit_code(*, command: str, words: list[str]) -> int:
    """Run a command on this rank."""
    return run_command(command, words)

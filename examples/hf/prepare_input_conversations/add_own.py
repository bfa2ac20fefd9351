"""Add the prompts of your own file or dataset to a file of prompts.

Each entry has turns, conversations or messages; a .txt file has a prompt a line.

    python examples/hf/prepare_input_conversations/add_own.py --input FILE --output prompts.jsonl

The same as `mcore-spec prepare-prompts --format own`; `--help` lists every option.
"""

from __future__ import annotations

import sys

from mcore_spec.cli.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("prepare-prompts", ["--format", "own", *sys.argv[1:]]))

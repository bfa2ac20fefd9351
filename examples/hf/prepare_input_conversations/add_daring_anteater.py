"""Add the prompts of Daring-Anteater to a file of prompts.

They come from the dataset nvidia/Daring-Anteater, or from a file of it.

    python examples/hf/prepare_input_conversations/add_daring_anteater.py [--input FILE] --output prompts.jsonl

The same as `mcore-spec prepare-prompts --format daring-anteater`; `--help` lists every option.
"""

from __future__ import annotations

import sys

from mcore_spec.cli.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("prepare-prompts", ["--format", "daring-anteater", *sys.argv[1:]]))

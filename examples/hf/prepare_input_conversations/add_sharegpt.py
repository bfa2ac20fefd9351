"""Add the prompts of ShareGPT to a file of prompts.

They come from a file such as ShareGPT_V3_unfiltered_cleaned_split.json.

    python examples/hf/prepare_input_conversations/add_sharegpt.py --input FILE --output prompts.jsonl

The same as `mcore-spec prepare-prompts --format sharegpt`; `--help` lists every option.
"""

from __future__ import annotations

import sys

from mcore_spec.cli.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("prepare-prompts", ["--format", "sharegpt", *sys.argv[1:]]))

"""Add the prompts of UltraChat to a file of prompts.

They come from the dataset HuggingFaceH4/ultrachat_200k (its split train_sft), or from a file of the original UltraChat.

    python examples/hf/prepare_input_conversations/add_ultrachat.py [--input FILE] --output prompts.jsonl

The same as `mcore-spec prepare-prompts --format ultrachat`; `--help` lists every option.
"""

from __future__ import annotations

import sys

from mcore_spec.cli.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("prepare-prompts", ["--format", "ultrachat", *sys.argv[1:]]))

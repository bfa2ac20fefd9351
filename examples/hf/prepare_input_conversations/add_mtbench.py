"""Add the prompts of MT-Bench to a file of prompts.

They come from the dataset HuggingFaceH4/mt_bench_prompts, or from FastChat's question.jsonl.

    python examples/hf/prepare_input_conversations/add_mtbench.py [--input FILE] --output prompts.jsonl

The same as `mcore-spec prepare-prompts --format mtbench`; `--help` lists every option.
"""

from __future__ import annotations

import sys

from mcore_spec.cli.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("prepare-prompts", ["--format", "mtbench", *sys.argv[1:]]))

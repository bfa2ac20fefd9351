"""Measure the draft of a model that main.py saved: acceptance, speed, and whether the base's answers stay the same.

    python examples/hf/ar_validate.py --model_path OUT [--prompts-path prompts.jsonl] [--steps 3] [--osl 128]

`mcore-spec validate --base OUT --draft OUT`: one decoder for models of either library; its `--help` lists every option.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mcore_spec.cli.main import run_command

PROMPTS = Path(__file__).resolve().parents[1] / "data" / "prompts_held_out.jsonl"


def main() -> int:
    """Translate the flags; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="directory of the model with its draft")
    parser.add_argument("--prompts-path", default=str(PROMPTS), help="prompts (%(default)s)")
    given, rest = parser.parse_known_args()
    directories = ["--base", given.model_path, "--draft", given.model_path]
    return run_command("validate", [*directories, "--prompts-path", given.prompts_path, *rest])


if __name__ == "__main__":
    raise SystemExit(main())

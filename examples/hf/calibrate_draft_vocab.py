"""Count the tokens that a base is to produce and keep the most frequent ones as a draft vocabulary (d2t.pt).

    python examples/hf/calibrate_draft_vocab.py --model BASE --data conversations.jsonl --draft_vocab_size 32000 \\
        --save_dir vocab

The same as `mcore-spec draft-vocab`, whose `--help` lists every option.
"""

from __future__ import annotations

import argparse

from mcore_spec.cli.main import run_command


def main() -> int:
    """Translate the flags; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id of the base model")
    parser.add_argument("--data", required=True, nargs="+", help="conversations")
    parser.add_argument("--draft_vocab_size", required=True, help="entries of the draft vocabulary")
    parser.add_argument("--save_dir", required=True, help="directory for d2t.pt")
    given, rest = parser.parse_known_args()
    words = ["--pretrained-model-path", given.model, "--draft-vocab-size", given.draft_vocab_size]
    for source in given.data:
        words += ["--data-path", source]
    return run_command("draft-vocab", [*words, "--output-dir", given.save_dir, *rest])


if __name__ == "__main__":
    raise SystemExit(main())

"""Bytes a token of stored hidden states: ours beside ModelOpt's and speculators' forms, on the same conversations.

    python -m tools.benchmark.states_bytes --states DIR --base BASE [--scratch DIR]

DIR is a store of ours whose last states are not normed, as `compute_hidden_states_vllm.py --no-norm-last` writes it:
ModelOpt takes them behind the norm, speculators before it. Every form is written with `mcore-spec hidden-states` in
bfloat16, ours in eight bits too, measured file by file, and removed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mcore_spec.cli.main import run_command
from mcore_spec.data.hidden_states import StatesStore


class Row(NamedTuple):
    """A line of the table: its name, and the options of ``hidden-states`` that make it."""

    name: str
    words: tuple[str, ...]


ROWS = (
    Row("mcore-spec, fp8", ("--to-form", "mcore-spec", "--storage-dtype", "fp8")),
    Row("mcore-spec, bf16", ("--to-form", "mcore-spec", "--storage-dtype", "bf16")),
    Row("ModelOpt, bf16", ("--to-form", "modelopt", "--storage-dtype", "bf16", "--norm-last")),
    Row("speculators version 1, bf16", ("--to-form", "speculators-v1", "--storage-dtype", "bf16")),
    Row("speculators hs_{i}, bf16", ("--to-form", "speculators", "--storage-dtype", "bf16")),
)


def size_of(directory: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def main(argv: Sequence[str]) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=Path, required=True, help="store of ours, last states not normed")
    parser.add_argument("--base", required=True, help="Hugging Face directory of the base")
    parser.add_argument("--scratch", type=Path, help="where the forms are written (default: the system's)")
    given = parser.parse_args(argv)
    store = StatesStore(given.states)
    num_tokens = int(store.lengths.sum())
    lines = []
    for row in ROWS:
        with tempfile.TemporaryDirectory(dir=given.scratch) as directory:
            output = Path(directory) / "states"
            words = ["--from-form", "mcore-spec", "--input-dir", str(given.states), "--output-dir", str(output)]
            code = run_command("hidden-states", [*words, "--base", given.base, *row.words])
            if code:
                return code
            lines.append(f"| {row.name} | {size_of(output):,} | {size_of(output) / num_tokens:,.1f} |")
    about = store.description
    print(
        f"{len(store):,} conversations, {num_tokens:,} tokens, {len(about.aux_layer_ids)} aux layers and the last, "
        f"hidden size {about.hidden_size}\n\n| form | bytes | bytes a token |\n|---|---|---|"
    )
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the dtype of stored hidden states does to a draft: acceptance length from bf16 and fp8 stores, and online.

    python -m tools.benchmark.stored_states --base BASE_DIR --data-path conversations.jsonl \\
        --prompts-path held_out.jsonl --work-dir runs/stored_states [--num-samples 160] [--train-iters 40]

Converts once, extracts twice from that checkpoint, and trains it three times with the same settings, conversations and
seed: from each store, and with the base beside the draft. Prints a markdown table. Started again with the same
--work-dir it goes on: what is finished is not done again, a training that was interrupted is resumed. Prompts must not
be among the conversations.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mcore_spec.data.hidden_states import StatesStore
from tools.benchmark.commands import check_settings, run_once, words_of
from tools.benchmark.markdown import markdown_table

ONLINE, REFERENCE = "online", "bf16"
STORES = (REFERENCE, "fp8")
HEAD = ("states", "bytes a token", "loss at the end", "acceptance length", "of bf16's", "greedy answers")


class Row(NamedTuple):
    """One training.

    Attributes:
        name: of the store's dtype, or `ONLINE`.
        bytes_per_token: on disk; ``None``: nothing is written.
        loss: of the last entry of the log.
        acceptance_length: that `validate` measured.
        lossless: whether greedy answers are the base's own.
    """

    name: str
    bytes_per_token: float | None
    loss: float
    acceptance_length: float
    lossless: bool


class Comparison:
    """The runs of one work directory."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.work_dir: Path = given.work_dir
        self.data = self.work_dir / "conversations.jsonl"
        self.converted = self.work_dir / "converted"

    def prepare(self) -> None:
        """The conversations that all learn from, and the draft that all begin with."""
        given = self.given
        self.work_dir.mkdir(parents=True, exist_ok=True)
        check_settings(self.work_dir, {name: value for name, value in vars(given).items() if name != "work_dir"})
        if not self.data.exists():
            with given.data_path.open() as lines:
                self.data.write_text("".join(islice(lines, given.num_samples)))
        words = ["convert", "--pretrained-model-path", str(given.base), "--params-dtype", "fp32"]
        words += ["--export-algorithm", "eagle", "--export-eagle-algorithm", "eagle3", "--seed", str(given.seed)]
        run_once(self.work_dir / "convert", [*words, "--save", str(self.converted)])

    def run(self, name: str) -> Row:
        """Extract, train, measure: whatever is not done yet."""
        place = self.work_dir / name
        place.mkdir(exist_ok=True)
        of_data = ["--data-path", str(self.data), "--seq-length", str(self.given.seq_length)]
        bytes_per_token = None
        if name != ONLINE:
            words = ["extract", "--load", str(self.converted), "--output-dir", str(place / "states")]
            run_once(place / "extract", [*words, *of_data, "--storage-dtype", name])
            of_data = ["--offline-distillation-data", str(place / "states")]
            store = StatesStore(place / "states")
            bytes_per_token = store.num_bytes / int(store.lengths.sum())
        run_once(place / "finetune", [*self._finetune(place / "trained"), *of_data])
        result = place / "validate.json"
        run_once(place / "validate", self._validate(place / "trained", result))
        measured = json.loads(result.read_text())
        entries = [json.loads(line) for line in (place / "trained" / "train_log.jsonl").read_text().splitlines()]
        loss = [entry["loss"] for entry in entries if "loss" in entry][-1]
        return Row(name, bytes_per_token, loss, measured["acceptance_length"], measured["lossless"])

    def _finetune(self, save: Path) -> list[str]:
        given = self.given
        values = {
            "load": self.converted,
            "save": save,
            "global-batch-size": given.global_batch_size,
            "train-iters": given.train_iters,
            "lr": given.lr,
            "lr-warmup-iters": max(1, given.train_iters // 20),
            "log-interval": max(1, given.train_iters // 8),
            "save-interval": max(1, given.train_iters // 2),
            "split": "100,0,0",
            "seed": given.seed,
        }
        return words_of("finetune", values)

    def _validate(self, trained: Path, output: Path) -> list[str]:
        given = self.given
        values = {
            "load": trained,
            "prompts-path": given.prompts_path,
            "num-prompts": given.num_prompts,
            "osl": given.osl,
            "output": output,
        }
        return words_of("validate", values)


def format_table(rows: Sequence[Row]) -> str:
    """Markdown; differences are of the acceptance length, to the row of bf16 where there is one."""
    reference = {row.name: row.acceptance_length for row in rows}.get(REFERENCE)
    lines = []
    for row in rows:
        change = "-" if reference is None else f"{row.acceptance_length / reference - 1:+.2%}"
        lines.append(
            (
                row.name,
                "-" if row.bytes_per_token is None else f"{row.bytes_per_token:,.1f}",
                f"{row.loss:.4f}",
                f"{row.acceptance_length:.4f}",
                change,
                "equal" if row.lossless else "differ",
            )
        )
    return markdown_table(HEAD, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face directory of the base")
    parser.add_argument("--data-path", type=Path, required=True, help="conversations, one a line (.jsonl)")
    parser.add_argument("--prompts-path", type=Path, required=True, help="prompts to measure on")
    parser.add_argument("--work-dir", type=Path, required=True, help="where everything goes")
    parser.add_argument("--num-samples", type=int, default=160, help="conversations, the first so many")
    parser.add_argument("--train-iters", type=int, default=40, help="optimizer steps")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--global-batch-size", type=int, default=4, help="samples of a step")
    parser.add_argument("--lr", default="2e-4", help="learning rate")
    parser.add_argument("--num-prompts", type=int, default=32, help="prompts that are taken")
    parser.add_argument("--osl", type=int, default=48, help="most new tokens of an answer")
    parser.add_argument("--seed", type=int, default=1234, help="of weights and order")
    given = parser.parse_args(arguments)
    comparison = Comparison(given)
    comparison.prepare()
    rows: list[Row] = []
    for name in (*STORES, ONLINE):
        rows.append(comparison.run(name))
        table = format_table(rows)
        print(table, flush=True)
    (comparison.work_dir / "table.md").write_text(f"{table}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

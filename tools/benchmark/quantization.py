"""What quantisation costs and training brings back: acceptance length and perplexity by recipe.

    python -m tools.benchmark.quantization --load TRAINED --data-path conversations.jsonl --prompts-path prompts.jsonl \
        --work-dir DIR [--recipes fp8 int8_per_channel int4_per_channel] [--train-iters 100] [--lr 2e-4]

Of each recipe: the draft as it was trained, rounded (PTQ), and trained on with rounded weights and inputs (QAT), which
are more steps too. The commands are those that users have, one process each. What is finished is kept: the same command
goes on where it was stopped. Perplexity is the base's, on the conversations at the end of the file, all tokens but each
first one.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.checkpoint.store import find_checkpoint, load_checkpoint
from mcore_spec.cli.quantization_arguments import QuantizeArguments
from mcore_spec.config.quantization import RECIPES, find_recipe
from mcore_spec.data.store import build_token_store
from mcore_spec.errors import McoreSpecError
from mcore_spec.parallel.layout import Layout, parallel_runtime

HEAD = (
    "recipe",
    "base's perplexity",
    "change",
    "trained",
    "rounded (PTQ)",
    "trained on (QAT)",
    "of the loss recovered",
)
SEQ_LENGTH, BATCH_SIZE = 512, 4


class Row(NamedTuple):
    """One recipe.

    Attributes:
        recipe: name.
        perplexity: of the quantised base.
        rounded: acceptance length after rounding.
        trained_on: acceptance length after training with rounding; ``None``: it was not asked for.
    """

    recipe: str
    perplexity: float
    rounded: float
    trained_on: float | None


@torch.no_grad()
def perplexity(checkpoint_directory: Path, given: argparse.Namespace, cache: Path) -> float:
    """Of the base in a checkpoint, as it computes there."""
    with parallel_runtime(Layout()):
        checkpoint = find_checkpoint(checkpoint_directory)
        store = build_token_store(
            [given.data_path], checkpoint.choose_tokenizer(None), cache_dir=cache, seq_length=SEQ_LENGTH
        )
        base = MegatronBase(load_checkpoint(checkpoint, Layout()))
        total, count = 0.0, 0
        for index in range(max(0, len(store) - given.held_out), len(store)):
            token_ids = torch.from_numpy(store.document(index).token_ids.astype("int64"))
            features = base.features(token_ids[None])
            assert features is not None, "one stage has everything"
            logits = base.logits(features.last)[:-1, 0].float()
            total += float(F.cross_entropy(logits, token_ids[1:], reduction="sum"))
            count += len(token_ids) - 1
    return math.exp(total / count)


def command(name: str, *words: object) -> None:
    """Run a command of the package; its output is ours.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run([sys.executable, "-m", "mcore_spec.cli.main", name, *map(str, words)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def acceptance(checkpoint: Path, given: argparse.Namespace, result: Path) -> float:
    """Acceptance length by `validate`; measured once."""
    if not result.exists():
        words = ["--load", checkpoint, "--prompts-path", given.prompts_path, "--osl", given.osl, "--no-compare"]
        command("validate", *words, "--output", result)
    return float(json.loads(result.read_text())["acceptance_length"])


def measured_perplexity(checkpoint: Path, given: argparse.Namespace, result: Path) -> float:
    """Perplexity, measured once."""
    if not result.exists():
        result.write_text(json.dumps(perplexity(checkpoint, given, given.work_dir / "held_out_cache")))
    return float(json.loads(result.read_text()))


def measure(name: str, given: argparse.Namespace) -> Row:
    """One recipe: quantise, measure, train on, measure."""
    directory = given.work_dir / name
    directory.mkdir(parents=True, exist_ok=True)
    rounded, trained = directory / "rounded", directory / "trained_on"
    if not (rounded / "latest_checkpointed_iteration.txt").exists():
        words: list[object] = ["--load", given.load, "--save", rounded, "--export-quant-cfg", name]
        if find_recipe(name).is_calibrated:
            words += ["--calib-data", given.data_path, "--calib-size", given.calib_size, "--seq-length", SEQ_LENGTH]
        command("quantize", *words)
    trained_on = None
    if given.train_iters:
        command(
            "finetune",
            *("--load", rounded, "--save", trained, "--data-path", given.data_path, "--seq-length", SEQ_LENGTH),
            *("--global-batch-size", BATCH_SIZE, "--train-iters", given.train_iters, "--lr", given.lr),
            *("--split", "95,5,0", "--lr-warmup-iters", min(10, given.train_iters - 1)),
        )
        trained_on = acceptance(trained, given, directory / "trained_on.json")
    return Row(
        name,
        measured_perplexity(rounded, given, directory / "perplexity.json"),
        acceptance(rounded, given, directory / "rounded.json"),
        trained_on,
    )


def table(rows: Sequence[Row], *, perplexity_before: float, acceptance_before: float) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    lines.append(f"| none | {perplexity_before:.4f} | | {acceptance_before:.3f} | | | |")
    for row in rows:
        change = row.perplexity / perplexity_before - 1
        lost, recovered = acceptance_before - row.rounded, ""
        if row.trained_on is not None and lost > 0:
            recovered = f"{(row.trained_on - row.rounded) / lost:.0%}"
        after = "" if row.trained_on is None else f"{row.trained_on:.3f}"
        lines.append(
            f"| {row.recipe} | {row.perplexity:.4f} | {change:+.2%} | | {row.rounded:.3f} | {after} | {recovered} |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, required=True, help="checkpoint with a trained draft")
    parser.add_argument("--data-path", required=True, help="conversations: calibration, training, held-out text")
    parser.add_argument("--prompts-path", required=True, help="prompts of validate")
    parser.add_argument("--work-dir", type=Path, required=True, help="where everything goes")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--train-iters", type=int, default=100, help="steps of training on; 0: none")
    parser.add_argument("--lr", type=float, default=2e-4, help="of training on")
    parser.add_argument("--osl", type=int, default=96, help="most new tokens of an answer")
    parser.add_argument("--held-out", type=int, default=16, help="conversations of the perplexity, from the end")
    parser.add_argument(
        "--calib-size", type=int, default=QuantizeArguments.model_fields["calib_size"].default, help="conversations"
    )
    given = parser.parse_args(arguments)
    given.work_dir.mkdir(parents=True, exist_ok=True)
    try:
        before = measured_perplexity(given.load, given, given.work_dir / "perplexity.json")
        accepted = acceptance(given.load, given, given.work_dir / "trained.json")
        rows = [measure(name, given) for name in given.recipes]
    except McoreSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = table(rows, perplexity_before=before, acceptance_before=accepted)
    (given.work_dir / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

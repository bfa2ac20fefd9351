"""What quantisation costs and training brings back: acceptance length and perplexity by recipe.

    python -m tools.benchmark.quantization --load TRAINED --data-path conversations.jsonl --prompts-path prompts.jsonl \
        --held-out-path others.jsonl --work-dir DIR [--recipes fp8 int8_per_channel int4_per_channel] \
        [--calib-methods max mse] [--train-iters 100] [--lr 2e-4] [--learn-scales]

Of each recipe: the draft as it was trained, rounded (PTQ), and trained on with rounded weights and inputs (QAT).
Training on is more training too, so the draft is trained on without rounding as well, for the same steps: the control,
in the row of no recipe. What came back is (QAT - PTQ) / (trained - PTQ) and, of what more training alone would have
reached, (QAT - PTQ) / (control - PTQ). A checkpoint without a draft has a perplexity alone. Behind a length stands its
standard error over verification passes, as if each were drawn by itself.

The commands are those that users have, one process each. What is finished is kept: the same command goes on where it
was stopped. Perplexity is the base's, on the held-out conversations, all tokens but each first one.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch.nn import functional as F

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.checkpoint.store import TRACKER, find_checkpoint, load_checkpoint
from mcore_spec.cli.quantization_arguments import QuantizeArguments
from mcore_spec.config.quantization import RECIPES, CalibrationMethod, find_recipe
from mcore_spec.data.store import build_token_store
from mcore_spec.errors import McoreSpecError
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.quantization.modes import round_weights

HEAD = (
    "recipe",
    "base's perplexity",
    "change",
    "trained",
    "rounded (PTQ)",
    "trained on (QAT)",
    "recovered, of the trained",
    "recovered, of the control",
)
BATCH_SIZE, WARMUP = 4, 10


class Length(NamedTuple):
    """An acceptance length.

    Attributes:
        tokens: for each verification pass.
        error: its standard error over the passes.
    """

    tokens: float
    error: float

    @classmethod
    def of(cls, validated: Mapping[str, Any]) -> Length:
        """From the report of `validate`."""
        reached = 1.0
        # A pass that accepts k proposals gives 1 + k tokens; their square is the sum of 2 j + 1 over j = 0 .. k.
        square = 1.0
        for position, share in enumerate(validated["acceptance_by_position"], start=1):
            reached *= share or 0.0
            square += (2 * position + 1) * reached
        tokens = validated["acceptance_length"]
        return cls(tokens, math.sqrt((square - tokens**2) / validated["num_forwards"]))

    def __str__(self) -> str:
        """Such as "1.430 ± 0.012"."""
        return f"{self.tokens:.3f} ± {self.error:.3f}"


class Row(NamedTuple):
    """One recipe with one way to calibrate.

    Attributes:
        recipe: name.
        perplexity: of the quantised base.
        rounded: acceptance length after rounding; ``None``: there is no draft.
        trained_on: acceptance length after training with rounding; ``None``: it was not asked for.
    """

    recipe: str
    perplexity: float
    rounded: Length | None = None
    trained_on: Length | None = None


class Plain(NamedTuple):
    """The same without a recipe.

    Attributes:
        perplexity: of the base.
        trained: acceptance length of the draft as it was given; ``None``: there is none.
        control: acceptance length after the same further steps without rounding; ``None``: they were not asked for.
    """

    perplexity: float
    trained: Length | None = None
    control: Length | None = None


@torch.no_grad()
def perplexity(checkpoint_directory: Path, given: argparse.Namespace, cache: Path) -> float:
    """Of the base in a checkpoint, as it computes there."""
    with parallel_runtime(Layout()):
        checkpoint = find_checkpoint(checkpoint_directory)
        tokenizer = checkpoint.choose_tokenizer(None)
        store = build_token_store([given.held_out_path], tokenizer, cache_dir=cache, seq_length=given.seq_length)
        model = load_checkpoint(checkpoint, Layout())
        round_weights(model)
        base = MegatronBase(model)
        total, count = 0.0, 0
        for index in range(min(given.held_out, len(store))):
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


def acceptance(checkpoint: Path, given: argparse.Namespace, result: Path) -> Length:
    """Acceptance length by `validate`; measured once."""
    if not result.exists():
        words = ["--load", checkpoint, "--prompts-path", given.prompts_path, "--osl", given.osl, "--no-compare"]
        words += ["--batch-size", given.batch_size]
        command("validate", *words, "--output", result)
    return Length.of(json.loads(result.read_text()))


def measured_perplexity(checkpoint: Path, given: argparse.Namespace, result: Path) -> float:
    """Perplexity, measured once."""
    if not result.exists():
        result.write_text(json.dumps(perplexity(checkpoint, given, given.work_dir / "held_out_cache")))
    return float(json.loads(result.read_text()))


def trained_further(load: Path, given: argparse.Namespace, directory: Path, *options: str) -> Length | None:
    """Acceptance length of the draft in `load` after further steps; ``None``: none are asked for."""
    if not given.train_iters:
        return None
    save, result = directory / "trained_on", directory / "trained_on.json"
    if not result.exists():
        command(
            "finetune",
            *("--load", load, "--save", save, "--data-path", given.data_path, "--seq-length", given.seq_length),
            *("--global-batch-size", BATCH_SIZE, "--micro-batch-size", BATCH_SIZE, "--train-iters", given.train_iters),
            *("--lr", given.lr, "--split", "95,5,0", "--lr-warmup-iters", min(WARMUP, given.train_iters - 1)),
            *options,
        )
    return acceptance(save, given, result)


def measure_plain(given: argparse.Namespace) -> Plain:
    """Nothing is rounded."""
    measured = measured_perplexity(given.load, given, given.work_dir / "perplexity.json")
    if not has_draft(given.load):
        return Plain(measured)
    directory = given.work_dir / "control"
    directory.mkdir(exist_ok=True)
    trained = acceptance(given.load, given, given.work_dir / "trained.json")
    return Plain(measured, trained, trained_further(given.load, given, directory))


def measure(name: str, method: CalibrationMethod | None, given: argparse.Namespace) -> Row:
    """One recipe: quantise, measure, train on, measure; a way to calibrate is that of a recipe that is calibrated."""
    directory = given.work_dir / (name if method is None else f"{name}-{method}")
    directory.mkdir(parents=True, exist_ok=True)
    rounded = directory / "rounded"
    if not (rounded / TRACKER).exists():
        words: list[object] = ["--load", given.load, "--save", rounded, "--export-quant-cfg", name]
        words += [word for pattern in given.quant_include for word in ("--quant-include", pattern)]
        if method is not None:
            words += ["--calib-data", given.data_path, "--calib-size", given.calib_size, "--calib-method", method]
            words += ["--seq-length", given.seq_length]
        command("quantize", *words)
    label = name if method is None else f"{name}, {method}"
    measured = measured_perplexity(rounded, given, directory / "perplexity.json")
    if not has_draft(rounded):
        return Row(label, measured)
    accepted = acceptance(rounded, given, directory / "rounded.json")
    return Row(label, measured, accepted, trained_further(rounded, given, directory, *given.qat_options))


def has_draft(directory: Path) -> bool:
    """Whether a checkpoint has one."""
    return find_checkpoint(directory).record.conversion is not None


def table(rows: Sequence[Row], *, plain: Plain) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    first = ["none", f"{plain.perplexity:.4f}", "", _length(plain.trained), "", _length(plain.control), "", ""]
    lines.append(f"| {' | '.join(first)} |")
    for row in rows:
        change = f"{row.perplexity / plain.perplexity - 1:+.2%}"
        cells = [row.recipe, f"{row.perplexity:.4f}", change, "", _length(row.rounded), _length(row.trained_on)]
        cells += [_recovered(row, plain.trained), _recovered(row, plain.control)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _length(value: Length | None) -> str:
    return "" if value is None else str(value)


def _recovered(row: Row, without: Length | None) -> str:
    """Share of what rounding lost that came back; nothing where it lost nothing."""
    if without is None or row.rounded is None or row.trained_on is None or without.tokens <= row.rounded.tokens:
        return ""
    lost = without.tokens - row.rounded.tokens
    return f"{(row.trained_on.tokens - row.rounded.tokens) / lost:.0%}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, required=True, help="checkpoint with a trained draft, or of a base alone")
    parser.add_argument("--data-path", required=True, help="conversations of calibration and training")
    parser.add_argument("--held-out-path", required=True, help="conversations of the perplexity")
    parser.add_argument("--prompts-path", help="prompts of validate; not for a base alone")
    parser.add_argument("--work-dir", type=Path, required=True, help="where everything goes")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument(
        "--calib-methods", nargs="+", default=["max"], choices=get_args(CalibrationMethod), help="of recipes with such"
    )
    parser.add_argument("--quant-include", nargs="+", default=[], help="patterns of what is quantised; all by default")
    parser.add_argument("--train-iters", type=int, default=100, help="steps of training on; 0: none")
    parser.add_argument("--lr", type=float, default=2e-4, help="of training on")
    parser.add_argument("--osl", type=int, default=96, help="most new tokens of an answer")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts that are answered at a time")
    parser.add_argument("--held-out", type=int, default=16, help="conversations of the perplexity, from the first")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens of a conversation, everywhere")
    parser.add_argument(
        "--calib-size", type=int, default=QuantizeArguments.model_fields["calib_size"].default, help="conversations"
    )
    parser.add_argument(
        "--learn-scales", dest="qat_options", action="append_const", const="--learn-scales", default=[], help="in QAT"
    )
    given = parser.parse_args(arguments)
    try:
        if given.prompts_path is None and has_draft(given.load):
            parser.error(f"--load {given.load} has a draft: give --prompts-path")
        given.work_dir.mkdir(parents=True, exist_ok=True)
        plain = measure_plain(given)
        rows = [
            measure(name, method, given)
            for name in given.recipes
            for method in (given.calib_methods if find_recipe(name).is_calibrated else [None])
        ]
    except McoreSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = table(rows, plain=plain)
    (given.work_dir / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""How a draft should start: the same short training from each start, several seeds, figures on held-out conversations.

    python -m tools.benchmark.starts --base HF_DIR --data-path conversations.jsonl --work-dir DIR
    python -m tools.benchmark.starts --base HF_DIR --data-path conversations.jsonl --work-dir DIR \
        --starts fit --lr 5e-5 1e-4

A cell is a start, its learning rate and a seed: `convert` and `finetune` as users have them, one process each. What is
finished is kept, so the same command goes on where it was stopped, and the table at the end shows every cell of the
directory, those of earlier commands too: a start may want a rate of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from mcore_spec.config import TrainingConfig
from tools.benchmark.markdown import markdown_table

STARTS = ("random", "base", "fit")
_LR_SCALING = TrainingConfig.model_fields["lr_scaling"]
LR_SCALINGS: tuple[str, ...] = get_args(_LR_SCALING.annotation)
SETTINGS_FILE, RESULT_FILE, LOG_FILE = "settings.json", "result.json", "train_log.jsonl"
# Conversations in a step, and the tokens to which each is cut.
BATCH_SIZE, SEQ_LENGTH = 4, 256
HEAD = ("start", "learning rate", "scaling", "seeds", "held-out loss", "accuracy by step", "acceptance length")
LEGEND = """Mean over the seeds, in brackets the lowest and the highest. A seed draws the weights of a random start, the
order of the conversations and which of them are held out: compare starts over the same seeds. Loss, top-1 accuracy
of each TTT step and simulated acceptance length are those of the last validation."""


class Cell(NamedTuple):
    """One training.

    Attributes:
        start: of `STARTS`.
        lr: highest learning rate.
        lr_scaling: of `LR_SCALINGS`.
        seed: of weights, order and split.
    """

    start: str
    lr: float
    lr_scaling: str
    seed: int

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.start}-{self.lr:g}-{self.lr_scaling}-seed{self.seed}"


class Settings(NamedTuple):
    """What is the same in all cells of a work directory.

    Attributes:
        base: Hugging Face directory.
        data_path: conversations.
        iterations: optimizer steps.
        warmup: of them with a rising rate.
        fit_batches: that `fit` solves its weights from; ``None``: as many as `finetune` takes by itself.
        split: weights of training, validation and test conversations.
        eagle_config: file with the draft's configuration, or empty.
        finetune_flags: further options, as one would type them.
    """

    base: str
    data_path: str
    iterations: int
    warmup: int
    fit_batches: int | None
    split: str
    eagle_config: str
    finetune_flags: str


class Result(NamedTuple):
    """A finished cell: figures on the held-out conversations."""

    cell: Cell
    loss: float
    accuracy: list[float]
    acceptance_length: float

    @classmethod
    def read(cls, path: Path) -> Result:
        """From the file that `write` made."""
        values: dict[str, Any] = json.loads(path.read_text())
        return cls(**{**values, "cell": Cell(**values["cell"])})

    def write(self, path: Path) -> None:
        """As a whole, or not at all."""
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(self._asdict() | {"cell": self.cell._asdict()}) + "\n")
        temporary.replace(path)


def convert_command(cell: Cell, settings: Settings, directory: Path) -> list[str]:
    """The start, as a checkpoint in DIR/converted. `fit` replaces what is drawn here."""
    config = ["--eagle-config", settings.eagle_config] if settings.eagle_config else []
    return [
        *_package_command("convert"),
        *("--pretrained-model-path", settings.base, "--params-dtype", "fp32", "--seed", str(cell.seed)),
        *("--export-algorithm", "eagle", "--export-eagle-algorithm", "eagle3", *config),
        *("--draft-init", "base" if cell.start == "base" else "random", "--save", str(directory / "converted")),
    ]


def finetune_command(cell: Cell, settings: Settings, directory: Path) -> list[str]:
    """The training, in DIR/run; one validation, at the end, on all that is held out."""
    num_batches = settings.fit_batches if cell.start == "fit" else 0
    fit = [] if num_batches is None else ["--fit-start", str(num_batches)]
    return [
        *_package_command("finetune"),
        *("--load", str(directory / "converted"), "--save", str(directory / "run")),
        *("--data-path", settings.data_path, "--data-cache-path", str(directory.parent / "data_cache")),
        *("--split", settings.split, "--seq-length", str(SEQ_LENGTH), "--no-packing"),
        *("--micro-batch-size", str(BATCH_SIZE), "--global-batch-size", str(BATCH_SIZE)),
        *("--train-iters", str(settings.iterations), "--eval-iters", str(10**6), "--seed", str(cell.seed)),
        *("--lr", f"{cell.lr:g}", "--lr-scaling", cell.lr_scaling, "--lr-warmup-iters", str(settings.warmup)),
        *fit,
        *settings.finetune_flags.split(),
    ]


def _package_command(name: str) -> list[str]:
    return [sys.executable, "-m", "mcore_spec.cli.main", name]


def run_cell(cell: Cell, settings: Settings, work_dir: Path) -> Result:
    """Train, or read what an earlier call has trained. Checkpoints of a finished cell are deleted.

    Raises:
        subprocess.CalledProcessError: a command failed; what it said stands in DIR/convert.log or DIR/finetune.log.
    """
    directory = work_dir / cell.name
    if (directory / RESULT_FILE).exists():
        return Result.read(directory / RESULT_FILE)
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "converted" / "latest_checkpointed_iteration.txt").exists():
        shutil.rmtree(directory / "converted", ignore_errors=True)
        _run(convert_command(cell, settings, directory), directory / "convert.log")
    _run(finetune_command(cell, settings, directory), directory / "finetune.log")
    result = final_validation(cell, directory / "run" / LOG_FILE)
    shutil.copy(directory / "run" / LOG_FILE, directory)
    result.write(directory / RESULT_FILE)
    for name in ("converted", "run"):
        shutil.rmtree(directory / name)
    return result


def _run(command: Sequence[str], log: Path) -> None:
    with log.open("w") as output:
        subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=True)


def final_validation(cell: Cell, log: Path) -> Result:
    """The figures of the log's last validation."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    last = [entry for entry in entries if "validation_loss" in entry][-1]
    return Result(
        cell, last["validation_loss"], last["validation_accuracy"], last["validation_simulated_acceptance_length"]
    )


def format_table(results: Iterable[Result]) -> str:
    """Markdown: a line for each start and learning rate, in the order of `STARTS`."""
    groups: dict[tuple[int, float, str], list[Result]] = {}
    for result in results:
        key = (STARTS.index(result.cell.start), result.cell.lr, result.cell.lr_scaling)
        groups.setdefault(key, []).append(result)
    rows: list[Sequence[str]] = []
    for key in sorted(groups):
        group = sorted(groups[key], key=lambda result: result.cell.seed)
        by_step = zip(*(result.accuracy for result in group), strict=True)
        rows.append(
            (
                STARTS[key[0]],
                f"{key[1]:g}",
                key[2],
                ", ".join(str(result.cell.seed) for result in group),
                spread([result.loss for result in group], 3),
                "; ".join(spread([100 * each for each in step], 1) for step in by_step) + " %",
                spread([result.acceptance_length for result in group], 3),
            )
        )
    return markdown_table(HEAD, rows)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and where there are several values the lowest and the highest."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def keep_settings(settings: Settings, work_dir: Path) -> None:
    """Write them into a new work directory.

    Raises:
        SystemExit: the directory holds cells of others, which no table may mix.
    """
    path = work_dir / SETTINGS_FILE
    if path.exists():
        kept = json.loads(path.read_text())
        other = [f"{name} was {kept[name]!r}, is {value!r}" for name, value in settings._asdict().items()
                 if kept[name] != value]  # fmt: skip
        if other:
            raise SystemExit(f"error: {work_dir} was made with other settings: {'; '.join(other)}; choose another")
        return
    work_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings._asdict()) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure how a draft should start.")
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face directory of the base model")
    parser.add_argument("--data-path", type=Path, required=True, help="conversations, as finetune takes them")
    parser.add_argument("--work-dir", type=Path, required=True, help="cells, logs and results")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--lr", nargs="+", type=float, default=[5e-4], help="each start is trained with each of them")
    parser.add_argument("--lr-scaling", choices=LR_SCALINGS, default=_LR_SCALING.default)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument(
        "--fit-batches",
        type=int,
        help="global batches that fit solves its weights from (default: finetune's own choice)",
    )
    parser.add_argument("--split", default="90,10,0", help="training, validation, test")
    parser.add_argument("--eagle-config", default="", help="file with the draft's configuration")
    parser.add_argument("--finetune-flags", default="", help="further options of finetune, in one argument")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse(arguments)
    settings = Settings(
        base=str(options.base.resolve()),
        data_path=str(options.data_path.resolve()),
        iterations=options.iterations,
        warmup=min(options.warmup, options.iterations),
        fit_batches=options.fit_batches,
        split=options.split,
        eagle_config=options.eagle_config and str(Path(options.eagle_config).resolve()),
        finetune_flags=options.finetune_flags,
    )
    work_dir: Path = options.work_dir.resolve()
    keep_settings(settings, work_dir)
    for seed in options.seeds:
        for start in options.starts:
            for lr in options.lr:
                cell = Cell(start, lr, options.lr_scaling, seed)
                try:
                    result = run_cell(cell, settings, work_dir)
                except subprocess.CalledProcessError as error:
                    command = error.cmd[error.cmd.index("mcore_spec.cli.main") + 1]
                    log = work_dir / cell.name / f"{command}.log"
                    print(f"error: {command} ended with exit code {error.returncode}; see {log}", file=sys.stderr)
                    return 1
                print(f"{cell.name}: acceptance length {result.acceptance_length:.3f}", flush=True)
    print(format_table(Result.read(path) for path in sorted(work_dir.glob(f"*/{RESULT_FILE}"))))
    print(f"\n{LEGEND}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

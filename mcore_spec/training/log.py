"""Where the figures of a run go: a bar, ``train_log.jsonl``, TensorBoard and the like, and a picture at the end."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from mcore_spec.errors import ConfigError

LOG_NAME = "train_log.jsonl"
CURVES_NAME = "curves.png"
# Holds the name by which Weights & Biases and trackio know the run.
RUN_ID_NAME = "run_id.txt"
# What is imported for a logger, where it is not called like the logger.
_MODULES = {"tensorboard": "torch.utils.tensorboard"}
# Before the names of figures that were measured on the validation conversations.
VALIDATION = "validation_"

Entry = Mapping[str, Any]


class Logger(Protocol):
    """Takes every entry of the log."""

    def write(self, entry: Entry) -> None:
        """Take one entry; it has the key ``iteration``."""
        ...

    def close(self) -> None:
        """Flush and let go."""
        ...


class JsonLinesLogger:
    """``train_log.jsonl``: one object a line, floats in full precision."""

    def __init__(self, directory: Path, *, iteration: int) -> None:
        """Open the file, without what an interrupted run wrote behind the checkpoint it is resumed from.

        Args:
            directory: where the checkpoints go.
            iteration: of the checkpoint; entries above it are dropped.
        """
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / LOG_NAME
        kept = [line for line in _whole_lines(path) if json.loads(line)["iteration"] <= iteration]
        temporary = path.with_name(f".{LOG_NAME}")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(path)
        self._file = path.open("a")

    def write(self, entry: Entry) -> None:
        """One line, on disk when this returns."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _whole_lines(path: Path) -> list[str]:
    """Lines of the log; a last one without its end was being written when the process was killed."""
    if not path.exists():
        return []
    return path.read_text().split("\n")[:-1]


class TensorBoardLogger:
    """Scalars for TensorBoard, one a TTT step where a figure has several."""

    def __init__(self, directory: Path, *, iteration: int) -> None:
        """Open ``DIR/tensorboard``, where what stands behind `iteration` is no longer shown."""
        self._writer = _import("tensorboard").SummaryWriter(str(directory / "tensorboard"), purge_step=iteration + 1)

    def write(self, entry: Entry) -> None:
        """Write each figure under its name."""
        for name, value in scalars(entry).items():
            self._writer.add_scalar(name, value, entry["iteration"])

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class RunLogger:
    """Weights & Biases, or trackio, which has the same calls."""

    def __init__(self, name: str, directory: Path, settings: Mapping[str, Any], *, run_id: str) -> None:
        """Start a run, or go on with the one of this id.

        Args:
            name: ``wandb`` or ``trackio``.
            directory: names the run; Weights & Biases keeps its files in ``DIR/wandb``.
            settings: recorded with it.
            run_id: tells the run from others of the same name.

        Raises:
            ConfigError: Weights & Biases does not let the run begin.
        """
        self._module = _import(name)
        common = {"project": "mcore_spec", "config": dict(settings), "resume": "allow"}
        if name == "trackio":
            # It knows a run by its name alone.
            self._module.init(name=f"{directory.name}-{run_id}", **common)
            return
        try:
            self._module.init(name=directory.name, id=run_id, dir=str(directory), **common)
        except self._module.Error as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"--logger wandb: {reason} (`wandb login` logs in; WANDB_MODE=offline keeps the run in {directory})"
            ) from error

    def write(self, entry: Entry) -> None:
        """Log each figure under its name."""
        self._module.log(scalars(entry), step=entry["iteration"])

    def close(self) -> None:
        """End the run."""
        self._module.finish()


def _import(name: str) -> Any:
    """The module of a logger, which is called like the package that it needs."""
    try:
        return import_module(_MODULES.get(name, name))
    except ImportError as error:
        raise ConfigError(f"--logger {name} needs the package {name}: pip install {name} ({error})") from error


def _run_id(directory: Path, *, iteration: int) -> str:
    """The id of the run in `directory`, a new one where it begins; a run that is gone on with stays one run."""
    path = directory / RUN_ID_NAME
    return path.read_text().strip() if iteration > 0 and path.exists() else uuid.uuid4().hex[:8]


def scalars(entry: Entry) -> dict[str, float]:
    """An entry as single numbers: ``accuracy`` of three steps becomes accuracy/step_0 to accuracy/step_2."""
    flat: dict[str, float] = {}
    for name, value in entry.items():
        if isinstance(value, list):
            flat |= {f"{name}/step_{step}": each for step, each in enumerate(value) if each is not None}
        elif name != "iteration" and value is not None:
            flat[name] = value
    return flat


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers whose packages are not there, before anything is written.

    Raises:
        ConfigError: a package is not installed.
    """
    for name in names:
        _import(name)


def open_loggers(names: Sequence[str], directory: Path, *, iteration: int, settings: Mapping[str, Any]) -> list[Logger]:
    """``train_log.jsonl`` and the named ones.

    Args:
        names: of `mcore_spec.config.training.LOGGERS`.
        directory: where the checkpoints go.
        iteration: that the run goes on from; 0 where it begins.
        settings: recorded with the run.

    Raises:
        ConfigError: a logger's package is not installed, or does not let the run begin.
    """
    directory.mkdir(parents=True, exist_ok=True)
    run_names = [name for name in names if name != "tensorboard"]
    run_id = _run_id(directory, iteration=iteration)
    others: list[Logger] = [RunLogger(name, directory, settings, run_id=run_id) for name in run_names]
    if run_names:
        (directory / RUN_ID_NAME).write_text(f"{run_id}\n")
    if "tensorboard" in names:
        others.append(TensorBoardLogger(directory, iteration=iteration))
    return [JsonLinesLogger(directory, iteration=iteration), *others]


class ProgressBar:
    """One line that shows where the run is; nothing on ranks other than the first, and nothing in a pipe.

    The figures of three steps fit into 80 columns; a wider terminal has a longer bar.
    """

    def __init__(self, *, num_iterations: int, iteration: int, is_shown: bool) -> None:
        """Draw the bar at `iteration`."""
        self._is_shown = is_shown
        self._bar = tqdm(
            total=num_iterations,
            initial=iteration,
            bar_format="{n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}",
            disable=not (is_shown and sys.stderr.isatty()),
            dynamic_ncols=True,
        )

    def advance(self, number: int = 1) -> None:
        """One iteration more, or several."""
        self._bar.update(number)

    def note(self, text: str) -> None:
        """Say something that is no figure, above the bar."""
        if self._is_shown:
            say_above_bar(text)

    def show(self, entry: Entry) -> None:
        """Put the newest figures behind the bar."""
        self._bar.set_postfix_str(_briefest(entry))

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def say_above_bar(text: str) -> None:
    """Write a line to stderr without breaking a bar that is shown there."""
    tqdm.write(text, file=sys.stderr)


def brief(entry: Entry) -> str:
    """Figures of an entry, of training, of validation or of measured acceptance, in few words."""
    if "acceptance_length" in entry:
        shares = [entry["acceptance_length"], *entry["acceptance_by_position"]]
        length, *by_position = ("-" if share is None else f"{share:.3f}" for share in shares)
        return f"measured acceptance length {length}, by position {' '.join(by_position)}"
    prefix = "" if "loss" in entry else VALIDATION
    if entry[f"{prefix}loss"] is None:
        return "no step counted: none had a finite gradient and rows in the loss"
    text = f"{prefix.replace('_', ' ')}loss {entry[f'{prefix}loss']:.4f}"
    if f"{prefix}accuracy" in entry:
        accuracy = " ".join(f"{each:.3f}" for each in entry[f"{prefix}accuracy"])
        text += f", accuracy {accuracy}, acceptance length {entry[f'{prefix}simulated_acceptance_length']:.3f}"
    if prefix:
        return text
    wait = f", {entry['data_wait']:.1%} of it waiting for data" if "data_wait" in entry else ""
    return f"{text}, {entry['tokens_per_second']:,.0f} tokens/s{wait}"


def _briefest(entry: Entry) -> str:
    """Figures of an entry of training, for a line that holds more than them; accuracy in per cent."""
    if entry["loss"] is None:
        return "no step counted"
    text = f"loss {entry['loss']:.3f}"
    if "accuracy" in entry:
        accuracy = " ".join(f"{100 * each:.0f}" for each in entry["accuracy"])
        text += f", acc {accuracy} %, AL {entry['simulated_acceptance_length']:.2f}"
    return f"{text}, {entry['tokens_per_second']:,.0f} tok/s"


def draw_curves(directory: Path) -> Path | None:
    """Loss, accuracy and simulated acceptance length over iterations, from the log.

    Returns:
        The picture; ``None`` without matplotlib or without entries.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    entries = [json.loads(line) for line in _whole_lines(directory / LOG_NAME)]
    entries = [entry for entry in entries if entry.get("loss") is not None]
    if not entries:
        return None
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    axes = figure.subplots(1, 3)
    iterations = [entry["iteration"] for entry in entries]
    axes[0].plot(iterations, [entry["loss"] for entry in entries])
    if "accuracy" in entries[0]:
        for step in range(len(entries[0]["accuracy"])):
            axes[1].plot(iterations, [entry["accuracy"][step] for entry in entries], label=f"step {step}")
        axes[1].legend()
        axes[2].plot(iterations, [entry["simulated_acceptance_length"] for entry in entries])
    for axis, title in zip(axes, ("loss", "accuracy", "simulated acceptance length"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("iteration")
    path = directory / CURVES_NAME
    figure.savefig(path)
    return path

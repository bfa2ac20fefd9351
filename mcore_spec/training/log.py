"""Where the figures of a run go: a bar, ``train_log.jsonl``, TensorBoard and the like, and a picture at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from mcore_spec.errors import ConfigError

LOG_NAME = "train_log.jsonl"
CURVES_NAME = "curves.png"
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
        module = _import("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(directory / "tensorboard"), purge_step=iteration + 1)

    def write(self, entry: Entry) -> None:
        """Write each figure under its name."""
        for name, value in scalars(entry).items():
            self._writer.add_scalar(name, value, entry["iteration"])

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class RunLogger:
    """Weights & Biases, or trackio, which has the same calls."""

    def __init__(self, name: str, directory: Path, settings: Mapping[str, Any]) -> None:
        """Start a run.

        Args:
            name: ``wandb`` or ``trackio``.
            directory: names the run.
            settings: recorded with it.
        """
        self._module = _import(name, name)
        self._module.init(project="mcore_spec", name=directory.name, config=dict(settings))

    def write(self, entry: Entry) -> None:
        """Log each figure under its name."""
        self._module.log(scalars(entry), step=entry["iteration"])

    def close(self) -> None:
        """End the run."""
        self._module.finish()


def _import(name: str, package: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(f"--logger {package} needs the package {package}: pip install {package} ({error})") from error


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
        _import("torch.utils.tensorboard" if name == "tensorboard" else name, name)


def open_loggers(names: Sequence[str], directory: Path, *, iteration: int, settings: Mapping[str, Any]) -> list[Logger]:
    """``train_log.jsonl`` and the named ones.

    Raises:
        ConfigError: a logger's package is not installed.
    """
    others: list[Logger] = [
        TensorBoardLogger(directory, iteration=iteration)
        if name == "tensorboard"
        else RunLogger(name, directory, settings)
        for name in names
    ]
    return [JsonLinesLogger(directory, iteration=iteration), *others]


class ProgressBar:
    """One line that shows where the run is; nothing on ranks other than the first, and nothing in a pipe."""

    def __init__(self, *, num_iterations: int, iteration: int, is_shown: bool) -> None:
        """Draw the bar at `iteration`."""
        self._is_shown = is_shown
        self._bar = tqdm(
            total=num_iterations,
            initial=iteration,
            unit="it",
            desc="train",
            disable=not (is_shown and sys.stderr.isatty()),
            dynamic_ncols=True,
        )

    def advance(self) -> None:
        """One iteration more."""
        self._bar.update()

    def note(self, text: str) -> None:
        """Say something that is no figure, above the bar."""
        if self._is_shown:
            tqdm.write(text, file=sys.stderr)

    def show(self, entry: Entry) -> None:
        """Put the newest figures behind the bar."""
        self._bar.set_postfix_str(brief(entry))

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def brief(entry: Entry) -> str:
    """Figures of an entry, of training, of validation or of measured acceptance, in few words."""
    if "acceptance_length" in entry:
        shares = [entry["acceptance_length"], *entry["acceptance_by_position"]]
        length, *by_position = ("-" if share is None else f"{share:.3f}" for share in shares)
        return f"measured acceptance length {length}, by position {' '.join(by_position)}"
    prefix = "" if "loss" in entry else VALIDATION
    if entry[f"{prefix}loss"] is None:
        return "no step counted: none had a finite gradient and rows in the loss"
    accuracy = " ".join(f"{each:.3f}" for each in entry[f"{prefix}accuracy"])
    text = (
        f"{prefix.replace('_', ' ')}loss {entry[f'{prefix}loss']:.4f}, accuracy {accuracy}, "
        f"acceptance length {entry[f'{prefix}simulated_acceptance_length']:.3f}"
    )
    return text if prefix else f"{text}, {entry['tokens_per_second']:,.0f} tokens/s"


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

"""An evaluation as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mcore_spec.errors import ConfigError
from mcore_spec.evaluation.acceptance import Evaluation
from mcore_spec.evaluation.statistics import Acceptance

OVERALL = "all"


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Plain values; ratios without a denominator are null."""
    settings = evaluation.settings
    return {
        **_counts(evaluation.overall),
        "acceptance": "exact" if settings.is_exact else "typical",
        "proposals": "chain" if settings.topology.is_chain else "tree",
        "temperature": settings.temperature,
        "osl": settings.osl,
        "dtype": evaluation.dtype,
        "lossless": evaluation.is_lossless,
        "num_ties": sum(each.is_tie for each in evaluation.differences),
        "tokens_per_second": evaluation.tokens_per_second,
        "baseline_tokens_per_second": evaluation.baseline_tokens_per_second,
        "categories": {name: _counts(each) for name, each in evaluation.by_category.items()},
    }


def _counts(acceptance: Acceptance) -> dict[str, Any]:
    return {
        "acceptance_length": acceptance.acceptance_length,
        "acceptance_by_position": acceptance.acceptance_by_position,
        "num_forwards": acceptance.num_forwards,
        "num_tokens": acceptance.num_tokens,
        "num_answers": acceptance.num_answers,
    }


def check_output(path: Path | None, *, field: str) -> None:
    """Refuse, before anything is measured, a file that could not be written afterwards.

    Raises:
        ConfigError: a directory has the name, or the directory above cannot be made.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{field} = {path} is a directory; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{field} = {path} cannot be written ({error.strerror}); choose another file") from error


def write_json(evaluation: Evaluation, path: Path) -> None:
    """Write the file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(json.dumps(to_json(evaluation), indent=2) + "\n")
    partial.replace(path)


def table(evaluation: Evaluation) -> list[str]:
    """Lines: one a category, all of them together, speed and whether greedy answers were the base's."""
    header = ["category", "answers", "passes", "tokens", "acceptance length", "accepted by position"]
    rows = [_row(name, each) for name, each in evaluation.by_category.items()]
    if len(rows) > 1 or OVERALL not in evaluation.by_category:
        rows.append(_row(OVERALL, evaluation.overall))
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for first, *middle, last in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells, last]).rstrip())
    return [*lines, _describe_speed(evaluation), *_describe_differences(evaluation)]


def _row(name: str, acceptance: Acceptance) -> list[str]:
    return [
        name,
        f"{acceptance.num_answers:,}",
        f"{acceptance.num_forwards:,}",
        f"{acceptance.num_tokens:,}",
        _number(acceptance.acceptance_length),
        " ".join(_number(each) for each in acceptance.acceptance_by_position),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _describe_speed(evaluation: Evaluation) -> str:
    ours, base = evaluation.tokens_per_second, evaluation.baseline_tokens_per_second
    if not base:
        return f"{ours:.1f} tokens/s"
    return f"{ours:.1f} tokens/s with the draft, {base:.1f} without: {ours / base:.2f} x"


def _describe_differences(evaluation: Evaluation) -> list[str]:
    if not evaluation.settings.is_exact:
        return ["typical acceptance: the answers are not those of the base alone"]
    if evaluation.is_lossless is None:
        return []
    ties = len(evaluation.differences) - len(evaluation.faults)
    if evaluation.faults:
        first = evaluation.faults[0]
        return [f"NOT lossless: {len(evaluation.faults)} answers differ from the base's; {first.describe()}"]
    noted = f" but for {ties} where two tokens' logits tie within rounding" if ties else ""
    return [f"lossless: every greedy answer is the base's{noted}"]


def check_plot(path: Path | None) -> None:
    """Refuse a picture that could not be drawn, before anything is measured.

    Raises:
        ConfigError: matplotlib is not there, or does not know the kind of file.
    """
    if path is None:
        return
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ConfigError(f"plot = {path} needs matplotlib: pip install matplotlib, or leave --plot out") from None
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ConfigError(f"plot = {path}: matplotlib writes {', '.join(sorted(known))}; end the name with one of them")


def draw(evaluation: Evaluation, path: Path) -> None:
    """Accepted proposals by position, and acceptance length by category; needs matplotlib.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    shares = [each or 0.0 for each in evaluation.overall.acceptance_by_position]
    left.bar([str(position) for position in range(1, len(shares) + 1)], shares)
    left.set(ylim=(0, 1), xlabel="position", ylabel="accepted, where the ones before were")
    groups = {**evaluation.by_category, OVERALL: evaluation.overall}
    names = list(groups)
    right.barh(names, [each.acceptance_length or 0.0 for each in groups.values()])
    right.set(xlabel="acceptance length (tokens for each pass of the base)", xlim=(1, None))
    right.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

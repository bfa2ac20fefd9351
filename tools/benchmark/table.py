"""Print the lines of a benchmark run as a table; exit code 1 where a loss is not the reference's.

    python -m tools.benchmark.table RESULTS.jsonl

Of several lines for one contender and case the last counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.benchmark.cases import Case

PEERS = ("modelopt", "speculators")
# float32 sums over tens of thousands of logits, in another order in each contender. A mask that is off by one token
# moves losses by 2e-4 and gradients by 6e-3, a rotary position that is off by the step gradients by 1e-2.
LOSS_TOLERANCE = 5e-5
GRADIENT_TOLERANCE = 1e-4
# Below this length a step is mostly the base and the weights' own traffic, and the targets say nothing.
TARGETS_FROM_TOKENS = 1024
# Of the best product: what a process must see for its seconds to be believed.
QUIET_SHARE = 0.85
COLUMNS = (
    "contender",
    "min s",
    "median s",
    "tokens/s",
    "GFLOP/s",
    "of matmul",
    "matmul here",
    "before MiB",
    "peak MiB",
    "time",
    "peak",
    "loss",
    "off by",
    "gradients off by",
)
LEGEND = """min s, median s: of the measured steps; tokens/s from the fastest.
GFLOP/s: useful work by the fastest step, the same work for every contender; of matmul: as a share of the machine's
    float32 2048^3 product, the best of all processes of the run; matmul here: that product in this process, which says
    how quiet the machine was.
before, peak: resident memory before the steps, and the most the process ever held.
time, peak: as a multiple of the faster peer's fastest step and of its peak.
loss: in the contender's own definition; off by: relative to the reference in that definition; gradients off by: the
    norms of the gradients of the draft's matrices, the worst of them. -: not computed."""

Lines = dict[tuple[str, str], dict[str, Any]]


class Target(NamedTuple):
    """What ours should stay below, as multiples of the faster peer's; ``None``: nothing is said."""

    time: float | None = None
    peak: float | None = None


class Row(NamedTuple):
    """A contender's cells, and what is wrong with it."""

    cells: list[str]
    faults: list[str]


def target_of(case: Case) -> Target:
    """The targets, by what a case measures."""
    if case.num_tokens < TARGETS_FROM_TOKENS:
        return Target()
    if case.draft_vocab_size is not None:
        return Target(time=0.35) if case.mask_percent < 100 else Target()
    return {3: Target(0.6, 0.5), 7: Target(0.5, 0.4)}.get(case.num_steps, Target())


def read_lines(text: Iterable[str]) -> Lines:
    """By case and contender, in the order in which they ran."""
    lines: Lines = {}
    for line in text:
        entry = json.loads(line)
        lines[entry["case"], entry["contender"]] = entry
    return lines


def faster_peer(lines: Lines, case: str) -> dict[str, Any] | None:
    """The peer with the fastest step; ``None`` where none finished."""
    finished = [lines[case, peer] for peer in PEERS if "min_s" in lines.get((case, peer), {})]
    return min(finished, key=lambda entry: entry["min_s"], default=None)


def off_by(values: dict[str, float], expected: dict[str, float], tolerance: float) -> Row:
    """The largest relative difference as a cell, and a fault for each above the tolerance (or no number).

    Nothing is compared where nothing is expected; otherwise both must have the same entries.
    """
    if not expected:
        return Row(["-"], [])
    differences = {name: abs(values[name] / value - 1) for name, value in expected.items()}
    faults = [
        f"{name} {values[name]:.6g} is not the reference's {expected[name]:.6g}"
        for name, difference in differences.items()
        if not difference <= tolerance
    ]
    faults += [f"{name} has no reference" for name in values.keys() - expected]
    return Row([f"{max(differences.values()):.0e}"], faults)


def machine_rate(lines: Lines) -> float:
    """GFLOP/s of the machine: the best product of any process; 0 where none was measured."""
    return max((entry.get("matmul_gflops", 0.0) for entry in lines.values()), default=0.0)


def describe_noise(lines: Lines, rate: float) -> str:
    """A warning where some process shared the machine; empty where none did."""
    rates = [entry["matmul_gflops"] for entry in lines.values() if "matmul_gflops" in entry]
    noisy = sum(value < QUIET_SHARE * rate for value in rates)
    return f"warning: the machine was not quiet in {noisy} of {len(rates)} processes; measure again" if noisy else ""


def make_row(entry: dict[str, Any], reference: dict[str, Any], peer: dict[str, Any] | None, *, rate: float) -> Row:
    """A contender's line of one case; `rate` is the machine's."""
    name = entry["contender"]
    if "failed" in entry:
        faults = [] if entry["failed"] == "out of memory" else [f"{name} failed: {entry['failed']}"]
        return Row([name, entry["failed"]], faults)
    definition = entry["definition"]
    losses: dict[str, float] = reference.get("losses", {})
    loss = off_by({"loss": entry["loss"]}, {"loss": losses[definition]} if losses else {}, LOSS_TOLERANCE)
    gradient = off_by(entry["grad_norms"], reference.get("grad_norms", {}).get(definition, {}), GRADIENT_TOLERANCE)
    reached = entry["total_gflop"] / entry["min_s"]
    note = f" ({entry['note']})" if entry["note"] else ""
    cells = [
        f"{name} {entry['version']}{note}",
        f"{entry['min_s']:.2f}",
        f"{entry['median_s']:.2f}",
        f"{Case.parse(entry['case']).num_tokens / entry['min_s']:.0f}",
        f"{reached:.0f}",
        f"{reached / rate:.0%}",
        f"{entry['matmul_gflops']:.0f}",
        f"{entry['before_mib']:.0f}",
        f"{entry['peak_mib']:.0f}",
        "-" if peer is None else f"{entry['min_s'] / peer['min_s']:.2f}",
        "-" if peer is None else f"{entry['peak_mib'] / peer['peak_mib']:.2f}",
        f"{entry['loss']:.4f}",
        *loss.cells,
        *gradient.cells,
    ]
    return Row(cells, [f"{name}: {fault}" for fault in loss.faults + gradient.faults])


def describe_target(case: Case, ours: dict[str, Any], peer: dict[str, Any] | None) -> str:
    """The targets of a case and whether they are met; empty where there are none, or nothing to compare."""
    if peer is None or "min_s" not in ours:
        return ""
    parts = []
    target = target_of(case)
    for name, limit, key in (("time", target.time, "min_s"), ("peak", target.peak, "peak_mib")):
        if limit is not None:
            ratio = ours[key] / peer[key]
            parts.append(f"{name} {ratio:.2f}, target {limit}: {'met' if ratio <= limit else 'missed'}")
    return "; ".join(parts)


def describe_work(entry: dict[str, Any]) -> str:
    """Useful work of a case by kind."""
    kinds = ", ".join(f"{name.replace('_', ' ')} {value:.0f}" for name, value in entry["gflop"].items())
    return f"{entry['total_gflop']:.0f} GFLOP a step ({kinds})"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Cells as columns of one width each, the first to the left, the others to the right."""
    full = [[*row, *[""] * (len(COLUMNS) - len(row))] for row in rows]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    texts = []
    for row in full:
        first, *others = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        texts.append("  ".join([first, *others]).rstrip())
    return "\n".join(texts)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Print the lines of a benchmark run as a table.")
    parser.add_argument("results", type=Path, help="JSON lines of the contenders and the reference")
    lines = read_lines(parser.parse_args(arguments).results.read_text().splitlines())
    faults, rate = [], machine_rate(lines)
    for name in dict.fromkeys(case for case, _ in lines):
        entries = [entry for (case, who), entry in lines.items() if case == name and who != "reference"]
        reference, peer = lines.get((name, "reference"), {}), faster_peer(lines, name)
        if "failed" in reference:
            faults.append(f"{name}: reference failed: {reference['failed']}")
        rows = [make_row(entry, reference, peer, rate=rate) for entry in entries]
        faults += [f"{name}: {fault}" for row in rows for fault in row.faults]
        measured = [entry for entry in entries if "gflop" in entry]
        print(f"\n{name}" + (f": {describe_work(measured[0])}" if measured else ""))
        print(format_table([COLUMNS, *(row.cells for row in rows)]))
        verdict = describe_target(Case.parse(name), lines.get((name, "ours"), {}), peer)
        if verdict:
            print(f"ours: {verdict}")
    print(f"\nfloat32 product of this machine: {rate:.0f} GFLOP/s\n{LEGEND}")
    noise = describe_noise(lines, rate)
    if noise:
        print(noise, file=sys.stderr)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""The results of the acceptance benchmark: one line each in `results.jsonl`, and a table.

    python -m tools.benchmark.acceptance_table WORK_DIR

Reads what stands there of each contender: CONTENDER.time.json (`acceptance_timed`) and CONTENDER.serve.json
(`tools/serve_check.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.benchmark.markdown import markdown_table

PEER = "modelopt"
OURS = "ours"
# Draft tokens that the base accepts in a pass, ours as a multiple of the peer's.
TARGET = 2.0
RESULTS_FILE = "results.jsonl"
HEAD = (
    "contender",
    "training",
    "peak memory",
    "acceptance length",
    "accepted at position 1, 2, 3",
    "accepted draft tokens a pass",
    f"of {PEER}'s",
)
LEGEND = """training: convert, train and export, whole processes, the base's loading included; peak memory: the largest
of them. The rest is what vLLM counted: acceptance length is the tokens of a verification pass, accepted draft tokens
and one more; positions are shares of all passes, so that they add up to the accepted draft tokens."""


class Result(NamedTuple):
    """One contender.

    Attributes:
        contender: its name.
        seconds: of convert, training and export.
        peak_mib: memory of the largest process.
        num_forwards: verification passes in the engine.
        accepted_by_step: draft tokens that were accepted, by position.
    """

    contender: str
    seconds: float
    peak_mib: float
    num_forwards: int
    accepted_by_step: list[int]

    @classmethod
    def read(cls, work_dir: Path, contender: str) -> Result:
        """From its two files."""
        timed: dict[str, Any] = json.loads((work_dir / f"{contender}.time.json").read_text())
        served: dict[str, Any] = json.loads((work_dir / f"{contender}.serve.json").read_text())
        accepted = served["accepted_by_step"]
        return cls(contender, timed["seconds"], timed["peak_mib"], served["num_forwards"], accepted)

    @property
    def accepted_per_pass(self) -> float:
        """Draft tokens; the acceptance length without the base's own token."""
        return sum(self.accepted_by_step) / self.num_forwards

    @property
    def shares(self) -> list[float]:
        """Of all passes, those in which the token at each position was accepted."""
        return [accepted / self.num_forwards for accepted in self.accepted_by_step]

    def to_json(self) -> dict[str, Any]:
        """A line of the results."""
        return {
            **self._asdict(),
            "acceptance_length": 1 + self.accepted_per_pass,
            "accepted_share_by_position": self.shares,
        }


def read_results(work_dir: Path) -> list[Result]:
    """Contenders that were trained and served; this package's first, the peer last."""
    names = {file.name.removesuffix(".serve.json") for file in work_dir.glob("*.serve.json")}
    return [Result.read(work_dir, name) for name in sorted(names, key=lambda name: (name == PEER, name))]


def ratio_to(result: Result, peer: Result | None) -> float | None:
    """Accepted draft tokens as a multiple of the peer's; ``None``: nothing to compare with."""
    return None if peer is None or not peer.accepted_per_pass else result.accepted_per_pass / peer.accepted_per_pass


def format_table(results: Sequence[Result]) -> str:
    """Markdown."""
    peer = next((result for result in results if result.contender == PEER), None)
    rows: list[Sequence[str]] = []
    for result in results:
        ratio = ratio_to(result, peer)
        rows.append(
            (
                result.contender,
                f"{result.seconds:,.0f} s",
                f"{result.peak_mib:,.0f} MiB",
                f"{1 + result.accepted_per_pass:.3f}",
                ", ".join(f"{share:.3f}" for share in result.shares),
                f"{result.accepted_per_pass:.3f}",
                "-" if ratio is None else f"{ratio:.2f}",
            )
        )
    return markdown_table(HEAD, rows)


def describe_target(results: Sequence[Result]) -> str:
    """Whether this package's own defaults reach the target; empty where one of the two is not there."""
    by_name = {result.contender: result for result in results}
    ratio = ratio_to(by_name[OURS], by_name.get(PEER)) if OURS in by_name else None
    if ratio is None:
        return ""
    return f"{OURS}: {ratio:.2f} times {PEER}'s, target {TARGET:g}: {'met' if ratio >= TARGET else 'missed'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Print the results of the acceptance benchmark.")
    parser.add_argument("work_dir", type=Path, help="of acceptance.sh")
    work_dir: Path = parser.parse_args(arguments).work_dir
    results = read_results(work_dir)
    if not results:
        print(f"error: {work_dir} has no contender that was served; run tools/benchmark/acceptance.sh", file=sys.stderr)
        return 2
    lines = [json.dumps(result.to_json()) for result in results]
    (work_dir / RESULTS_FILE).write_text("".join(f"{line}\n" for line in lines))
    print(format_table(results))
    verdict = describe_target(results)
    if verdict:
        print(f"\n{verdict}")
    print(f"\n{LEGEND}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

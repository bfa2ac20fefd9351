"""The algorithms side by side: the same base, conversations and optimizer steps, and what each draft then saves.

    python -m tools.benchmark.algorithms --base BASE_DIR --data-path conversations.jsonl \\
        --prompts-path held_out.jsonl --work-dir runs/algorithms [--train-iters 200] [--steps 3] [--only eagle3,medusa]

Runs `mcore-spec convert`, `finetune` and `validate` for each draft, one after the other, and prints a markdown table.
Started again with the same --work-dir it goes on: what is finished is not done again, a training that was interrupted
is resumed. Prompts must not be among the conversations.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.benchmark.commands import check_settings, run_once, words_of
from tools.benchmark.markdown import markdown_table

MEMBERS = {"eagle3": "EAGLE-3", "eagle1": "EAGLE-1", "eagle-mtp": "EAGLE-MTP", "medusa": "Medusa"}
HEAD = (
    "draft",
    "parameters",
    "training",
    "tokens/s",
    "peak memory",
    "acceptance length",
    "accepted at position",
    "greedy answers",
)
LEGEND = """training: seconds in optimizer steps, loading and validation left out; peak memory: of the training process,
the base in it; positions: of the tokens that the base looked at; greedy answers: whether they are the base's own."""


class Row(NamedTuple):
    """What is known of one draft."""

    label: str
    num_parameters: int
    seconds: float
    tokens_per_second: float
    peak_mib: float
    validated: dict[str, Any]

    def cells(self) -> tuple[str, ...]:
        """In the order of `HEAD`."""
        shares = self.validated["acceptance_by_position"]
        return (
            self.label,
            f"{self.num_parameters:,}",
            f"{self.seconds:,.0f} s",
            f"{self.tokens_per_second:,.0f}",
            f"{self.peak_mib:,.0f} MiB",
            f"{self.validated['acceptance_length']:.3f}",
            ", ".join("-" if share is None else f"{share:.3f}" for share in shares),
            {True: "equal", False: "differ", None: "not compared"}[self.validated.get("lossless")],
        )


class Contest:
    """The runs of one work directory."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.work_dir: Path = given.work_dir
        self.rates = dict(pair.split("=", 1) for pair in given.lr_of)
        unknown = self.rates.keys() - MEMBERS
        if unknown:
            raise SystemExit(f"--lr-of names {', '.join(sorted(unknown))}; known: {', '.join(MEMBERS)}")

    def run(self, member: str) -> Row:
        """Whatever of the three steps is not done yet."""
        place = self.work_dir / member
        place.mkdir(parents=True, exist_ok=True)
        check_settings(
            place, {name: value for name, value in vars(self.given).items() if name not in ("only", "work_dir")}
        )
        converted = run_once(place / "convert", self._convert(member, place))
        trained = run_once(place / "finetune", self._finetune(member, place))
        validated = place / "validate.json"
        if not validated.exists():
            run_once(place / "validate", self._validate(place, validated))
        found = re.search(r"^draft: .*?; ([\d,]+) parameters", converted.output, re.MULTILINE)
        assert found is not None, "convert says how large the draft is"
        seconds, num_tokens = _training_time(place / "trained" / "train_log.jsonl")
        return Row(
            label=MEMBERS[member],
            num_parameters=int(found[1].replace(",", "")),
            seconds=seconds,
            tokens_per_second=num_tokens / seconds,
            peak_mib=trained.peak_mib,
            validated=json.loads(validated.read_text()),
        )

    def _convert(self, member: str, place: Path) -> list[str]:
        given, steps = self.given, self.given.steps
        if member == "medusa":
            chosen = ["--export-algorithm", "medusa", "--export-num-medusa-heads", str(steps)]
            values: dict[str, Any] = {"medusa_self_logit_distillation": True}
        else:
            chosen = ["--export-algorithm", "eagle", "--export-eagle-algorithm", member]
            values = {"eagle_ttt_steps": steps}
        if member == "eagle1":
            values["eagle_feature_noise"] = given.noise
        base = ["--pretrained-model-path", str(given.base), "--params-dtype", "fp32"]
        if member != "medusa":
            # Medusa draws nothing.
            base += ["--seed", str(given.seed)]
            values["eagle_architecture_config"] = _flags_of(member)
        config = place / "draft.json"
        config.write_text(json.dumps(values))
        return ["convert", *base, *chosen, "--algorithm-config", str(config), "--save", str(place / "converted")]

    def _finetune(self, member: str, place: Path) -> list[str]:
        given = self.given
        values = {
            "load": place / "converted",
            "save": place / "trained",
            "data-path": given.data_path,
            "seq-length": given.seq_length,
            "global-batch-size": given.global_batch_size,
            "train-iters": given.train_iters,
            "lr": self.rates.get(member, given.lr),
            "lr-warmup-iters": max(1, given.train_iters // 20),
            "log-interval": max(1, given.train_iters // 20),
            "save-interval": max(1, given.train_iters // 4),
            "split": "100,0,0",
            "seed": given.seed,
        }
        return words_of("finetune", values)

    def _validate(self, place: Path, output: Path) -> list[str]:
        given = self.given
        values = {
            "load": place / "trained",
            "prompts-path": given.prompts_path,
            "num-prompts": given.num_prompts,
            "steps": given.steps,
            "osl": given.osl,
            "output": output,
        }
        return words_of("validate", values)


def _flags_of(member: str) -> dict[str, bool]:
    """What tells the members of the EAGLE family apart."""
    from mcore_spec.config import eagle_preset

    flags: dict[str, bool] = eagle_preset(member)["config"]["eagle_architecture_config"]  # type: ignore[arg-type]
    return flags


def _training_time(log: Path) -> tuple[float, int]:
    """Seconds in optimizer steps and tokens, of all entries."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    seconds, before = 0.0, 0
    for entry in entries:
        if "tokens_per_second" in entry:
            seconds += (entry["consumed_tokens"] - before) / entry["tokens_per_second"]
            before = entry["consumed_tokens"]
    return seconds, before


def format_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    return markdown_table(HEAD, [row.cells() for row in rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face directory of the base")
    parser.add_argument("--data-path", type=Path, required=True, help="conversations to train on")
    parser.add_argument("--prompts-path", type=Path, required=True, help="prompts to measure on")
    parser.add_argument("--work-dir", type=Path, required=True, help="where everything goes")
    parser.add_argument("--only", default=",".join(MEMBERS), help="drafts, by comma (default: %(default)s)")
    parser.add_argument("--train-iters", type=int, default=200, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens of a sample (default: %(default)s)")
    parser.add_argument("--global-batch-size", type=int, default=4, help="samples of a step (default: %(default)s)")
    parser.add_argument("--lr", default="1e-4", help="learning rate at a width of 4,096 (default: %(default)s)")
    parser.add_argument("--lr-of", action="append", default=[], metavar="DRAFT=RATE", help="another rate for one draft")
    parser.add_argument("--noise", type=float, default=0.1, help="on EAGLE-1's features (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="tokens that are proposed (default: %(default)s)")
    parser.add_argument("--num-prompts", type=int, default=40, help="prompts that are taken (default: %(default)s)")
    parser.add_argument("--osl", type=int, default=128, help="most new tokens of an answer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="of weights and order (default: %(default)s)")
    given = parser.parse_args(arguments)
    names = given.only.split(",")
    if not set(names) <= MEMBERS.keys():
        parser.error(f"--only {given.only}: choose among {', '.join(MEMBERS)}")
    contest = Contest(given)
    rows = []
    for name in names:
        rows.append(contest.run(name))
        print(format_table(rows), flush=True)
    table = f"{format_table(rows)}\n\n{LEGEND}\n"
    (given.work_dir / "table.md").write_text(table)
    print(f"\n{LEGEND}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The closing page of the quickstart: what was made, what it reached, and how to serve it.

    python tools/quickstart_report.py --work-dir quickstart_out --osl 96 [--served serve.json]

Reads the files that the commands before it left in the directory, and writes ``report.md`` there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
HEAD = """# An EAGLE-3 draft for {base}

The base answered {num_conversations} prompts; the draft learnt from the answers for {iterations} steps
({tokens:,} tokens) and was measured on {num_answers} prompts that it has not seen, by speculative decoding with 3
proposed tokens a pass.

| | before | after |
|---|---|---|
| acceptance length (tokens a pass of the base) | {before[length]} | {after[length]} |
| accepted at position 1, 2, 3 (of those that reached it) | {before[positions]} | {after[positions]} |
| tokens/s with the draft | {before[speed]} | {after[speed]} |
| tokens/s of the base alone | {before[base_speed]} | {after[base_speed]} |
| greedy answers are the base's | {before[lossless]} | {after[lossless]} |

Training: loss {first_loss:.2f} at the start, {last_loss:.2f} at the end; top-1 accuracy of the steps at the end
{accuracy}; {speed:,.0f} tokens/s.
"""
PLOTS = """
![loss, accuracy by step and simulated acceptance length](checkpoint/curves.png)

![acceptance by position and by category](acceptance.png)
"""
SERVED = """
vLLM, with the exported draft on the same prompts: acceptance length {length:.3f}, {apart:.2%} from what was measured
here; accepted at position 1, 2, 3: {positions}.
"""
NOT_SERVED = """
The same prompts in vLLM, beside the figures above (`tools/quickstart.sh --serve` does both):

```
bash tools/vllm_environment.sh
PYTHONPATH={repository} {repository}/.venv-vllm/bin/python {repository}/tools/serve_check.py \\
    --base {work_dir}/base --draft {work_dir}/export \\
    --prompts-path {repository}/examples/data/prompts_held_out.jsonl --steps 3 --osl {osl} \\
    --validated {work_dir}/validate.json
```
"""
TAIL = """
## Serve it

```
vllm serve {work_dir}/base \\
    --speculative-config '{{"method": "eagle3", "model": "{work_dir}/export", "num_speculative_tokens": 3}}'
```

`export/README.md` has the commands for other engines.

## What lies where

    base/                  the base model, a Hugging Face directory
    conversations.jsonl    its answers
    vocab/                 the draft vocabulary
    converted/             base and untrained draft, a Megatron-LM distributed checkpoint
    checkpoint/            base and trained draft, with the optimizer and train_log.jsonl: training goes on from here
    export/                the draft as an engine reads it
    validate_before.json, validate.json
"""


def _positions(values: list[float | None]) -> str:
    return ", ".join("-" if each is None else f"{each:.3f}" for each in values)


def _figures(path: Path) -> dict[str, str]:
    """The cells of one column."""
    measured: dict[str, Any] = json.loads(path.read_text())
    return {
        "length": f"{measured['acceptance_length']:.3f}",
        "positions": _positions(measured["acceptance_by_position"]),
        "speed": f"{measured['tokens_per_second']:.1f}",
        "base_speed": f"{measured['baseline_tokens_per_second']:.1f}",
        "lossless": "yes" if measured["lossless"] else "no",
    }


def page(work_dir: Path, *, osl: int, served: Path | None) -> str:
    """Markdown.

    Args:
        work_dir: of the quickstart.
        osl: most new tokens of a measured answer.
        served: what `tools/serve_check.py` wrote; ``None``: the command for it is shown.
    """
    entries = [json.loads(line) for line in (work_dir / "checkpoint" / "train_log.jsonl").read_text().splitlines()]
    entries = [entry for entry in entries if "loss" in entry]
    first, last = entries[0], entries[-1]
    text = HEAD.format(
        base="SmolLM2-135M-Instruct",
        num_conversations=len((work_dir / "conversations.jsonl").read_text().splitlines()),
        iterations=last["iteration"],
        tokens=last["consumed_tokens"],
        num_answers=json.loads((work_dir / "validate.json").read_text())["num_answers"],
        before=_figures(work_dir / "validate_before.json"),
        after=_figures(work_dir / "validate.json"),
        first_loss=first["loss"],
        last_loss=last["loss"],
        accuracy=", ".join(f"{each:.3f}" for each in last["accuracy"]),
        speed=last["tokens_per_second"],
    )
    if served is None:
        text += NOT_SERVED.format(work_dir=work_dir, osl=osl, repository=REPOSITORY)
    else:
        figures = json.loads(served.read_text())
        positions = _positions(figures["acceptance_by_position"])
        text += SERVED.format(length=figures["acceptance_length"], apart=figures["apart"], positions=positions)
    return text + PLOTS + TAIL.format(work_dir=work_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="of the quickstart")
    parser.add_argument("--osl", type=int, required=True, help="most new tokens of a measured answer")
    parser.add_argument("--served", type=Path, help="JSON file of tools/serve_check.py, for the same prompts")
    given = parser.parse_args()
    text = page(given.work_dir, osl=given.osl, served=given.served)
    report: Path = given.work_dir / "report.md"
    report.write_text(text)
    print(text)
    print(f"this page: {report}")


if __name__ == "__main__":
    main()

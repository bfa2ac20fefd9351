"""The closing page of the quickstart: what was made, what it reached, and how to serve it.

    python tools/quickstart_report.py --work-dir quickstart_out

Reads the files that the commands before it left in the directory, and writes ``report.md`` there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

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


def _figures(path: Path) -> dict[str, str]:
    """The cells of one column."""
    measured: dict[str, Any] = json.loads(path.read_text())
    positions = measured["acceptance_by_position"]
    return {
        "length": f"{measured['acceptance_length']:.3f}",
        "positions": ", ".join("-" if each is None else f"{each:.3f}" for each in positions),
        "speed": f"{measured['tokens_per_second']:.1f}",
        "base_speed": f"{measured['baseline_tokens_per_second']:.1f}",
        "lossless": "yes" if measured["lossless"] else "no",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="of the quickstart")
    work_dir: Path = parser.parse_args().work_dir
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
    text += PLOTS + TAIL.format(work_dir=work_dir)
    (work_dir / "report.md").write_text(text)
    print(text)
    print(f"this page: {work_dir / 'report.md'}")


if __name__ == "__main__":
    main()

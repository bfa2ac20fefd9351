"""Measure a draft on prompts by speculative decoding: acceptance, speed, and whether the base's answers stay the same.

    python examples/validate.py --load CHECKPOINT_DIR --prompts-path prompts.jsonl --steps 3 --osl 128
    torchrun --nproc-per-node 2 examples/validate.py --base BASE_DIR --draft EXPORT_DIR --prompts-path prompts.jsonl \\
        --tensor-model-parallel-size 2 --output validate.json --plot validate.png

`--help` lists every option.
"""

from __future__ import annotations

from mcore_spec.cli.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("validate"))

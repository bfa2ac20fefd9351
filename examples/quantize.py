"""Quantise the base and the draft of a checkpoint; finetune goes on with the result, export writes it for engines.

    torchrun --nproc-per-node 2 examples/quantize.py --load TRAINED_DIR --save QUANT_DIR --export-quant-cfg fp8 \\
        --calib-size 512 --calib-data conversations.jsonl --tensor-model-parallel-size 2

`--help` lists every option.
"""

from __future__ import annotations

from mcore_spec.cli.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("quantize"))

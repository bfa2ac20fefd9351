"""Attach a draft to a base model and write a Megatron-core checkpoint.

    torchrun --nproc-per-node 2 examples/convert_model.py --export-algorithm eagle \\
        --pretrained-model-path BASE_DIR --save CHECKPOINT_DIR --tensor-model-parallel-size 2

`--help` lists every option. On one process, `python examples/convert_model.py` does the same.
"""

from __future__ import annotations

from mcore_spec.cli.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("convert"))

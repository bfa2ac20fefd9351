"""Train the draft of a converted checkpoint on conversations, with the frozen base beside it.

    torchrun --nproc-per-node 2 examples/finetune.py --load CHECKPOINT_DIR --save TRAINED_DIR \\
        --data-path conversations.jsonl --tensor-model-parallel-size 2 --num-epochs 1

`--help` lists every option. A run that was interrupted goes on when the same command is given again.
"""

from __future__ import annotations

from mcore_spec.cli.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("finetune"))

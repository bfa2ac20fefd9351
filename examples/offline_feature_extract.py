"""Run the base of a checkpoint alone over conversations and write its hidden states, for training without it.

    torchrun --nproc-per-node 2 examples/offline_feature_extract.py --load CHECKPOINT_DIR \\
        --data-path conversations.jsonl --output-dir STATES_DIR --tensor-model-parallel-size 2

`--help` lists every option. An extraction that was interrupted goes on when the same command is given again.
"""

from __future__ import annotations

from mcore_spec.cli.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("extract"))

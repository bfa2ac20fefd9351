"""Run a transformers model over conversations and write its hidden states, for training without it.

    torchrun --nproc-per-node 2 examples/compute_hidden_states_hf.py --pretrained-model-path BASE_DIR \\
        --data-path conversations.jsonl --output-dir STATES_DIR

Each process has a whole model and its own conversations. `--help` lists every option. An extraction that was
interrupted goes on when the same command is given again.
"""

from __future__ import annotations

from mcore_spec.cli.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("extract-hf"))

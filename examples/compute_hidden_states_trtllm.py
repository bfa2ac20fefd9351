"""Write the hidden states of a base that runs in TensorRT-LLM, for training a draft without the base beside it.

    python examples/compute_hidden_states_trtllm.py --pretrained-model-path BASE --data-path conversations.jsonl \\
        --output-dir states --num-samples 10000 --seq-length 2048 --storage-dtype bf16

Runs under an interpreter that has TensorRT-LLM, with this repository on PYTHONPATH; megatron-core is not needed.
The same as `mcore-spec extract-engine --engine tensorrt-llm`, whose `--help` lists every option. An extraction that was
interrupted goes on when the same command is given again.

Written against TensorRT-LLM's sources; not run, for want of a GPU.
"""

from __future__ import annotations

import sys

from mcore_spec.cli.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("extract-engine", ["--engine", "tensorrt-llm", *sys.argv[1:]]))

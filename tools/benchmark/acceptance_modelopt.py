"""ModelOpt's side of the acceptance benchmark: trains its EAGLE-3 on a transformers model, and exports it.

    python -m tools.benchmark.acceptance_modelopt --base DIR --work-dir DIR --export-dir DIR [--threads N]

Its own defaults, initial weights included, but for what both contenders are told (steps, decay, sizes: see
`peer_modelopt`) and for `torch.compile`, which takes minutes on a host. The loop is what its trainer does: a batch,
backward, clipping, AdamW, the rate. It caches attention masks by step, so that every batch has one length.

It is given the loss mask as its own code takes it, a bool for each token, and applies it as it does: by the token
that a target follows. It exports with its own function; what that writes is served unchanged.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import modelopt.torch.speculative as mtsp  # type: ignore[import-not-found]
import torch
from modelopt.torch.export import export_speculative_decoding  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.benchmark.acceptance_data import MAX_TOKENS, NUM_ITERATIONS, TOKENS_FILE, Batches
from tools.benchmark.cases import BaseSizes, Case
from tools.benchmark.peer_modelopt import eagle_config

LEARNING_RATE = 5e-4
NUM_WARMUP = 10
MAX_GRAD_NORM = 0.5
NUM_STEPS = 3
SEED = 0
LOG_INTERVAL = 10


def rate_factor(iteration: int) -> float:
    """Share of the learning rate at `iteration`, from 0: linear up to all of it, then a half cosine down to 0."""
    if iteration < NUM_WARMUP:
        return (iteration + 1) / NUM_WARMUP
    return 0.5 * (1 + math.cos(math.pi * (iteration - NUM_WARMUP) / (NUM_ITERATIONS - NUM_WARMUP)))


def train(base: Path, batches: Batches) -> torch.nn.Module:
    """The base with its trained draft."""
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    case = Case(num_tokens=MAX_TOKENS, num_steps=NUM_STEPS)
    model = mtsp.convert(model, [("eagle", eagle_config(BaseSizes.read(base), case))])
    model.train()
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor)
    begun = time.perf_counter()
    for iteration in range(NUM_ITERATIONS):
        output = model(**batches[iteration]._asdict())
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        if (iteration + 1) % LOG_INTERVAL == 0 or iteration == 0:
            accuracy = ", ".join(f"{float(each):.3f}" for each in output.train_acc[0])
            seconds = time.perf_counter() - begun
            print(f"iteration {iteration + 1}: loss {float(output.loss):.3f}, accuracy {accuracy}, {seconds:.0f} s")
    return model


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train and export ModelOpt's EAGLE-3.")
    parser.add_argument("--base", type=Path, required=True, help="the base model, an HF directory")
    parser.add_argument("--work-dir", type=Path, required=True, help="where acceptance_data wrote the tokens")
    parser.add_argument("--export-dir", type=Path, required=True, help="where the draft goes")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a log that can be followed
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model = train(options.base, Batches(options.work_dir / TOKENS_FILE, pad_id=pad_id))
    export_speculative_decoding(model, export_dir=options.export_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())

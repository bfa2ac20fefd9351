"""Time, memory and useful work of a training step; the frame that every contender runs in.

A contender is a fresh process for each case, so that peaks do not mix. It prints one JSON line. Imported in three
environments: torch only, nothing of the package and of no peer.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from tools.benchmark.cases import BaseSizes, Case, Inputs

MIB = 1024**2
MATMUL_SIZE = 2048
# What torch says where memory ends; there is no exception of its own for a host.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")

Definition = Literal["peer_cross_entropy", "peer_divergence", "per_token"]


class Contender(NamedTuple):
    """One implementation, ready to train.

    Attributes:
        step: zero gradients, base forward, draft forward, loss, backward; returns the loss.
        draft: the module that `load_draft` filled; it holds the gradients after a step.
        definition: which of the losses in `reference` the step returns.
        version: of the package.
        note: what a reader of the numbers must know.
    """

    step: Callable[[], float]
    draft: nn.Module
    definition: Definition
    version: str
    note: str = ""


Build = Callable[[Path, Case, Inputs], Contender]


class Work(NamedTuple):
    """Useful FLOPs of a step (a multiply and an add are two)."""

    base: float
    draft: float
    teacher_head: float
    student_head: float
    attention: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def count_work(sizes: BaseSizes, case: Case) -> Work:
    """The least that a step must compute, the same for every contender whatever it does beyond.

    Matrices: forward 2 a weight and row, backward twice that. The frozen base has no backward, `fc` no gradient
    of its input. Heads (docs of the loss): the teacher's once for each position that a counted row needs, the student's
    for each counted row and step: forward and the gradient of its input, and of its weights where the head is the
    draft's own. Attention: causal, so half of each product; two products forward, four backward, and beside the
    keys of step 0 one key for each earlier step. Elementwise work is left out.
    """
    n, hidden = case.num_tokens, sizes.hidden_size
    query, key = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    mlp = 3 * hidden * sizes.intermediate_size
    base_layer = hidden * (2 * query + 2 * key) + mlp
    draft_layer = 2 * hidden * (query + 2 * key) + query * hidden + mlp
    fc = len(sizes.aux_layer_ids) * hidden * hidden
    counted = case.counted_rows()
    positions = torch.zeros(n + case.num_steps, dtype=torch.bool)
    for step, rows in enumerate(counted):
        positions[rows.nonzero()[:, 0] + 1 + step] = True
    own_head = case.draft_vocab_size is not None
    head = hidden * (case.draft_vocab_size or sizes.vocab_size)
    triangle = n * n * query
    diagonals = 2 * n * query * sum(range(case.num_steps))
    return Work(
        base=2.0 * n * sizes.num_layers * base_layer,
        draft=4.0 * n * fc + 6.0 * n * draft_layer * case.num_steps,
        teacher_head=2.0 * int(positions.sum()) * hidden * sizes.vocab_size,
        student_head=2.0 * (3 if own_head else 2) * head * sum(int(rows.sum()) for rows in counted),
        attention=2.0 * sizes.num_layers * triangle + 6.0 * (case.num_steps * triangle + diagonals),
    )


def matmul_rate(*, repeats: int = 5) -> float:
    """FLOP/s of a float32 product of two square matrices of 2048: the best of several."""
    left, right = torch.randn(MATMUL_SIZE, MATMUL_SIZE), torch.randn(MATMUL_SIZE, MATMUL_SIZE)
    out = left @ right
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds.append(time.perf_counter() - start)
    return 2.0 * MATMUL_SIZE**3 / min(seconds)


def resident_bytes() -> int:
    """Memory that this process holds now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The most that this process ever held (Linux: `ru_maxrss` in KiB). A large parent would be counted: start it
    from a shell."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load_draft(draft: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the shared weights into the module, whose parameters have the same names.

    Raises:
        KeyError: a tensor without a parameter, or a trainable parameter other than a head without a tensor.
    """
    parameters = dict(draft.named_parameters())
    trainable = {name for name, value in parameters.items() if value.requires_grad} - {"lm_head.weight"}
    if trainable != set(tensors):
        raise KeyError(f"weights and the contender's draft differ in {sorted(trainable ^ set(tensors))}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def grad_norms(draft: nn.Module) -> dict[str, float]:
    """Norm of the gradient of each of the draft's matrices.

    Without the head, which not every contender trains, and without norms, which one of them applies twice.
    """
    return {
        name: float(torch.linalg.vector_norm(value.grad, dtype=torch.float64))
        for name, value in draft.named_parameters()
        if value.grad is not None and value.ndim == 2 and name != "lm_head.weight"
    }


def measure(contender: Contender, *, warmup: int, repeats: int) -> dict[str, object]:
    """Run the steps; seconds of each measured one, memory in MiB, loss and gradient of the last."""
    before = resident_bytes()
    for _ in range(warmup):
        contender.step()
    seconds, loss = [], float("nan")
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        loss = contender.step()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": seconds,
        "min_s": min(seconds),
        "median_s": statistics.median(seconds),
        "before_mib": before / MIB,
        "peak_mib": peak_bytes() / MIB,
        "loss": loss,
        "grad_norms": grad_norms(contender.draft),
        "definition": contender.definition,
        "version": contender.version,
        "note": contender.note,
    }


def run(name: str, build: Build) -> int:
    """The command line of a contender; returns the exit code.

    Prints ``{"contender", "case", "seconds", ...}``, or ``{"contender", "case", "failed"}`` where memory ends.
    """
    parser = argparse.ArgumentParser(description=f"Measure a training step of {name}.")
    parser.add_argument("--base", type=Path, required=True, help="the base model, an HF directory")
    parser.add_argument("--work-dir", type=Path, required=True, help="where prepare wrote the inputs")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the clock (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="measured steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    parser.add_argument("case", type=Case.parse, help="such as t1024-k3")
    options = parser.parse_args()
    case: Case = options.case
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    line: dict[str, object] = {"contender": name, "case": case.name}
    rate = matmul_rate()
    work = count_work(BaseSizes.read(options.base), case)
    try:
        contender = build(options.base, case, Inputs.read(options.work_dir, case))
        result = measure(contender, warmup=options.warmup, repeats=options.repeats)
    except RuntimeError as error:
        if not any(text in str(error) for text in _OUT_OF_MEMORY):
            raise
        print(json.dumps({**line, "failed": "out of memory", "peak_mib": peak_bytes() / MIB}))
        return 0
    line |= result
    line |= {"threads": options.threads, "torch": torch.__version__, "matmul_gflops": rate / 1e9}
    line |= {"gflop": {key: value / 1e9 for key, value in work._asdict().items()}, "total_gflop": work.total / 1e9}
    print(json.dumps(line))
    return 0


def hide_unused_audio_and_vision() -> None:
    """Pretend that torchaudio and torchvision are not installed where they cannot be loaded.

    Requirements of a peer that nothing here uses; built for CUDA, beside a torch for the CPU, they fail when
    transformers imports them.
    """
    for name in ("torchaudio", "torchvision"):
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError):
            sys.modules[name] = None  # type: ignore[assignment]

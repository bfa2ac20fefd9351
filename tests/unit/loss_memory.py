"""The distillation loss over a large vocabulary, in a process of its own whose peak memory the kernel tells.

    python -m tests.unit.loss_memory     # prints one JSON object, see `Measured`

The kernel counts every page that is touched, whoever asked for it: targets of ``out=``, workspaces of a matrix product,
temporaries inside of one operation. A process of its own, because pages that were freed before would be used again
without being counted. ``VmHWM``, because ``ru_maxrss`` begins with what the process that started this one held.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch

from mcore_spec.losses.fused import Vocabulary, distillation_loss

VOCAB_SIZE, NUM_TOKENS, NUM_STEPS = 151_936, 16_384, 7
# Small, and a sixteenth of the rows in the mask, 1,024 at each step: ten seconds on one thread.
HIDDEN = 8
RUN, PERIOD = 64, 1024
NUM_COUNTED = NUM_TOKENS * RUN // PERIOD
DECAY = 0.8


class Measured(NamedTuple):
    """What the process found.

    Attributes:
        before: bytes that it held when the inputs were there and each operation had run once.
        peak: the most that it held until the gradients were there.
        judged: rows of each step.
        has_gradients: whether every input got one that is finite and not zero.
    """

    before: int
    peak: int
    judged: list[int]
    has_gradients: bool


def main() -> None:
    """Inputs, a small loss that loads what there is to load, the loss itself."""
    torch.set_num_threads(1)
    _loss(num_tokens=2 * PERIOD, vocab_size=1000)
    random = torch.Generator().manual_seed(0)
    print(json.dumps(_loss(num_tokens=NUM_TOKENS, vocab_size=VOCAB_SIZE, random=random)._asdict()))


def _loss(*, num_tokens: int, vocab_size: int, random: torch.Generator | None = None) -> Measured:
    """Forward and backward of K steps over the whole vocabulary, the draft's head a weight of its own."""
    head = torch.randn(vocab_size, HIDDEN, generator=random)
    own_head = torch.randn(vocab_size, HIDDEN, generator=random).requires_grad_()
    teacher = torch.randn(num_tokens, HIDDEN, generator=random)
    student = [torch.randn(num_tokens, HIDDEN, generator=random).requires_grad_() for _ in range(NUM_STEPS)]
    position = torch.arange(num_tokens)
    counted = (position % PERIOD < RUN).repeat(NUM_STEPS, 1)
    before = _bytes("VmRSS")
    output = distillation_loss(
        student,
        teacher,
        position=position,
        counted=counted,
        vocabulary=Vocabulary(teacher_head=head, vocab_size=vocab_size, student_head=own_head),
        decay=DECAY,
    )
    output.loss.backward()
    peak = _bytes("VmHWM")
    grads = [each.grad for each in (own_head, *student)]
    has_gradients = all(grad is not None and bool(grad.isfinite().all() and grad.any()) for grad in grads)
    return Measured(before, peak, output.judged_by_step.tolist(), has_gradients)


def _bytes(name: str) -> int:
    """A line of Linux's status of this process, which is in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(value) * 1024


if __name__ == "__main__":
    main()

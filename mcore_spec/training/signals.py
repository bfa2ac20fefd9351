"""Ctrl-C and SIGTERM (SLURM's warning before it ends a job) as a wish that is granted between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedEarly(Exception):
    """A run was asked to stop before its first step: there is nothing to save."""


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        """Not yet."""
        self.is_made = False

    def is_made_anywhere(self, device: torch.device) -> bool:
        """Whether any rank was asked; every rank must call, and gets the same answer."""
        asked = torch.tensor([float(self.is_made)], device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request; a second one acts as it would have."""
    request = StopRequest()
    earlier = {number: signal.getsignal(number) for number in _SIGNALS}

    def ask(number: int, _frame: FrameType | None) -> None:
        request.is_made = True
        signal.signal(number, earlier[signal.Signals(number)])

    for number in _SIGNALS:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)

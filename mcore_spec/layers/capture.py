"""Looking at what modules compute while they run: a capture is a ``with`` block, and nothing stays behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def captured(modules: Iterable[nn.Module], take: Callable[[tuple[Any, ...], Any], Tensor]) -> Iterator[list[Tensor]]:
    """What `take` makes of the positional arguments and the output of each call of `modules`, in order of the calls."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        found.append(take(arguments, output))

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()

"""Context-parallel ranks for tests: stand-ins that only know their number, and what real ranks do."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_spec.parallel.documents import Documents


class StandIn:
    """As much of a process group as says which rows a rank holds; it cannot communicate."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def documents_of_ranks(bounds: list[int], size: int, lengths: list[int] | None = None) -> list[Documents]:
    """The documents as each of `size` ranks sees them."""
    groups: list[Any] = [StandIn(rank, size) for rank in range(size)]
    return [Documents(bounds, lengths=lengths, group=group if size > 1 else None) for group in groups]


def join(*, bounds: list[int], whole: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Take this rank's rows, join them, and the gradient of a sum that each rank weights in its own way."""
    documents = Documents(bounds, group=dist.group.WORLD)
    rows = documents.take(whole).requires_grad_()
    joined = documents.join(rows, with_grad=True)
    (joined * weights[dist.get_rank()]).sum().backward()
    without = documents.join(rows, with_grad=False)
    assert not without.requires_grad
    assert torch.equal(without, joined)
    assert rows.grad is not None
    return {"joined": joined.detach(), "gradient": rows.grad, "rows": documents.row_index}

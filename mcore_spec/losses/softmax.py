"""A softmax over logits that are sharded by vocabulary: vectors of rows are reduced, logits never leave their rank.

Each function works in place and in as few passes as it can: on the host a pass over the logits of a chunk costs
about a hundredth of the matrix product that made them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_spec.parallel.collectives import Group, group_size

# Larger than any vocabulary index: what a rank says that does not hold the maximum.
NOT_HERE = torch.iinfo(torch.int64).max
_BLOCK = 64


class Peak(NamedTuple):
    """The largest entry of each row, both [n].

    Attributes:
        value: of the whole row.
        entry: its vocabulary index, the lowest of several on this rank; `NOT_HERE` on a rank that does not hold it. The
            minimum over the group is the argmax.
    """

    value: Tensor
    entry: Tensor


def all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType, group: Group) -> Tensor:
    """Reduce over the group in place; returns the tensor."""
    if group_size(group) > 1:
        dist.all_reduce(tensor, operation, group=group)
    return tensor


def row_peak(logits: Tensor, first: int, group: Group) -> Peak:
    """The maximum of each row over the group's slices.

    Args:
        logits: this rank's slice, [n, width]; the width may be 0.
        first: vocabulary index of the slice's first column.
        group: ranks that hold the slices.
    """
    value, column = _local_peak(logits)
    highest = all_reduce(value.clone(), dist.ReduceOp.MAX, group)
    return Peak(highest, torch.where(value == highest, column + first, NOT_HERE))


def _local_peak(logits: Tensor) -> Peak:
    """Maximum and lowest column that has it; -inf where there are no columns.

    Finding the maximum alone is vectorised on the host and finding its index is not (20 times slower, measured): so the
    index is looked for among the maxima of blocks, and then inside of one block.
    """
    num_rows, width = logits.shape
    if width == 0:
        return Peak(logits.new_full((num_rows,), float("-inf")), logits.new_zeros((num_rows,), dtype=torch.int64))
    whole = width // _BLOCK * _BLOCK
    maxima = logits[:, :whole].unflatten(1, (-1, _BLOCK)).amax(2)
    if whole < width:
        maxima = torch.cat((maxima, logits[:, whole:].amax(1, keepdim=True)), 1)
    value, block = maxima.max(1)
    columns = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    # The last block repeats the last column; the first of equals is taken.
    columns = columns.clamp_(max=width - 1)
    return Peak(value, columns.gather(1, logits.gather(1, columns).argmax(1, keepdim=True))[:, 0])


def exponentiate(shifted: Tensor, group: Group) -> Tensor:
    """exp in place; returns the sum of each row over the group's slices, [n].

    Args:
        shifted: this rank's logits minus the row's maximum over the group, [n, width].
        group: ranks that hold the slices.
    """
    return all_reduce(shifted.exp_().sum(1), dist.ReduceOp.SUM, group)

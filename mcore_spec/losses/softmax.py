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
# Elements: 4 MiB in float32, and as much for a product that is summed at once.
_HOST_TILE = 2**20


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


class Exponentials(NamedTuple):
    """What is known of each row when its logits have become exponentials.

    Attributes:
        total: their sum over the group, [n].
        cross: sum of weight times shifted logit over this rank's slice, [n]; None without weights.
    """

    total: Tensor
    cross: Tensor | None


def exponentiate(logits: Tensor, highest: Tensor, group: Group, *, weights: Tensor | None = None) -> Exponentials:
    """logits -> exp(logits - highest), in place.

    Args:
        logits: this rank's slice, [n, width].
        highest: maximum of each row over the group, [n].
        group: ranks that hold the slices.
        weights: what the shifted logits are weighed by before they are gone, [n, width].
    """
    sums, cross = [], []
    tiles = _tiles(logits)
    # One for all tiles: new memory for each product takes six times as long as the product.
    product = None if weights is None else torch.empty_like(logits[tiles[0]])
    for tile in tiles:
        shifted = logits[tile].sub_(highest[tile, None])
        if weights is not None and product is not None:
            # Row by row: one float32 dot product over a whole block loses four digits.
            cross.append(torch.mul(weights[tile], shifted, out=product[: shifted.shape[0]]).sum(1))
        sums.append(shifted.exp_().sum(1))
    total = all_reduce(torch.cat(sums), dist.ReduceOp.SUM, group)
    return Exponentials(total, torch.cat(cross) if cross else None)


class Surprise(NamedTuple):
    """What labels cost; a row's loss is `log_sum` minus the sum of `label` over the group. All [n].

    Attributes:
        total: sum of the shifted exponentials, the same on every rank.
        label: the label's shifted logit, 0 on ranks that do not hold it.
    """

    total: Tensor
    label: Tensor

    @property
    def log_sum(self) -> Tensor:
        """Logarithm of the sum of the shifted exponentials."""
        return self.total.log()


def against_labels(
    logits: Tensor, highest: Tensor, labels: Tensor, first: int, group: Group, *, wants_gradients: bool
) -> Surprise:
    """Cross-entropy with hard labels; `logits` becomes onehot - q where gradients are wanted, else the exponentials.

    Args:
        logits: this rank's slice, [n, width]; the width may be 0.
        highest: maximum of each row over the group, [n].
        labels: vocabulary indices, int64 [n]; one that no rank's slice holds stands in no column.
        first: vocabulary index of the slice's first column.
        group: ranks that hold the slices.
        wants_gradients: which of the two `logits` becomes.
    """
    width, column = logits.shape[1], labels - first
    is_here = ((column >= 0) & (column < width)).to(logits.dtype)
    column = column.clamp(0, max(width - 1, 0))[:, None]
    label = torch.zeros_like(highest) if width == 0 else (logits.gather(1, column)[:, 0] - highest) * is_here
    total = exponentiate(logits, highest, group).total
    if width > 0 and wants_gradients:
        logits.mul_((-1 / total)[:, None]).scatter_add_(1, column, is_here[:, None])
    return Surprise(total, label)


def _tiles(block: Tensor) -> list[slice]:
    """Groups of rows that several passes go over one after the other: on the host, as many as stay in its caches."""
    num_rows, width = block.shape
    tile_rows = max(1, _HOST_TILE // max(width, 1)) if block.device.type == "cpu" else num_rows
    return [slice(start, start + tile_rows) for start in range(0, num_rows, tile_rows)]

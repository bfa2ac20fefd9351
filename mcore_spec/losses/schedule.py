"""Which student rows are judged at which teacher positions, cut into chunks of positions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class StepRows(NamedTuple):
    """The rows of one step that are judged at the positions of one chunk.

    Attributes:
        step: TTT step k.
        rows: indices of the rows by ascending position, int64 [m].
        slots: index in the chunk of each row's position, int64 [m], ascending.
        run_start: the first slot, where the slots follow each other without a gap; otherwise ``None``.
    """

    step: int
    rows: Tensor
    slots: Tensor
    run_start: int | None

    def take(self, chunk: Tensor, out: Tensor) -> Tensor:
        """Rows [m, width] of [positions, width]: a view where the slots are a run, else a copy in `out`."""
        if self.run_start is not None:
            return chunk[self.run_start : self.run_start + self.rows.shape[0]]
        return torch.index_select(chunk, 0, self.slots, out=out)


class Chunk(NamedTuple):
    """Teacher positions, ascending int64 [n], and the steps that have rows there."""

    positions: Tensor
    steps: list[StepRows]


def schedule(
    position: Tensor,
    counted: Tensor,
    *,
    num_positions: int,
    max_positions: int,
    ahead: Sequence[int] | None = None,
    further: Tensor | None = None,
) -> list[Chunk]:
    """Cut the positions that any counted row needs into chunks of nearly equal size.

    Row r is judged at step k at position ``position[r] + 1 + k``. The rows may be any of the positions, in any order.

    Args:
        position: int64 [rows]; no two rows share one.
        counted: rows of each step, bool [K, rows].
        num_positions: positions there are.
        max_positions: largest size of a chunk.
        ahead: what stands for k above, one a step; ``None``: its number.
        further: positions that are needed without a row too, bool [num_positions]; ``None``: there are none.
    """
    ahead = range(len(counted)) if ahead is None else ahead
    assert position.unique().shape == position.shape, "no two rows share a position"
    order = position.argsort()
    rows = [order[is_counted[order]] for is_counted in counted]
    targets = [position[step_rows] + 1 + distance for distance, step_rows in zip(ahead, rows, strict=True)]
    is_needed = torch.zeros(num_positions, dtype=torch.bool, device=position.device)
    if further is not None:
        is_needed |= further
    for target in targets:
        is_needed[target] = True
    needed = is_needed.nonzero().flatten()
    index = is_needed.cumsum(0) - 1
    slots = [index[target] for target in targets]
    # Bounds of chunks and runs are looked up on the host; these copies are all that the device waits for.
    host_slots = [step_slots.tolist() for step_slots in slots]
    num_chunks = -(-needed.shape[0] // max_positions)
    bounds = [number * needed.shape[0] // num_chunks for number in range(num_chunks)] + [needed.shape[0]]
    chunks = []
    for start, stop in pairwise(bounds):
        steps = []
        for k, host in enumerate(host_slots):
            low, high = bisect_left(host, start), bisect_left(host, stop)
            if low < high:
                is_run = host[high - 1] - host[low] == high - 1 - low
                run_start = host[low] - start if is_run else None
                steps.append(StepRows(k, rows[k][low:high], slots[k][low:high] - start, run_start))
        chunks.append(Chunk(needed[start:stop], steps))
    return chunks

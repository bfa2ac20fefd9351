"""How far a draft's states are from the base's: the part of EAGLE-1's loss that is not about tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mcore_spec.parallel.collectives import reduce_from_group
from mcore_spec.parallel.tensor_parallel import TensorParallel


class RegressionOutput(NamedTuple):
    """Sums over the counted rows; the ranks of a tensor-parallel group hold the same values.

    Attributes:
        loss: sum over steps k of decay^k times the distance of the rows; a scalar that carries the gradients.
        loss_by_step: the same sums without decay or gradient, [K].
    """

    loss: Tensor
    loss_by_step: Tensor


def feature_regression(
    student: Sequence[Tensor],
    teacher: Tensor,
    *,
    position: Tensor,
    counted: Tensor,
    decay: float,
    tp: TensorParallel,
) -> RegressionOutput:
    """Smooth L1 (Girshick, arXiv 1504.08083, equation 3), the mean over h, of states outside of the parallel regions.

    Row r of step k is compared with ``teacher[position[r] + 1 + k]``. Under sequence parallelism each rank compares its
    own rows and the sums are added over the group.

    Args:
        student: K tensors [rows or rows/size, h].
        teacher: the base's states, [positions, h]; no gradient.
        position: index into `teacher` of each row's features, int64 [rows].
        counted: bool [K, rows]; their positions at the step exist.
        decay: weight of a step relative to the one before.
        tp: how the rows are shared out.
    """
    wide = torch.promote_types(torch.promote_types(student[0].dtype, teacher.dtype), torch.float32)
    position = tp.own_rows(position)
    sums = []
    for step, (hidden, is_counted) in enumerate(zip(student, counted, strict=True)):
        rows = tp.own_rows(is_counted).nonzero()[:, 0]
        target = teacher.detach().index_select(0, position[rows] + 1 + step)
        distance = F.smooth_l1_loss(hidden[rows].to(wide), target.to(wide), reduction="none")
        sums.append(distance.mean(-1).sum())
    by_step = torch.stack(sums)
    if tp.sequence_parallel:
        by_step = reduce_from_group(by_step, tp.group)
    weights = torch.tensor([decay**step for step in range(len(student))], dtype=wide, device=by_step.device)
    return RegressionOutput((weights * by_step).sum(), by_step.detach())

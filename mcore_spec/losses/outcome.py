"""What a loss returns: sums over rows, so that micro-batches and ranks are added."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LossOutput(NamedTuple):
    """Sums over the counted rows of this rank; only `loss` carries a gradient.

    The ranks of a tensor-parallel group hold the same values: do not add those.

    Attributes:
        loss: sum over steps k of decay^k times the loss of the rows that entered; a scalar.
        loss_by_step: the same sums without decay, [K].
        rows_by_step: rows that entered the loss, int64 [K]: counted, and not dropped for the draft vocabulary.
        judged_by_step: rows counted by the mask, int64 [K].
        correct_by_step: counted rows whose draft argmax is the teacher's over the full vocabulary, int64 [K].
        accepted: draft tokens accepted in a row from step 0 on, over all rows, int64 scalar; the simulated
            acceptance length is 1 + accepted / judged_by_step[0].
        regression_by_step: distance of the draft's states from the base's, where it is part of the loss: sums over the
            counted rows, without decay, [K]; ``None`` elsewhere.
        language_model: the base's own loss, where it is asked for, and the tokens that it is over: sums, float64 [2].
            `loss` contains it where the base is trained too. ``None``: not asked for.
    """

    loss: Tensor
    loss_by_step: Tensor
    rows_by_step: Tensor
    judged_by_step: Tensor
    correct_by_step: Tensor
    accepted: Tensor
    regression_by_step: Tensor | None = None
    language_model: Tensor | None = None

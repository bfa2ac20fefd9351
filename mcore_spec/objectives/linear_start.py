"""A least-squares start of a draft: which rows it learns from, whether it is made, one solution for all ranks.

The regression itself is in `mcore_spec.drafts.linear_start`. Both hosts call this: a `GPTModel`'s trainer, and what
trains on transformers models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_spec.bases.base import Base
from mcore_spec.bases.features import Features, features_for
from mcore_spec.config import BaseArchitecture
from mcore_spec.data.batch import Batch
from mcore_spec.drafts.draft import Draft
from mcore_spec.drafts.linear_start import MAX_DEFAULT_BYTES, ROWS_PER_INPUT, LinearMap, Moments, sums_bytes
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.objectives.objective import Task
from mcore_spec.objectives.rows import teacher_rows
from mcore_spec.parallel.collectives import Group, gather_without_grad, group_size
from mcore_spec.parallel.documents import Documents
from mcore_spec.parallel.tensor_parallel import SEQUENCE_DIM


class LinearRows(NamedTuple):
    """What the draft reads, [n, f + h], and the base's next last hidden state, [n, h]."""

    inputs: Tensor
    targets: Tensor


def check_linear_start(task: Task, *, num_batches: int | None) -> None:
    """Refuse a start from data for a draft that has none, before there is a draft.

    Args:
        task: of the draft.
        num_batches: global batches to learn from, 0: none; ``None``: as the draft allows.

    Raises:
        UnsupportedError: the draft has no such start.
    """
    if num_batches and not task.starts_linearly:
        raise UnsupportedError(
            f"fit_start = {num_batches}: this draft has no such start (with norm_before_residual or "
            "eagle_reuse_base_decoder there is none); leave it at 0"
        )


def num_default_rows(task: Task, base: BaseArchitecture) -> int:
    """Rows that a start learns from if nobody says how many batches; 0: none is made.

    Args:
        task: of the draft, not trained yet.
        base: the base model.
    """
    num_inputs = (max(len(task.aux_layer_ids), 1) + 1) * base.hidden_size
    is_small = sums_bytes(num_inputs=num_inputs, num_outputs=base.hidden_size) <= MAX_DEFAULT_BYTES
    return ROWS_PER_INPUT * num_inputs if task.starts_linearly and is_small else 0


@torch.no_grad()
def linear_rows(base: Base, draft: Draft, batch: Batch, documents: Documents, features: Features) -> LinearRows:
    """What the start learns from a batch: this context-parallel rank's rows that count at step 0.

    Args:
        base: whose features they are.
        draft: that reads them.
        batch: of the whole row.
        documents: of the batch, seen from this rank.
        features: of this rank's rows.

    Raises:
        UnsupportedError: the draft has no such start.
    """
    embedding = base.embed(documents.take(batch.step_token_ids, 1)[:1])
    inputs = draft.linear_inputs(features_for(draft, features), embedding)
    if base.tp.sequence_parallel:
        inputs = gather_without_grad(inputs, SEQUENCE_DIM, base.tp.group)
    rows = documents.take(batch.counted, 1)[0].nonzero()[:, 0]
    following = documents.row_index.to(rows.device)[rows] + 1
    return LinearRows(inputs[rows, 0], teacher_rows(features, documents, base.tp)[following])


def sum_rows(each: Iterable[LinearRows | None]) -> Moments | None:
    """Sums over the rows of all batches; ``None`` on stages that have none."""
    moments: Moments | None = None
    for rows in each:
        if rows is None:
            continue
        if moments is None:
            moments = Moments(rows.inputs.shape[1], rows.targets.shape[1], device=rows.inputs.device)
        moments.add(rows.inputs, rows.targets)
    return moments


@torch.no_grad()
def solve_linear_start(
    base: Base, draft: Draft, moments: Moments, *, data_group: Group, copies: Sequence[Group], seed: int
) -> float:
    """Sum over the ranks, solve once, set the draft's weights; every rank that holds a part of it must call.

    Args:
        base: of the draft.
        draft: whose weights are replaced.
        moments: of this rank's rows; become those of all.
        data_group: ranks with other rows.
        copies: groups that take the solution of their first rank, in this order, so that it is the same bit for bit.
        seed: of what is drawn.

    Returns:
        Mean size of the features.

    Raises:
        ConfigError: no row counts.
    """
    if group_size(data_group) > 1:
        for total in (moments.inputs, moments.products, moments.num_rows):
            dist.all_reduce(total, group=data_group)
    if float(moments.num_rows) == 0:
        raise ConfigError("fit_start: no row of the first batches counts; give more of them, or data with answers")
    parts = [part.contiguous() for part in moments.solve()]
    for group in copies:
        for part in parts if group_size(group) > 1 else ():
            dist.broadcast(part, group=group, group_src=0)
    draft.linear_start(LinearMap(*parts), base.final_norm_weight(), seed=seed)
    return moments.feature_size()

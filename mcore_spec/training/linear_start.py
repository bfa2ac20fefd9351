"""A least-squares start of the draft, over the ranks: sums of every rank's rows, one solution for all."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from mcore_spec.config import BaseArchitecture
from mcore_spec.data.batch import Batch
from mcore_spec.drafts.linear_start import MAX_DEFAULT_BYTES, ROWS_PER_INPUT, LinearMap, Moments, sums_bytes
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.objectives.objective import Task
from mcore_spec.parallel.layout import run_on_every_rank
from mcore_spec.training.step import DraftStep


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
def fit_linear_start(model: GPTModel, step: DraftStep, batches: Iterable[Batch], *, seed: int) -> float:
    """Set the draft's weights. Every rank of the model must call, with its own share of the batches.

    Memory, on the last stage: 8 (f + 2 h) (f + h) bytes of sums and about twice that to solve, with f inputs of fc
    (three times h): 1 GB of sums at h = 2,560, 11 GB at 8,192.

    Args:
        model: this rank's part.
        step: of the same model.
        batches: to learn from.
        seed: of what is drawn.

    Returns:
        Mean size of the features, the same on every rank.

    Raises:
        ConfigError: no row of the batches counts.
        UnsupportedError: a draft without such a start.
    """
    moments: Moments | None = None
    for batch in batches:
        rows = step.linear_rows(batch)
        if rows is None:
            continue
        if moments is None:
            moments = Moments(rows.inputs.shape[1], rows.targets.shape[1], device=rows.inputs.device)
        moments.add(rows.inputs, rows.targets)
    size = run_on_every_rank(lambda: _solve(model, step, moments, seed=seed))
    return _tell_every_stage(model, size)


def _solve(model: GPTModel, step: DraftStep, moments: Moments | None, *, seed: int) -> float:
    """On the last stage: sum over the ranks, solve once, set the weights."""
    if step.draft is None:
        return 0.0
    assert moments is not None, "every rank has batches"
    groups = model.pg_collection
    for total in (moments.inputs, moments.products, moments.num_rows):
        dist.all_reduce(total, group=groups.dp_cp)
    if float(moments.num_rows) == 0:
        raise ConfigError("fit_start: no row of the first batches counts; give more of them, or data with answers")
    # One solution for all ranks that hold the draft, bit for bit.
    parts = [part.contiguous() for part in moments.solve()]
    for group in (groups.tp, groups.dp_cp):
        for part in parts:
            dist.broadcast(part, group=group, group_src=0)
    step.draft.linear_start(LinearMap(*parts), step.base.final_norm_weight(), seed=seed)
    return moments.feature_size()


def _tell_every_stage(model: GPTModel, size: float) -> float:
    """The last stage's figure; it decides rates, which a checkpoint of any stage records."""
    group = model.pg_collection.pp
    told = torch.tensor([size], dtype=torch.float64, device=next(model.parameters()).device)
    dist.broadcast(told, group=group, group_src=group.size() - 1)
    return float(told)

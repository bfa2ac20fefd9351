"""A least-squares start of the draft, over the ranks: sums of every rank's rows, one solution for all."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from mcore_spec.data.batch import Batch
from mcore_spec.drafts.linear_start import LinearMap, Moments
from mcore_spec.errors import ConfigError
from mcore_spec.parallel.layout import run_on_every_rank
from mcore_spec.training.step import DraftStep


@torch.no_grad()
def fit_linear_start(model: GPTModel, step: DraftStep, batches: Iterable[Batch], *, seed: int) -> None:
    """Set the draft's weights. Every rank of the model must call, with its own share of the batches.

    Memory, on the last stage: 8 (f + 2 h) (f + h) bytes of sums and about twice that to solve, with f inputs of fc
    (three times h): 1 GB of sums at h = 2,560, 11 GB at 8,192.

    Args:
        model: this rank's part.
        step: of the same model.
        batches: to learn from.
        seed: of what is drawn.

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
    run_on_every_rank(lambda: _solve(model, step, moments, seed=seed))


def _solve(model: GPTModel, step: DraftStep, moments: Moments | None, *, seed: int) -> None:
    """On the last stage: sum over the ranks, solve once, set the weights."""
    if step.draft is None:
        return
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

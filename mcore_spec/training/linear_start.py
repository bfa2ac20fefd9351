"""A least-squares start of a `GPTModel`'s draft, over all its ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from mcore_spec.data.batch import Batch
from mcore_spec.drafts.linear_start import Moments
from mcore_spec.objectives.linear_start import solve_linear_start, sum_rows
from mcore_spec.parallel.layout import run_on_every_rank
from mcore_spec.training.step import DraftStep


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
    moments = sum_rows(step.linear_rows(batch) for batch in batches)
    size = run_on_every_rank(lambda: _solve(model, step, moments, seed=seed))
    return _tell_every_stage(model, size)


def _solve(model: GPTModel, step: DraftStep, moments: Moments | None, *, seed: int) -> float:
    """On the last stage; others have no figure."""
    if step.draft is None:
        return 0.0
    assert moments is not None, "every rank has batches"
    groups = model.pg_collection
    copies = (groups.tp, groups.dp_cp)
    return solve_linear_start(step.base, step.draft, moments, data_group=groups.dp_cp, copies=copies, seed=seed)


def _tell_every_stage(model: GPTModel, size: float) -> float:
    """The last stage's figure; it decides rates, which a checkpoint of any stage records."""
    group = model.pg_collection.pp
    told = torch.tensor([size], dtype=torch.float64, device=next(model.parameters()).device)
    dist.broadcast(told, group=group, group_src=group.size() - 1)
    return float(told)

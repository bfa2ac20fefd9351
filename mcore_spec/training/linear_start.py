"""A least-squares start of a `GPTModel`'s draft, over all its ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from mcore_spec.data.batch import Batch
from mcore_spec.objectives.linear_start import Sample, StartSolver
from mcore_spec.parallel.layout import run_on_every_rank
from mcore_spec.training.step import DraftStep


@torch.no_grad()
def fit_linear_start(model: GPTModel, step: DraftStep, batches: Iterable[Batch], *, seed: int) -> dict[str, float]:
    """Set the draft's weights. Every rank of the model must call, with its own share of the batches.

    Memory, on the last stage: 8 (f + 2 h) (f + h) bytes of sums and about twice that to solve, with f inputs of fc
    (three times h): 1 GB of sums at h = 2,560, 11 GB at 8,192; and on the host the features of this
    rank's rows, f + h numbers each.

    Args:
        model: this rank's part.
        step: of the same model.
        batches: to learn from.
        seed: of what is drawn.

    Returns:
        What the learning rate is to be multiplied by for each matrix of the draft, by name; the same on every rank.

    Raises:
        ConfigError: no row of the batches counts.
        UnsupportedError: a draft without such a start.
    """
    solver = add_batches(model, step, batches)
    rates = run_on_every_rank(lambda: None if solver is None else solver.solve(seed=seed))
    return _tell_every_stage(model, rates)


@torch.no_grad()
def add_batches(model: GPTModel, step: DraftStep, batches: Iterable[Batch]) -> StartSolver | None:
    """What the start learns from; ``None`` on stages without the draft. Arguments as of `fit_linear_start`."""
    groups, solver = model.pg_collection, None
    if step.draft is not None:
        solver = StartSolver(
            step.task,
            step.base,
            step.draft,
            data_group=groups.dp_cp,
            copies=(groups.tp, groups.dp_cp),
            data_rank=groups.dp.rank(),
            data_size=groups.dp.size(),
        )
    for batch in batches:
        documents, features = step.run_base(batch)
        if solver is not None and features is not None:
            solver.add(Sample(batch, documents, features))
    return solver


def _tell_every_stage(model: GPTModel, rates: dict[str, float] | None) -> dict[str, float]:
    """The last stage's, which a checkpoint of any stage records."""
    group, told = model.pg_collection.pp, [rates]
    dist.broadcast_object_list(told, group=group, group_src=group.size() - 1)
    (last,) = told
    assert last is not None, "the last stage has the draft"
    return last

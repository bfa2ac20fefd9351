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
def fit_linear_start(model: GPTModel, step: DraftStep, batches: Iterable[tuple[Batch, bool]], *, seed: int) -> float:
    """Set the draft's weights. Every rank of the model must call, with its own share of the batches.

    Memory, on the last stage: 8 (f + 2 h) (f + h) bytes of sums and about twice that to solve, with f inputs of fc
    (three times h): 1 GB of sums at h = 2,560, 11 GB at 8,192; and the features of the batches that are kept.

    Args:
        model: this rank's part.
        step: of the same model.
        batches: to learn from, and whether to keep each (see `StartSolver.add`).
        seed: of what is drawn.

    Returns:
        Mean size of the features, the same on every rank.

    Raises:
        ConfigError: no row of the batches counts.
        UnsupportedError: a draft without such a start.
    """
    solver = add_batches(model, step, batches)
    # Stages without the draft have no figure.
    size = run_on_every_rank(lambda: 0.0 if solver is None else solver.solve(seed=seed))
    return _tell_every_stage(model, size)


@torch.no_grad()
def add_batches(model: GPTModel, step: DraftStep, batches: Iterable[tuple[Batch, bool]]) -> StartSolver | None:
    """What the start learns from; ``None`` on stages without the draft. Arguments as of `fit_linear_start`."""
    groups, solver = model.pg_collection, None
    if step.draft is not None:
        copies = (groups.tp, groups.dp_cp)
        solver = StartSolver(step.task, step.base, step.draft, data_group=groups.dp_cp, copies=copies)
    for batch, keep in batches:
        documents, features = step.run_base(batch)
        if solver is not None and features is not None:
            solver.add(Sample(batch, documents, features), keep=keep)
    return solver


def _tell_every_stage(model: GPTModel, size: float) -> float:
    """The last stage's figure; it decides rates, which a checkpoint of any stage records."""
    group = model.pg_collection.pp
    told = torch.tensor([size], dtype=torch.float64, device=next(model.parameters()).device)
    dist.broadcast(told, group=group, group_src=group.size() - 1)
    return float(told)

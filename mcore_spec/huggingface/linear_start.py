"""A least-squares start of a draft on a transformers model, from batches as Trainer has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from mcore_spec.bases.transformers import TransformersBase
from mcore_spec.conversion import as_base, conversion_of, find_algorithm
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.hosting.base_run import run_base
from mcore_spec.hosting.context import context_group
from mcore_spec.objectives.linear_start import Sample, StartSolver, check_linear_start, num_default_rows
from mcore_spec.objectives.objective import Task
from mcore_spec.parallel.collectives import Group, group_rank, group_size
from mcore_spec.parallel.layout import run_on_every_rank
from mcore_spec.quantization.installed import quantization_of

# What Trainer adds to a batch, which counts nothing here.
_COUNT = "num_items_in_batch"


class LinearStart(NamedTuple):
    """What a start was made from.

    Attributes:
        num_rows: rows that count, of all ranks.
        rates: what the learning rate is to be multiplied by for each matrix of the draft, by name.
    """

    num_rows: int
    rates: dict[str, float]


def fit_start(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    num_batches: int | None = None,
    seed: int = 1234,
) -> LinearStart | None:
    """Set the draft's first weights as the least-squares solution of what is linear in its task, in place.

    Every process that holds a copy of the model must call, with batches of its own. ``mcore-spec finetune --fit-start``
    makes the same start of a `GPTModel`'s draft.

    Args:
        model: a transformers model with a draft, not wrapped.
        batches: keyword arguments of its forward, labels among them, such as a DataLoader gives.
        num_batches: to learn from, of each process; ``None``: as many as the solution needs. Wide bases (above 5,000),
            and drafts without such a start, are then left as they are.
        seed: of what is drawn.

    Returns:
        What the start was made from, the same on every rank; ``None`` where none was made.

    Raises:
        ConfigError: no draft, a model that is not of transformers, one that is quantised, a negative number, or no row
            that counts.
        UnsupportedError: a draft without such a start, or a model whose weights are sharded.
    """
    conversion = conversion_of(model)
    if conversion is None:
        raise ConfigError(f"the {type(model).__name__} has no draft; attach one first (mcore_spec.convert)")
    base = as_base(model)
    if not isinstance(base, TransformersBase):
        raise ConfigError(f"fit_start of a {type(model).__name__}: give mcore-spec finetune --fit-start")
    if quantization_of(model) is not None:
        raise ConfigError("fit_start would replace weights that have scales; make the start first, and quantise then")
    if isinstance(model, FSDPModule) or group_size(context_group()) > 1:
        raise UnsupportedError(
            "fit_start under FSDP or context parallelism, where no process has the whole model: make the start before, "
            "or leave it out"
        )
    if num_batches is not None and num_batches < 0:
        raise ConfigError(f"fit_start = {num_batches}: give a number of batches, or 0 for no start")
    task = find_algorithm(conversion.algorithm).task(conversion.config)
    check_linear_start(task, num_batches=num_batches)
    num_rows = num_default_rows(task, base.architecture)
    if num_batches == 0 or (num_batches is None and num_rows == 0):
        return None
    world: Group = dist.group.WORLD if dist.is_initialized() else None
    draft = base.draft()
    assert draft is not None, "a converted model has a draft"
    solver = StartSolver(
        task,
        base,
        draft,
        data_group=world,
        copies=(world,),
        data_rank=group_rank(world),
        data_size=group_size(world),
    )
    without_autocast = torch.autocast(base.device.type, enabled=False)
    enough = -(-num_rows // group_size(world))

    def add_batches() -> None:
        num_seen = 0
        for batch in islice(batches, num_batches):
            sample = _sample(base, task, batch)
            with without_autocast:
                num_seen += solver.add(sample)
            if num_batches is None and num_seen >= enough:
                return
        if not solver.kept:
            raise ConfigError("fit_start: there are no batches; give some")

    run_on_every_rank(add_batches)
    with without_autocast:
        rates = solver.solve(seed=seed)
    return LinearStart(num_rows=int(solver.moments.num_rows), rates=rates)


@torch.no_grad()
def _sample(base: TransformersBase, task: Task, batch: Mapping[str, Any]) -> Sample:
    """A batch of the loader and the base's features, in the dtype of the draft's weights."""
    call = {name: value for name, value in batch.items() if name != _COUNT}
    run = run_base(base, task, call, group=None)
    return Sample(run.packed, run.documents, run.features)

"""The smallest layout that fits a GPU, and why smaller ones do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from mcore_spec.errors import ConfigError
from mcore_spec.planning.activations import TrainingSetup
from mcore_spec.planning.layout import PlannedLayout, check_divides
from mcore_spec.planning.memory import RankMemory, stage_memories
from mcore_spec.planning.work import estimate_speed

MAX_CONTEXT = 8
MAX_NODES = 32


class Candidate(NamedTuple):
    """A layout and its worst rank.

    Attributes:
        setup: the run in this layout.
        worst: memory of the rank that needs most.
        stage: its pipeline stage.
    """

    setup: TrainingSetup
    worst: RankMemory
    stage: int


class Search(NamedTuple):
    """What was found.

    Attributes:
        found: the smallest that fits, of several as small the fastest; ``None``: nothing does.
        rejected: of each smaller number of GPUs the layout that comes nearest.
    """

    found: Candidate | None
    rejected: list[Candidate]


def judge(setup: TrainingSetup) -> Candidate:
    """The worst rank of a layout."""
    memories = stage_memories(setup)
    stage = max(memories, key=lambda number: memories[number].peak_bytes)
    return Candidate(setup, memories[stage], stage)


def find_layout(setup: TrainingSetup, *, usable_bytes: int, gpus_per_node: int) -> Search:
    """Go through the layouts that divide the model, from few GPUs to many.

    Tensor parallelism stays inside of a node and comes with sequence parallelism; a node is shared out evenly, and
    where one is not enough whole ones are taken.

    Args:
        setup: the run; its layout is not read.
        usable_bytes: of a GPU.
        gpus_per_node: GPUs that are connected closely.
    """
    by_size: dict[int, list[TrainingSetup]] = {}
    for layout in possible_layouts(setup, gpus_per_node=gpus_per_node):
        by_size.setdefault(layout.num_gpus, []).append(replace(setup, layout=layout))
    rejected: list[Candidate] = []
    for num_gpus in sorted(by_size):
        candidates = [judge(each) for each in by_size[num_gpus]]
        fitting = [each for each in candidates if each.worst.peak_bytes <= usable_bytes]
        if fitting:
            return Search(max(fitting, key=_tokens_per_second), rejected)
        rejected.append(min(candidates, key=lambda each: each.worst.peak_bytes))
    return Search(None, rejected)


def possible_layouts(setup: TrainingSetup, *, gpus_per_node: int) -> Iterator[PlannedLayout]:
    """Every layout that divides base, draft and sequence, one copy of the model each."""
    base = setup.shape.architecture
    for tensor in range(1, gpus_per_node + 1):
        for pipeline in range(1, base.num_layers + 1):
            for context in (1 << power for power in range(MAX_CONTEXT.bit_length())):
                num_gpus = tensor * pipeline * context
                is_whole = gpus_per_node % num_gpus == 0 or num_gpus % gpus_per_node == 0
                if num_gpus > MAX_NODES * gpus_per_node or gpus_per_node % tensor or not is_whole:
                    continue
                # Each document is cut into two parts for each rank.
                if context > 1 and setup.seq_length % (2 * context):
                    continue
                layout = PlannedLayout(
                    tensor=tensor,
                    pipeline=pipeline,
                    context=context,
                    sequence_parallel=tensor > 1 and setup.all_rows % (tensor * context) == 0,
                    last_stage_layers=last_stage_layers(base.num_layers, pipeline),
                )
                if divides(setup, layout):
                    yield layout


def last_stage_layers(num_layers: int, pipeline: int) -> int | None:
    """Layers of the last stage where an even split leaves a rest: fewer than the others', as the draft is there too."""
    if pipeline == 1 or num_layers % pipeline == 0:
        return None
    return num_layers - (pipeline - 1) * -(-num_layers // pipeline)


def divides(setup: TrainingSetup, layout: PlannedLayout) -> bool:
    """Whether base and draft can be cut so."""
    try:
        check_divides(
            setup.shape.architecture,
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            last_stage_layers=layout.last_stage_layers,
        )
        assert replace(setup, layout=layout).sizes
    except ConfigError:
        return False
    return True


def _tokens_per_second(candidate: Candidate) -> float:
    # Relative: the rate of one GPU is the same for all. Enough micro-batches to keep the stages busy.
    return estimate_speed(candidate.setup, num_micro_batches=16, flops_per_second=1.0).tokens_per_second

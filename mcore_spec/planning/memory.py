"""Bytes of a rank: what stays, and what each phase of a training step adds."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_spec.planning.activations import WIDE, Parts, TrainingSetup, base_forward, training_phases
from mcore_spec.planning.weights import draft_tensors, stage_weights

OPTIMIZER_STEP = "optimizer step"


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """One rank of a stage.

    Attributes:
        fixed: bytes that stay, by part.
        phases: bytes that each phase of a step adds at its worst moment, by part.
    """

    fixed: Parts
    phases: dict[str, Parts]

    @property
    def fixed_bytes(self) -> int:
        """What stays."""
        return sum(self.fixed.values())

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak_bytes(self) -> int:
        """The most that the rank ever holds."""
        return self.fixed_bytes + sum(self.phases[self.peak_phase].values())

    @property
    def largest_part(self) -> str:
        """Name of the part that needs most at the peak."""
        parts = {**self.fixed, **self.phases[self.peak_phase]}
        return max(parts, key=lambda name: parts[name])


def rank_memory(setup: TrainingSetup, *, stage: int) -> RankMemory:
    """Of a rank of stage `stage`, from 0; the last one has the draft."""
    weights, size = stage_weights(setup.shape, setup.layout, stage=stage), setup.bytes
    fixed = {"base weights": weights.base * size}
    phases = {"base forward": base_forward(setup, stage=stage)}
    if stage < setup.layout.pipeline - 1:
        return RankMemory(fixed=fixed, phases=phases)
    if weights.embedding_copy:
        fixed["embedding copy"] = weights.embedding_copy * size
    fixed |= _draft_bytes(setup)
    phases |= training_phases(setup)
    phases[OPTIMIZER_STEP] = {"one tensor of the optimizer": _optimizer_step(setup)}
    return RankMemory(fixed=fixed, phases=phases)


def stage_memories(setup: TrainingSetup) -> dict[int, RankMemory]:
    """One rank of the stages that differ, by stage: the first, the last but one, which carries most aux states, the
    last."""
    last = setup.layout.pipeline - 1
    stages = sorted({0, max(0, last - 1), last})
    return {stage: rank_memory(setup, stage=stage) for stage in stages}


def _draft_bytes(setup: TrainingSetup) -> Parts:
    """Weights, gradients and optimizer of the draft (`training.optimizer`)."""
    layout, size, sizes = setup.layout, setup.bytes, setup.sizes
    num = sum(draft_tensors(sizes, setup.architecture, tensor=layout.tensor))
    num_shards = layout.data * layout.context if setup.use_distributed_optimizer else 1
    parts = {"draft weights": num * size, "gradient buffers": num * WIDE}
    if setup.bf16:
        parts["main weights"] = num * WIDE // num_shards
    parts["Adam's moments"] = 2 * num * WIDE // num_shards
    if sizes.is_reduced:
        # d2t and its inverse on the whole vocabulary.
        vocabulary = setup.shape.architecture.vocab_size
        parts["draft vocabulary"] = 8 * (2 * sizes.vocabulary * layout.tensor + vocabulary)
        if layout.tensor > 1:
            # The base's rows of this rank's slice lie on other ranks.
            parts["draft vocabulary"] += sizes.vocabulary * sizes.hidden * size
    return parts


def _optimizer_step(setup: TrainingSetup) -> int:
    """The norm of the largest gradient in float64, or what torch's AdamW holds besides its state.

    On a GPU the roots of all second moments at once; on the host two of the tensor at hand and one of the one before.
    """
    tensors = sorted(draft_tensors(setup.sizes, setup.architecture, tensor=setup.layout.tensor), reverse=True)
    num_shards = setup.layout.data * setup.layout.context if setup.use_distributed_optimizer else 1
    at_once = sum(tensors) // num_shards if setup.on_cuda else 2 * tensors[0] + tensors[1]
    return max(8 * tensors[0], WIDE * at_once)

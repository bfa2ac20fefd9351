"""What ``--dry-run`` shares: a base and its draft as ranks would hold them, built without memory."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.megatron_build import TransformerImpl, build_gpt_model
from mcore_spec.cli.terminal import say
from mcore_spec.config import BaseArchitecture, StrictConfig
from mcore_spec.conversion import attach
from mcore_spec.parallel.imagined import imagined_rank, last_stage_rank
from mcore_spec.parallel.layout import Layout

META = torch.device("meta")


class Rehearsal(NamedTuple):
    """What is built.

    Attributes:
        base: the base.
        layout: how it is cut.
        world_size: ranks of the run.
        draft: algorithm and resolved configuration; ``None``: the base alone.
        transformer_impl: whose layers.
    """

    base: BaseArchitecture
    layout: Layout
    world_size: int
    draft: tuple[str, StrictConfig] | None
    transformer_impl: TransformerImpl


class RankWeights(NamedTuple):
    """Bytes of one rank of a stage."""

    base: int
    draft: int
    embedding_copy: int


def build_stages(rehearsal: Rehearsal) -> dict[int, RankWeights]:
    """The first and the last stage, by number; outside of any process group.

    Raises:
        ConfigError: sizes that the layout does not divide.
        UnsupportedError: a base or a draft that cannot be built.
    """
    layout, world_size = rehearsal.layout, rehearsal.world_size
    ranks = {0: 0, layout.pipeline - 1: last_stage_rank(layout, world_size=world_size)}
    return {stage: _build(rehearsal, rank=rank) for stage, rank in ranks.items()}


def _build(rehearsal: Rehearsal, *, rank: int) -> RankWeights:
    with imagined_rank(rehearsal.layout, rank=rank, world_size=rehearsal.world_size):
        model = build_gpt_model(
            rehearsal.base, rehearsal.layout, transformer_impl=rehearsal.transformer_impl, target=META
        )
        base = MegatronBase(model)
        own = _count(model)
        if rehearsal.draft is None:
            return RankWeights(own, 0, 0)
        draft = attach(base, *rehearsal.draft)
        if draft is None:
            return RankWeights(own, 0, 0)
        assert all(parameter.is_meta for parameter in model.parameters()), "nothing is allocated"
        copies = draft.reads_tokens and base.needs_embedding_copy()
        return RankWeights(own, _count(draft), _bytes(base.head_weight()) if copies else 0)


def _count(module: torch.nn.Module) -> int:
    return sum(_bytes(parameter) for parameter in module.parameters())


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def say_weights(layout: Layout, stages: dict[int, RankWeights]) -> None:
    """Bytes of weights on the ranks that were built."""
    for stage, weights in stages.items():
        parts = {"base": weights.base, "embedding copy": weights.embedding_copy, "draft": weights.draft}
        text = ", ".join(f"{part} {size:,}" for part, size in parts.items() if size)
        say(f"bytes of weights on a rank of stage {stage + 1} of {layout.pipeline}: {text}")

"""Parallel drafting: heads that propose further tokens from the state that a step's own head reads.

Each is a stack of Medusa's residual blocks; they share one vocabulary head of their own (``parallel_draft_step`` of
NVIDIA ModelOpt). Head i of step k predicts x[t+2+k+i].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mcore_spec.config import BaseArchitecture, EagleArchitectureConfig
from mcore_spec.drafts.medusa import ResidualBlock
from mcore_spec.layers.linear import VocabularyHead
from mcore_spec.parallel.tensor_parallel import Placement


class ParallelHeads(nn.Module):
    """All further heads of a draft."""

    def __init__(self, architecture: EagleArchitectureConfig, base: BaseArchitecture, *, place: Placement) -> None:
        """Allocate this rank's shard.

        Args:
            architecture: of the draft, resolved; its number of tokens a step includes the step's own head's.
            base: the base model.
            place: group, dtype and device.
        """
        super().__init__()
        assert architecture.draft_vocab_size is not None
        self.medusa_heads = nn.ModuleList(
            nn.ModuleList(
                ResidualBlock(base.hidden_size, place=place)
                for _ in range(architecture.parallel_draft_heads_num_layers)
            )
            for _ in range(architecture.parallel_draft_step - 1)
        )
        self.lm_head = VocabularyHead(base.hidden_size, architecture.draft_vocab_size, place=place)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Zero blocks: an untrained head reads what the step's own head reads."""
        for parameter in self.medusa_heads.parameters():
            parameter.zero_()

    def states(self, hidden: Tensor) -> list[Tensor]:
        """What `lm_head` reads for each head, from the whole rows inside the parallel region, [..., h] -> the same."""
        found = []
        for blocks in self.medusa_heads:
            state = hidden
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                state = block(state)
            found.append(state)
        return found


def build_parallel_heads(
    architecture: EagleArchitectureConfig, base: BaseArchitecture, *, place: Placement
) -> ParallelHeads | None:
    """The heads, where the draft has more than its own."""
    return ParallelHeads(architecture, base, place=place) if architecture.parallel_draft_step > 1 else None

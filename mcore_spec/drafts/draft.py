"""What all drafts have in common: how they are called, saved and counted."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mcore_spec.layers.linear import VocabularyHead
from mcore_spec.parallel.sharding import sharded_state_dict
from mcore_spec.parallel.tensor_parallel import TensorParallel

# Which of the base's hidden states a draft reads: several layers' outputs joined, or the last one after
# the final norm.
Reads = Literal["aux", "last"]


class StepOutput(NamedTuple):
    """One TTT step, rows indexed by feature position; each [s or s/size, b, h].

    Attributes:
        hidden: what the head reads.
        feedback: what the next step reads in place of the base's features.
    """

    hidden: Tensor
    feedback: Tensor


class Draft(nn.Module):
    """A module on the last pipeline stage that proposes tokens from the base's hidden states."""

    reads: ClassVar[Reads]

    def __init__(self, *, tp: TensorParallel) -> None:
        """Remember the group.

        Args:
            tp: the tensor-parallel group that the base's last stage uses.
        """
        super().__init__()
        self.tp = tp

    def own_heads(self) -> list[VocabularyHead]:
        """Heads that belong to the draft and start as rows of the base's head."""
        return []

    def head_token_ids(self) -> Tensor:
        """Base token id of each row of the draft's own heads, [vocabulary]."""
        raise NotImplementedError

    def init_weights(self, *, seed: int) -> None:
        """Initial values that depend on `seed` alone, not on the parallel layout."""
        raise NotImplementedError

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's protocol: every parameter and buffer as a `ShardedTensor`."""
        assert not sharded_offsets, "a draft lives on one pipeline stage"
        return sharded_state_dict(self, prefix, tp=self.tp, metadata=metadata)


def draft_to_target(draft: nn.Module) -> Tensor:
    """Base token id of each entry of the draft vocabulary, int64 [draft vocabulary]: i + d2t[i]."""
    d2t = draft.get_buffer("d2t")
    return torch.arange(d2t.shape[0], device=d2t.device) + d2t

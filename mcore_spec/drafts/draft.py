"""What all drafts have in common: how they are called, saved and counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mcore_spec.config import BaseArchitecture
from mcore_spec.drafts.linear_start import LinearMap
from mcore_spec.errors import UnsupportedError
from mcore_spec.layers.linear import VocabularyHead
from mcore_spec.parallel.sharding import sharded_state_dict
from mcore_spec.parallel.tensor_parallel import TensorParallel

# Which of the base's hidden states a draft reads: several layers' outputs joined, or the last one after
# the final norm.
Reads = Literal["aux", "last"]


class Draft(nn.Module):
    """A module on the last pipeline stage that proposes tokens from the base's hidden states.

    Attributes:
        label: the field's name of this kind of draft.
        reads: which of the base's hidden states its forward takes.
        reads_tokens: whether its forward takes the base's embeddings of tokens.
    """

    label: ClassVar[str]
    reads: ClassVar[Reads]
    reads_tokens: ClassVar[bool]

    def __init__(self, *, tp: TensorParallel) -> None:
        """Remember the group.

        Args:
            tp: the tensor-parallel group that the base's last stage uses.
        """
        super().__init__()
        self.tp = tp
        self.has_reduced_vocabulary = False
        # Of a draft that has just been attached: whether it starts from the base's layer.
        self.is_warm_started = False

    def reserve_vocabulary(self, size: int, *, base_size: int, device: torch.device | None) -> None:
        """Make room for the mapping of a vocabulary that is smaller than the base's; unset, so that it cannot serve."""
        self.has_reduced_vocabulary = size < base_size
        if self.has_reduced_vocabulary:
            self.register_buffer("d2t", torch.full((size,), -1, dtype=torch.int64, device=device))

    def own_heads(self) -> list[VocabularyHead]:
        """Heads that belong to the draft and start as rows of the base's head."""
        return []

    def head_token_ids(self) -> Tensor:
        """Base token id of each row of the draft's own heads, int64 [vocabulary]: i + d2t[i], or i."""
        head = self.own_heads()[0]
        ids = torch.arange(head.vocab_size, device=head.weight.device)
        return ids + self.get_buffer("d2t") if self.has_reduced_vocabulary else ids

    def init_weights(self, *, seed: int) -> None:
        """Initial values that depend on `seed` alone, not on the parallel layout."""
        raise NotImplementedError

    def set_draft_vocabulary(self, d2t: Tensor) -> None:
        """Take the draft vocabulary, int64 [draft vocabulary] with target id = i + d2t[i].

        A whole vocabulary, which can only map to itself, needs none.
        """
        if self.has_reduced_vocabulary:
            self.get_buffer("d2t").copy_(d2t)

    def scale_logits(self, head_row_norm: float) -> None:
        """Make the first logits small, where the draft has a norm that can do it.

        Args:
            head_row_norm: root mean square of the norms of the base's head rows.
        """

    def can_warm_start(self, layer: Mapping[str, Tensor], base: BaseArchitecture) -> bool:
        """Whether the draft behind `warm_start` would be the base with fewer layers, and nothing else.

        Args:
            layer: as of `warm_start`.
            base: the base model.
        """
        return False

    def warm_start(self, layer: Mapping[str, Tensor], final_norm: Tensor) -> None:
        """Start from weights of the base instead of random ones.

        Args:
            layer: this rank's weights of the base's last decoder layer, under the names of a draft's layer.
            final_norm: weight of the base's final norm, [h].

        Raises:
            UnsupportedError: this kind of draft has no such start.
        """
        raise UnsupportedError(f"draft_init = base is not built for {self.label}; choose draft_init = random")

    def linear_inputs(self, features: Tensor, embedding: Tensor) -> Tensor:
        """What a least-squares start regresses the base's next hidden state on, [s or s/size, b, f + h].

        Args:
            features: what `reads` says, [s or s/size, b, ...].
            embedding: of the token behind each row, [s or s/size, b, h].

        Raises:
            UnsupportedError: this kind of draft has no such start.
        """
        raise UnsupportedError(f"fit_start is not built for {self.label}; leave it at 0")

    def linear_start(self, solution: LinearMap, final_norm: Tensor, *, seed: int) -> None:
        """Start as the solution, as nearly as the draft can hold it.

        Args:
            solution: of the regression on `linear_inputs`.
            final_norm: weight of the base's final norm, [h].
            seed: of what is drawn.

        Raises:
            UnsupportedError: this kind of draft has no such start.
        """
        raise UnsupportedError(f"fit_start is not built for {self.label}; leave it at 0")

    def layer_of_base(self) -> nn.Module | None:
        """The decoder layer that starts as the base's last one, if one does."""
        return None

    def facts(self) -> list[str]:
        """What a report says about the draft besides its label and size."""
        return []

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's protocol: every parameter and buffer as a `ShardedTensor`."""
        assert not sharded_offsets, "a draft lives on one pipeline stage"
        return sharded_state_dict(self, prefix, tp=self.tp, metadata=metadata)

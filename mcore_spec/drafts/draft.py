"""What all drafts have in common: how they are called, saved and counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mcore_spec.errors import UnsupportedError
from mcore_spec.layers.attention import KeyValue
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


class StepResult(NamedTuple):
    """One TTT step and the keys and values that it adds, one a layer."""

    output: StepOutput
    added: tuple[KeyValue, ...]


# Keys and values of the earlier steps: one entry a layer, in it one entry a step.
Past = tuple[tuple[KeyValue, ...], ...]
# (state, embedding, past, step) -> the step.
OneStep = Callable[[Tensor, Tensor, Past, int], StepResult]


def run_steps(
    one_step: OneStep, state: Tensor, embeddings: Sequence[Tensor], *, num_layers: int, recompute: bool
) -> list[StepOutput]:
    """All TTT steps, each fed with the one before.

    Args:
        one_step: must change none of its arguments.
        state: what step 0 reads, [s or s/size, b, h].
        embeddings: one a step, like `state`.
        num_layers: layers that keep keys and values.
        recompute: keep the inputs of a step only and run it a second time in backward. It is handed the same
            keys and values of earlier steps then, and what it adds the second time is dropped. The ranks'
            collectives run again too, in the order of the first time.
    """
    past: Past = ((),) * num_layers
    outputs = []
    for step, embedding in enumerate(embeddings):
        if recompute:
            # Drafts draw no random numbers: there is no random state to keep.
            result = checkpoint(one_step, state, embedding, past, step, use_reentrant=False, preserve_rng_state=False)
        else:
            result = one_step(state, embedding, past, step)
        past = tuple((*earlier, new) for earlier, new in zip(past, result.added, strict=True))
        state = result.output.feedback
        outputs.append(result.output)
    return outputs


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

    def own_heads(self) -> list[VocabularyHead]:
        """Heads that belong to the draft and start as rows of the base's head."""
        return []

    def head_token_ids(self) -> Tensor:
        """Base token id of each row of the draft's own heads, [vocabulary]."""
        raise NotImplementedError

    def init_weights(self, *, seed: int) -> None:
        """Initial values that depend on `seed` alone, not on the parallel layout."""
        raise NotImplementedError

    def set_draft_vocabulary(self, d2t: Tensor) -> None:
        """Take the draft vocabulary, int64 [draft vocabulary] with target id = i + d2t[i]."""
        raise NotImplementedError

    def scale_logits(self, head_row_norm: float) -> None:
        """Make the first logits small, where the draft has a norm that can do it.

        Args:
            head_row_norm: root mean square of the norms of the base's head rows.
        """

    def warm_start(self, layer: Mapping[str, Tensor], final_norm: Tensor) -> None:
        """Start from weights of the base instead of random ones.

        Args:
            layer: this rank's weights of the base's last decoder layer, under the names of a draft's layer.
            final_norm: weight of the base's final norm, [h].

        Raises:
            UnsupportedError: this kind of draft has no such start.
        """
        raise UnsupportedError(f"draft_init = base is not built for {self.label}; choose draft_init = random")

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


def draft_to_target(draft: nn.Module) -> Tensor:
    """Base token id of each entry of the draft vocabulary, int64 [draft vocabulary]: i + d2t[i]."""
    d2t = draft.get_buffer("d2t")
    return torch.arange(d2t.shape[0], device=d2t.device) + d2t

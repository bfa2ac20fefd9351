"""Drafts that are fed with their own states: one step, in training and in serving alike."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mcore_spec.drafts.draft import Draft
from mcore_spec.drafts.parallel_heads import ParallelHeads
from mcore_spec.drafts.steps import Mixing, Past, StepOutput, StepResult, run_steps
from mcore_spec.layers.attention import Rows, TTTRows
from mcore_spec.layers.capture import captured
from mcore_spec.layers.linear import VocabularyHead
from mcore_spec.layers.mlp import GatedMLP
from mcore_spec.layers.norm import RMSNorm
from mcore_spec.parallel.documents import Documents


class MLPRows(NamedTuple):
    """The rows of step 0 at the first layer's MLP.

    Attributes:
        inner: what its last matrix reads, [s, b, intermediate size / size].
        before: what its output is added to, [s or s/size, b, h].
    """

    inner: Tensor
    before: Tensor


class StepwiseDraft(Draft):
    """A draft whose step reads a state and the next token's embedding and returns the state of the step after it.

    Attributes:
        layers: its decoder layers, each of which keeps keys and values.
        parallel_draft_heads: what proposes further tokens from a step's state, if anything does.
    """

    reads_tokens: ClassVar[bool] = True
    layers: nn.ModuleList
    parallel_draft_heads: ParallelHeads | None

    @property
    def step_head(self) -> VocabularyHead | None:
        """The head of every step, where it is not the base's."""
        return None

    def own_heads(self) -> list[VocabularyHead]:
        """The steps', and that of the parallel heads; both speak one vocabulary."""
        further = None if self.parallel_draft_heads is None else self.parallel_draft_heads.lm_head
        return [head for head in (self.step_head, further) if head is not None]

    def facts(self) -> list[str]:
        """How many tokens a step proposes, where it is more than one."""
        if self.parallel_draft_heads is None:
            return []
        return [f"{1 + len(self.parallel_draft_heads.medusa_heads)} tokens a step"]

    @property
    def last_norm(self) -> RMSNorm | None:
        """The norm between the last layer and the head, where there is one."""
        return None

    @property
    def hands_on_size(self) -> bool:
        """Whether the size of what the head reads goes into the next step's state, and not into the logits alone."""
        return True

    def before_last_norm(self, last: Tensor) -> Tensor:
        """What the layers have to put out for the head to read `last`, but for its length; both [..., h], float64."""
        if self.last_norm is None:
            return last.double()
        weight = self.last_norm.weight.double()
        return last * torch.where(weight.abs() > 1e-6, 1 / weight, 0.0)

    @property
    def fitted_mlp(self) -> GatedMLP:
        """The MLP whose last matrix a start from data solves."""
        mlp = self.layers[0].get_submodule("mlp")
        assert isinstance(mlp, GatedMLP)
        return mlp

    def mlp_rows(self, features: Tensor, embedding: Tensor, documents: Documents) -> MLPRows:
        """What that MLP sees at step 0; arguments as of `forward`."""
        norm, last = self.layers[0].get_submodule("post_attention_layernorm"), self.fitted_mlp.down_proj
        with captured([norm, last], lambda arguments, _: arguments[0]) as seen:
            self(features, [embedding], documents=documents)
        before, inner = seen
        return MLPRows(inner, before)

    def start(self, features: Tensor) -> Tensor:
        """The state that step 0 reads, [s or s/size, b, h], from the base's features."""
        raise NotImplementedError

    def step(self, state: Tensor, embedding: Tensor, rows: Sequence[Rows]) -> StepOutput:
        """One step.

        Args:
            state: from `start`, or the feedback of the step before, [s or s/size, b, h].
            embedding: of the token behind each row, like `state`.
            rows: one a layer.
        """
        raise NotImplementedError

    def forward(
        self,
        features: Tensor,
        embeddings: Sequence[Tensor],
        *,
        documents: Documents | None = None,
        recompute: bool = False,
        mixing: Mixing | None = None,
        detach: bool = False,
    ) -> list[StepOutput]:
        """All training-time-test steps.

        Args:
            features: what `reads` says, [s or s/size, b, ...]; row t is position t.
            embeddings: one a step, [s or s/size, b, h]; row t of step k embeds token x[t+1+k].
            documents: of one packed row (b = 1), of which the tensors are this context-parallel rank's rows;
                ``None``: each of the b columns is one document.
            recompute: keep no activations of a step; run it again in backward.
            mixing: mix the draft's own states into the features instead of growing keys.
            detach: a step's gradient ends at the state that it reads.

        Returns:
            One output a step.
        """
        one_step = partial(self._training_step, documents=documents)
        state, num_layers = self.start(features), len(self.layers)
        return run_steps(
            one_step, state, embeddings, num_layers=num_layers, recompute=recompute, mixing=mixing, detach=detach
        )

    def _training_step(
        self, state: Tensor, embedding: Tensor, past: Past, step: int, *, documents: Documents | None
    ) -> StepResult:
        rows = [TTTRows(step=step, past=layer_past, documents=documents) for layer_past in past]
        output = self.step(state, embedding, rows)
        return StepResult(output, tuple(each.steps[-1] for each in rows))

"""The part that EAGLE-1 and EAGLE-MTP share: join embedding and feature, run layers, feed the result back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from mcore_spec.config import BaseArchitecture, EagleConfig
from mcore_spec.drafts.draft import Draft, Reads
from mcore_spec.drafts.resolve import resolve_rope
from mcore_spec.drafts.steps import Mixing, Past, StepOutput, StepResult, run_steps
from mcore_spec.layers.decoder import DecoderLayer, LayerShape, init_linear_weights
from mcore_spec.parallel.documents import Documents
from mcore_spec.parallel.tensor_parallel import Placement


class RecurrentDraft(Draft):
    """A draft whose state has the form of the base's last hidden state; its head is the base's."""

    reads: ClassVar[Reads] = "last"
    reads_tokens: ClassVar[bool] = True

    def __init__(
        self, config: EagleConfig, base: BaseArchitecture, *, first_input_norm: bool, place: Placement
    ) -> None:
        """Allocate this rank's shard of the decoder layers.

        Args:
            config: resolved against `base`.
            base: the base model.
            first_input_norm: whether the first layer has an input norm.
            place: group, dtype and device.
        """
        super().__init__(tp=place.tp)
        self.architecture = config.eagle_architecture_config
        self.shape = LayerShape(self.architecture, base, resolve_rope(self.architecture, base))
        self.layers = nn.ModuleList(
            DecoderLayer(self.shape, input_norm=first_input_norm or index > 0, place=place)
            for index in range(self.architecture.num_hidden_layers)
        )

    def init_weights(self, *, seed: int) -> None:
        """Normal matrices with standard deviation ``initializer_range``; norms one."""
        init_linear_weights(self, std=self.architecture.initializer_range, seed=seed)

    def join(self, embedding: Tensor, state: Tensor) -> Tensor:
        """The input of the first layer."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """The new state from the last layer's output."""
        raise NotImplementedError

    def forward(
        self,
        features: Tensor,
        embeddings: Sequence[Tensor],
        *,
        documents: Documents | None = None,
        recompute: bool = False,
        mixing: Mixing | None = None,
    ) -> list[StepOutput]:
        """All TTT steps.

        Args:
            features: the base's last hidden state after its final norm [s or s/size, b, h].
            embeddings: one a step, [s or s/size, b, h]; row t of step k embeds token x[t+1+k].
            documents: of one packed row (b = 1), of which the tensors are this context-parallel rank's rows;
                ``None``: each of the b columns is one document.
            recompute: keep no activations of a step; run it again in backward.
            mixing: mix the draft's own states into the features instead of growing keys.

        Returns:
            One output a step; the head reads what is fed back.
        """
        one_step = partial(self._step, documents=documents)
        return run_steps(
            one_step, features, embeddings, num_layers=len(self.layers), recompute=recompute, mixing=mixing
        )

    def _step(
        self, state: Tensor, embedding: Tensor, past: Past, step: int, *, documents: Documents | None
    ) -> StepResult:
        grown = [list(layer_past) for layer_past in past]
        x = self.join(embedding, state)
        for layer, layer_past in zip(self.layers, grown, strict=True):
            x = layer(x, step=step, past=layer_past, documents=documents)
        state = self.finish(x)
        return StepResult(StepOutput(state, state), tuple(layer_past[-1] for layer_past in grown))

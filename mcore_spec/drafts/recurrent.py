"""The part that EAGLE-1 and EAGLE-MTP share: join embedding and feature, run layers, feed the result back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mcore_spec.drafts.draft import Draft, StepOutput
from mcore_spec.layers.attention import KeyValue
from mcore_spec.layers.decoder import DecoderLayer, LayerShape
from mcore_spec.parallel.tensor_parallel import TensorParallel


class RecurrentDraft(Draft):
    """A draft whose state has the form of the base's last hidden state; its head is the base's."""

    def __init__(self, *, tp: TensorParallel) -> None:
        """Remember the group.

        Args:
            tp: the tensor-parallel group.
        """
        super().__init__(tp=tp)
        self.layers: nn.ModuleList

    def join(self, embedding: Tensor, state: Tensor) -> Tensor:
        """The input of the first layer."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """The new state from the last layer's output."""
        raise NotImplementedError

    def forward(self, features: Tensor, embeddings: Sequence[Tensor]) -> list[StepOutput]:
        """All TTT steps.

        Args:
            features: the base's last hidden state after its final norm [s or s/size, b, h].
            embeddings: one a step, [s or s/size, b, h]; row t of step k embeds token x[t+1+k].

        Returns:
            One output a step; the head reads what is fed back.
        """
        state = features
        past: list[list[KeyValue]] = [[] for _ in self.layers]
        outputs = []
        for step, embedding in enumerate(embeddings):
            x = self.join(embedding, state)
            for layer, layer_past in zip(self.layers, past, strict=True):
                x = layer(x, step=step, past=layer_past)
            state = self.finish(x)
            outputs.append(StepOutput(state, state))
        return outputs


def decoder_layers(shape: LayerShape, num_layers: int, *, first_input_norm: bool, **args: Any) -> nn.ModuleList:
    """`num_layers` ordinary layers; the first may lack its input norm."""
    return nn.ModuleList(
        DecoderLayer(shape, input_norm=first_input_norm or index > 0, **args) for index in range(num_layers)
    )

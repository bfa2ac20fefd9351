"""The part that EAGLE-1 and EAGLE-MTP share: join embedding and feature, run layers, feed the result back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from mcore_spec.config import BaseArchitecture, EagleConfig
from mcore_spec.drafts.draft import Reads
from mcore_spec.drafts.resolve import resolve_rope
from mcore_spec.drafts.steps import StepOutput
from mcore_spec.drafts.stepwise import StepwiseDraft
from mcore_spec.layers.attention import Rows
from mcore_spec.layers.decoder import DecoderLayer, LayerShape, init_linear_weights
from mcore_spec.parallel.tensor_parallel import Placement


class RecurrentDraft(StepwiseDraft):
    """A draft whose state has the form of the base's last hidden state; its head is the base's."""

    reads: ClassVar[Reads] = "last"

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

    def start(self, features: Tensor) -> Tensor:
        """The base's last hidden state as it is."""
        return features

    def step(self, state: Tensor, embedding: Tensor, rows: Sequence[Rows]) -> StepOutput:
        """One step; the head reads what is fed back. Arguments as of `StepwiseDraft.step`."""
        x = self.join(embedding, state)
        for layer, layer_rows in zip(self.layers, rows, strict=True):
            x = layer(x, rows=layer_rows)
        state = self.finish(x)
        return StepOutput(state, state)

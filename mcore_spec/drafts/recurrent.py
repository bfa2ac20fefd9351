"""The part that EAGLE-1 and EAGLE-MTP share: join embedding and feature, run layers, feed the result back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mcore_spec.config import BaseArchitecture, EagleConfig
from mcore_spec.drafts.draft import Reads
from mcore_spec.drafts.linear_start import LinearMap
from mcore_spec.drafts.parallel_heads import build_parallel_heads
from mcore_spec.drafts.resolve import resolve_rope
from mcore_spec.drafts.steps import StepOutput
from mcore_spec.drafts.stepwise import StepwiseDraft
from mcore_spec.layers.attention import Rows
from mcore_spec.layers.decoder import DecoderLayer, LayerShape, init_linear_weights
from mcore_spec.layers.linear import ShardedLinear, project_sharded_columns
from mcore_spec.parallel.tensor_parallel import Placement


class Joined(NamedTuple):
    """The two halves of what the first layer is made from; each [s or s/size, b, h], or of a weight [h, h]."""

    embedding: Tensor
    state: Tensor


class RecurrentDraft(StepwiseDraft):
    """A draft whose state has the form of the base's last hidden state; its head is the base's.

    Attributes:
        state_comes_first: in the projection's columns.
    """

    reads: ClassVar[Reads] = "last"
    state_comes_first: ClassVar[bool] = False

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
        self.parallel_draft_heads = build_parallel_heads(self.architecture, base, place=place)

    def init_weights(self, *, seed: int) -> None:
        """Normal matrices with standard deviation ``initializer_range``; norms one, parallel heads the identity."""
        init_linear_weights(self, std=self.architecture.initializer_range, seed=seed)
        if self.parallel_draft_heads is not None:
            self.parallel_draft_heads.init_weights()

    @property
    def projection(self) -> ShardedLinear:
        """What joins embedding and state, [h, 2h]."""
        raise NotImplementedError

    def prepare(self, embedding: Tensor, state: Tensor) -> Joined:
        """Both as the projection reads them."""
        return Joined(embedding, state)

    def join(self, embedding: Tensor, state: Tensor) -> Tensor:
        """The input of the first layer."""
        joined = torch.cat(self._in_order(self.prepare(embedding, state)), dim=-1)
        return project_sharded_columns(self.projection, joined)

    def _in_order(self, joined: Joined) -> tuple[Tensor, Tensor]:
        """In the order of the projection's columns."""
        return (joined.state, joined.embedding) if self.state_comes_first else (joined.embedding, joined.state)

    def linear_inputs(self, features: Tensor, embedding: Tensor) -> Tensor:
        """What the projection reads, the state first, [s or s/size, b, 2h]."""
        joined = self.prepare(embedding, features)
        return torch.cat((joined.state, joined.embedding), dim=-1)

    @torch.no_grad()
    def linear_start(self, solution: LinearMap, final_norm: Tensor, *, seed: int) -> None:
        """Be the linear map: the projection is its solution, the layers add nothing, a last norm is the base's."""
        if self.last_norm is not None:
            self.last_norm.weight.copy_(final_norm)
        parts = self._in_order(Joined(solution.embedding, solution.features))
        self.projection.load_whole(self.before_last_norm(torch.cat(parts)).t())
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()

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

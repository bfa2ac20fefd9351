"""EAGLE-3 (Li et al., arXiv 2503.01840): hidden states of several base layers, trained over its own states.

The first decoder layer reads the embedding of the next token beside the hidden state; further layers
are ordinary. The head speaks a draft vocabulary, which may be a part of the base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mcore_spec.config import BaseArchitecture, EagleConfig
from mcore_spec.drafts.draft import Draft, Reads, StepOutput, draft_to_target
from mcore_spec.drafts.resolve import resolve_rope
from mcore_spec.layers.attention import KeyValue, TTTAttention
from mcore_spec.layers.decoder import DecoderLayer, LayerShape, gated_mlp, init_linear_weights
from mcore_spec.layers.linear import ShardedLinear, VocabularyHead, project_sharded_columns
from mcore_spec.layers.norm import RMSNorm
from mcore_spec.parallel.tensor_parallel import Placement


class Eagle3Layer(nn.Module):
    """The first decoder layer: attention over [norm(embedding) ; norm(hidden)], width 2h."""

    def __init__(
        self,
        shape: LayerShape,
        *,
        norm_before_residual: bool,
        place: Placement,
    ) -> None:
        """Allocate this rank's shard.

        Args:
            shape: whole sizes.
            norm_before_residual: the residual is the normed hidden state.
            place: group, dtype and device.
        """
        super().__init__()
        hidden = shape.hidden_size
        self.norm_before_residual = norm_before_residual
        self.input_layernorm = RMSNorm(hidden, eps=shape.eps, place=place)
        self.hidden_norm = RMSNorm(hidden, eps=shape.eps, place=place)
        self.self_attn = TTTAttention(shape.attention(input_size=2 * hidden), shape.rope, place=place)
        self.post_attention_layernorm = RMSNorm(hidden, eps=shape.eps, place=place)
        self.mlp = gated_mlp(shape, place=place)

    def forward(self, hidden: Tensor, embedding: Tensor, *, step: int, past: list[KeyValue]) -> Tensor:
        """One TTT step: two times [s or s/size, b, h] -> the same; appends to `past`."""
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        joined = torch.cat((self.input_layernorm(embedding), normed), dim=-1)
        x = residual + self.self_attn(joined, step=step, past=past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Eagle3Draft(Draft):
    """The EAGLE-3 module. Parameters are named as engines name them, but for ``midlayer``."""

    reads: ClassVar[Reads] = "aux"
    d2t: Tensor

    def __init__(self, config: EagleConfig, base: BaseArchitecture, *, place: Placement) -> None:
        """Allocate this rank's shard.

        Args:
            config: resolved against `base`.
            base: the base model.
            place: group, dtype and device.
        """
        super().__init__(tp=place.tp)
        architecture = config.eagle_architecture_config
        self.architecture = architecture
        self.aux_layer_ids = architecture.eagle_aux_hidden_state_layer_ids
        hidden, num_aux = base.hidden_size, len(self.aux_layer_ids)
        shape = LayerShape(architecture, base, resolve_rope(architecture, base))
        self.input_norm = RMSNorm(num_aux * hidden, eps=shape.eps, place=place) if architecture.norm_before_fc else None
        self.fc_norm = (
            nn.ModuleList(RMSNorm(hidden, eps=shape.eps, place=place) for _ in range(num_aux))
            if architecture.fc_norm
            else None
        )
        self.fc = ShardedLinear(num_aux * hidden, hidden, shard_dim=1, what="aux layers x hidden_size", place=place)
        first = Eagle3Layer(shape, norm_before_residual=architecture.norm_before_residual, place=place)
        further = [DecoderLayer(shape, place=place) for _ in range(architecture.num_hidden_layers - 1)]
        self.layers = nn.ModuleList([first, *further])
        self.norm = RMSNorm(hidden, eps=shape.eps, place=place)
        assert architecture.draft_vocab_size is not None
        self.has_reduced_vocabulary = architecture.draft_vocab_size < base.vocab_size
        owns_head = self.has_reduced_vocabulary or architecture.has_lm_head
        self.lm_head = VocabularyHead(hidden, architecture.draft_vocab_size, place=place) if owns_head else None
        if self.has_reduced_vocabulary:
            d2t = torch.full((architecture.draft_vocab_size,), -1, dtype=torch.int64, device=place.device)
            self.register_buffer("d2t", d2t)

    def own_heads(self) -> list[VocabularyHead]:
        """The draft's head, where it is not the base's."""
        return [] if self.lm_head is None else [self.lm_head]

    def head_token_ids(self) -> Tensor:
        """Base token id of each row of the head."""
        if self.has_reduced_vocabulary:
            return draft_to_target(self)
        assert self.lm_head is not None
        return torch.arange(self.lm_head.vocab_size, device=self.lm_head.weight.device)

    def init_weights(self, *, seed: int) -> None:
        """Normal matrices with standard deviation ``initializer_range``; norms one."""
        init_linear_weights(self, std=self.architecture.initializer_range, seed=seed)

    def fuse(self, aux: Tensor) -> Tensor:
        """Joined aux hidden states [s or s/size, b, n h] -> g_0, [s or s/size, b, h]."""
        if self.input_norm is not None:
            aux = self.input_norm(aux)
        if self.fc_norm is not None:
            parts = aux.chunk(len(self.fc_norm), dim=-1)
            aux = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return project_sharded_columns(self.fc, aux)

    def forward(self, features: Tensor, embeddings: Sequence[Tensor]) -> list[StepOutput]:
        """All TTT steps.

        Args:
            features: joined aux hidden states [s or s/size, b, n h]; row t is position t.
            embeddings: one a step, [s or s/size, b, h]; row t of step k embeds token x[t+1+k].

        Returns:
            One output a step.
        """
        state = self.fuse(features)
        past: list[list[KeyValue]] = [[] for _ in self.layers]
        outputs = []
        for step, embedding in enumerate(embeddings):
            x = self.layers[0](state, embedding, step=step, past=past[0])
            for layer, layer_past in zip(self.layers[1:], past[1:], strict=True):
                x = layer(x, step=step, past=layer_past)
            hidden = self.norm(x)
            state = hidden if self.architecture.norm_output else x
            outputs.append(StepOutput(hidden, state))
        return outputs

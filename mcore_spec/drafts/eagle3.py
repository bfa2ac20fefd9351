"""EAGLE-3 (Li et al., arXiv 2503.01840): hidden states of several base layers, trained over its own states.

The first decoder layer reads the embedding of the next token beside the hidden state; further layers
are ordinary. The head speaks a draft vocabulary, which may be a part of the base's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mcore_spec.config import BaseArchitecture, EagleConfig
from mcore_spec.drafts.draft import Reads
from mcore_spec.drafts.linear_start import Factors, LinearMap, factor
from mcore_spec.drafts.parallel_heads import build_parallel_heads
from mcore_spec.drafts.resolve import resolve_rope
from mcore_spec.drafts.steps import StepOutput
from mcore_spec.drafts.stepwise import StepwiseDraft
from mcore_spec.errors import ConfigError
from mcore_spec.layers.attention import Rows, TTTAttention
from mcore_spec.layers.decoder import DecoderLayer, LayerShape, gated_mlp, init_linear_weights
from mcore_spec.layers.init import full_normal
from mcore_spec.layers.linear import ShardedLinear, VocabularyHead, project_sharded_columns
from mcore_spec.layers.norm import RMSNorm
from mcore_spec.parallel.tensor_parallel import Placement

# Score of a row with itself at a least-squares start; others' are near zero, so that it has nearly all of the weight
# among hundreds (e^11.5 is 10^5).
SELF_SCORE = 11.5
# Weights of the first layer -> weights of the base's last one that a warm start takes for them.
_WARM_START = {
    "hidden_norm.weight": "input_layernorm.weight",
    "self_attn.o_proj.weight": "self_attn.o_proj.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.up_proj.weight": "mlp.up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}


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

    def forward(self, hidden: Tensor, embedding: Tensor, *, rows: Rows) -> Tensor:
        """Two times [s or s/size, b, h] -> the same; `rows` as of `TTTAttention`."""
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        joined = torch.cat((self.input_layernorm(embedding), normed), dim=-1)
        x = residual + self.self_attn(joined, rows=rows)
        return x + self.mlp(self.post_attention_layernorm(x))

    @property
    def num_values(self) -> int:
        """Numbers that all key/value heads pass on for a row."""
        shape = self.self_attn.shape
        return shape.num_kv_heads * shape.head_dim

    @torch.no_grad()
    def linear_start(self, values: Factors, *, seed: int) -> None:
        """Add embedding @ first @ second to the residual, as nearly as attention can: see `Eagle3Draft`'s."""
        attention, shape = self.self_attn, self.self_attn.shape
        heads, group = (shape.num_kv_heads, 1, shape.head_dim), shape.num_heads // shape.num_kv_heads
        attention.v_proj.load_whole(_reading_embedding(values.first.t()))
        output = values.second.unflatten(0, heads).expand(-1, group, -1, -1).flatten(0, 2)
        attention.o_proj.load_whole(output.t() / group)
        # Entries of a normed embedding have a mean square of about one.
        hidden_size = values.first.shape[0]
        std = math.sqrt(SELF_SCORE / math.sqrt(shape.head_dim) / hidden_size)
        key = full_normal((self.num_values, hidden_size), std=std, seed=seed, name="linear_start.key")
        query = key.unflatten(0, heads).expand(-1, group, -1, -1).flatten(0, 2)
        attention.k_proj.load_whole(_reading_embedding(key))
        attention.q_proj.load_whole(_reading_embedding(query))
        self.mlp.down_proj.weight.zero_()


class Eagle3Draft(StepwiseDraft):
    """The EAGLE-3 module. Parameters are named as engines name them, but for ``midlayer``."""

    label: ClassVar[str] = "EAGLE-3"
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
        self.reserve_vocabulary(architecture.draft_vocab_size, base_size=base.vocab_size, device=place.device)
        owns_head = self.has_reduced_vocabulary or architecture.has_lm_head
        self.lm_head = VocabularyHead(hidden, architecture.draft_vocab_size, place=place) if owns_head else None
        self.parallel_draft_heads = build_parallel_heads(architecture, base, place=place)

    @property
    def step_head(self) -> VocabularyHead | None:
        """The draft's, where it has one."""
        return self.lm_head

    def init_weights(self, *, seed: int) -> None:
        """Normal matrices with standard deviation ``initializer_range``; norms one, parallel heads the identity."""
        init_linear_weights(self, std=self.architecture.initializer_range, seed=seed)
        if self.parallel_draft_heads is not None:
            self.parallel_draft_heads.init_weights()

    def facts(self) -> list[str]:
        """Which layers it reads, how many tokens it knows."""
        layers = ", ".join(map(str, self.aux_layer_ids))
        vocabulary = f"draft vocabulary {self.architecture.draft_vocab_size:,}"
        return [f"aux layers {layers} (0-based, by output)", vocabulary, *super().facts()]

    @torch.no_grad()
    def scale_logits(self, head_row_norm: float) -> None:
        """Weights of the last norm such that the first logits have a standard deviation of about one.

        The loss of step 0 then starts near log(vocabulary), whatever the scale of head and aux hidden states. A
        power of two, so that the rounding of another layout makes no other weights. A head without numbers is left to
        training, which names the weight.
        """
        if not math.isfinite(head_row_norm) or head_row_norm == 0:
            return
        self.norm.weight.fill_(2.0 ** round(-math.log2(head_row_norm)))

    def can_warm_start(self, layer: Mapping[str, Tensor], base: BaseArchitecture) -> bool:
        """Whether the first layer has the sizes of the base's, its functions, and norms in the same places."""
        ours = self.architecture
        if ours.norm_before_residual or ours.norm_before_fc or ours.fc_norm or ours.attention_bias or ours.mlp_bias:
            return False
        if base.qkv_bias or base.qk_norm or resolve_rope(ours, base) != base.rope:
            return False
        return (ours.hidden_act, ours.rms_norm_eps) == (base.hidden_act, base.rms_norm_eps) and not self._misfits(layer)

    @torch.no_grad()
    def warm_start(self, layer: Mapping[str, Tensor], final_norm: Tensor) -> None:
        """The base's last decoder layer on the last aux hidden state: the base, shortened.

        Attention and MLP are the base's, the halves of q, k and v that read the embedding are zero, fc passes
        the last aux layer through, the norms are the base's.

        Raises:
            ConfigError: a layer of other sizes than the base's.
        """
        misfits = self._misfits(layer)
        if misfits:
            raise ConfigError(
                f"draft_init = base: {misfits[0]}; leave heads, head_dim and intermediate_size to follow the base, or "
                "choose draft_init = random"
            )
        for name, target in self._warm_started():
            target.copy_(layer[name])
        hidden_size = final_norm.shape[0]
        for name in ("q_proj", "k_proj", "v_proj"):
            self.layers[0].get_parameter(f"self_attn.{name}.weight")[:, :hidden_size].zero_()
        self.norm.weight.copy_(final_norm)
        whole = torch.zeros(hidden_size, self.fc.in_features)
        whole[:, -hidden_size:] = torch.eye(hidden_size)
        self.fc.load_whole(whole)

    def linear_inputs(self, features: Tensor, embedding: Tensor) -> Tensor:
        """What fc reads, and the normed embedding; [s or s/size, b, n h + h]."""
        return torch.cat((self._fc_input(features), self._first_layer().input_layernorm(embedding)), dim=-1)

    @torch.no_grad()
    def linear_start(self, solution: LinearMap, final_norm: Tensor, *, seed: int) -> None:
        """Be the linear map, but for what attention adds to it.

        fc is the features' part. The embedding's goes through value and output projection, whose rank it is cut to;
        query and key are one random projection of the embedding, by which a row sees itself before all others. MLPs
        and further layers are nothing, the last norm is the base's.

        Raises:
            ConfigError: the residual is the normed hidden state, whose length the map cannot use.
        """
        if self.architecture.norm_before_residual:
            raise ConfigError("fit_start needs norm_before_residual = false; leave it at 0")
        self.norm.weight.copy_(final_norm)
        self.fc.load_whole(self.before_last_norm(solution.features).t())
        first = self._first_layer()
        values = factor(solution, rank=first.num_values)
        first.linear_start(values._replace(second=self.before_last_norm(values.second)), seed=seed)
        for layer in self.layers[1:]:
            assert isinstance(layer, DecoderLayer)
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()

    @property
    def last_norm(self) -> RMSNorm:
        """The draft's own."""
        return self.norm

    @property
    def hands_on_size(self) -> bool:
        """Only where the state is normed too."""
        return self.architecture.norm_output

    def _first_layer(self) -> Eagle3Layer:
        first = self.layers[0]
        assert isinstance(first, Eagle3Layer)
        return first

    def _warm_started(self) -> list[tuple[str, Tensor]]:
        """Names in the base's layer, and the weights of the first layer that take their values."""
        first = self._first_layer()
        pairs: list[tuple[str, Tensor]] = [(theirs, first.get_parameter(ours)) for ours, theirs in _WARM_START.items()]
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = first.get_parameter(f"self_attn.{name}.weight")
            pairs.append((f"self_attn.{name}.weight", weight[:, weight.shape[1] // 2 :]))
        return pairs

    def _misfits(self, layer: Mapping[str, Tensor]) -> list[str]:
        found = []
        for name, target in self._warm_started():
            if name not in layer:
                found.append(f"the base's layer has no {name}")
            elif target.shape != layer[name].shape:
                shapes = f"{list(target.shape)}, of the base's layer {list(layer[name].shape)}"
                found.append(f"{name} of the draft is {shapes}")
        return found

    def start(self, features: Tensor) -> Tensor:
        """Joined aux hidden states [s or s/size, b, n h] -> g_0, [s or s/size, b, h]."""
        return project_sharded_columns(self.fc, self._fc_input(features))

    def _fc_input(self, features: Tensor) -> Tensor:
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return features

    def step(self, state: Tensor, embedding: Tensor, rows: Sequence[Rows]) -> StepOutput:
        """One step; arguments as of `StepwiseDraft.step`."""
        x = self.layers[0](state, embedding, rows=rows[0])
        for layer, layer_rows in zip(self.layers[1:], rows[1:], strict=True):
            x = layer(x, rows=layer_rows)
        hidden = self.norm(x)
        return StepOutput(hidden, hidden if self.architecture.norm_output else x)


def _reading_embedding(weight: Tensor) -> Tensor:
    """Columns for the embedding -> columns for [embedding ; hidden state], of which the second half is zero."""
    return torch.cat((weight, torch.zeros_like(weight)), dim=1)

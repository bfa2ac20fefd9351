"""The pre-norm decoder layer that drafts are stacked from."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from mcore_spec.config import BaseArchitecture, EagleArchitectureConfig, RopeConfig
from mcore_spec.layers.attention import AttentionShape, Rows, TTTAttention
from mcore_spec.layers.linear import ShardedLinear
from mcore_spec.layers.mlp import GatedMLP
from mcore_spec.layers.norm import RMSNorm
from mcore_spec.parallel.tensor_parallel import Placement

T = TypeVar("T")


class LayerShape:
    """Whole sizes of a draft's decoder layers, read off a resolved configuration and its base."""

    def __init__(self, architecture: EagleArchitectureConfig, base: BaseArchitecture, rope: RopeConfig) -> None:
        """Take the sizes.

        Args:
            architecture: resolved: no field is ``None``.
            base: the base model.
            rope: the draft's rotary embedding.
        """
        is_mtp = architecture.algorithm == "eagle-mtp"
        self.hidden_size = base.hidden_size
        self.intermediate_size = _given(architecture.intermediate_size)
        self.hidden_act = _given(architecture.hidden_act)
        self.mlp_bias = architecture.mlp_bias
        self.eps = _given(architecture.rms_norm_eps)
        self.rope = rope
        self._attention = AttentionShape(
            input_size=base.hidden_size,
            hidden_size=base.hidden_size,
            num_heads=_given(architecture.num_attention_heads),
            num_kv_heads=_given(architecture.num_key_value_heads),
            head_dim=_given(architecture.head_dim),
            eps=self.eps,
            # EAGLE-MTP repeats the base's own layer; the others are Llama layers in every engine.
            qkv_bias=architecture.attention_bias or (is_mtp and base.qkv_bias),
            output_bias=architecture.attention_bias,
            qk_norm=is_mtp and base.qk_norm,
        )

    def attention(self, *, input_size: int) -> AttentionShape:
        """Sizes of an attention block that reads vectors of `input_size`."""
        return self._attention._replace(input_size=input_size)


def _given(value: T | None) -> T:
    assert value is not None, "the architecture must be resolved against its base first"
    return value


class DecoderLayer(nn.Module):
    """u = x + attention(norm(x)); y = u + mlp(norm(u)); the first norm is optional (EAGLE-1)."""

    def __init__(
        self,
        shape: LayerShape,
        *,
        input_norm: bool = True,
        place: Placement,
    ) -> None:
        """Allocate this rank's shard.

        Args:
            shape: whole sizes.
            input_norm: whether there is a norm before attention.
            place: group, dtype and device.
        """
        super().__init__()
        hidden = shape.hidden_size
        self.input_layernorm = RMSNorm(hidden, eps=shape.eps, place=place) if input_norm else None
        self.self_attn = TTTAttention(shape.attention(input_size=hidden), shape.rope, place=place)
        self.post_attention_layernorm = RMSNorm(hidden, eps=shape.eps, place=place)
        self.mlp = gated_mlp(shape, place=place)

    def forward(self, x: Tensor, *, rows: Rows) -> Tensor:
        """[s or s/size, b, h] -> the same; arguments as of `TTTAttention`."""
        normed = x if self.input_layernorm is None else self.input_layernorm(x)
        x = x + self.self_attn(normed, rows=rows)
        return x + self.mlp(self.post_attention_layernorm(x))


def gated_mlp(shape: LayerShape, *, place: Placement) -> GatedMLP:
    """The MLP of a decoder layer of this shape."""
    return GatedMLP(
        shape.hidden_size,
        shape.intermediate_size,
        hidden_act=shape.hidden_act,
        bias=shape.mlp_bias,
        place=place,
    )


def init_linear_weights(module: nn.Module, *, std: float, seed: int) -> None:
    """Normal values for every `ShardedLinear` below `module`; norms keep their ones."""
    for name, child in module.named_modules():
        if isinstance(child, ShardedLinear):
            child.init_weights(name, std=std, seed=seed)

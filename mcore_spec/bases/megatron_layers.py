"""The parts of a `GPTModel` that megatron-core's local implementation lacks or gets wrong off CUDA.

Its norm refuses sequence parallelism, its attention builds [s, s] scores and ignores windows given per
layer, and its rotary embeddings cannot say every scaling. These classes have the constructors that
megatron-core's specs call.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn
from torch.nn import functional as F

from mcore_spec.config import RopeConfig
from mcore_spec.errors import UnsupportedError
from mcore_spec.layers.norm import rms_norm
from mcore_spec.layers.rotary import RotaryEmbedding

# Queries of a windowed layer are taken in blocks of this many rows, so that scores are [block, block +
# window] and not [s, s].
WINDOW_BLOCK = 512


class BaseRMSNorm(nn.Module):
    """RMSNorm with the constructor of megatron-core's norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        """Weight of ones, marked for megatron-core's gradient reduction under sequence parallelism."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return rms_norm(x, self.weight, self.eps)


class CausalAttention(nn.Module):
    """Causal grouped-query attention, optionally windowed, through torch's fused kernels."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        softmax_scale: float | None = None,
        **_unused: Any,
    ) -> None:
        """Take what megatron-core's `SelfAttention` passes.

        Raises:
            UnsupportedError: cross attention.
        """
        super().__init__()
        if attention_type != "self":
            raise UnsupportedError(f"attention_type = {attention_type!r}: only self attention is implemented")
        is_windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        # megatron-core keeps keys with q - k <= window_size[0].
        self.window = config.window_size[0] + 1 if is_windowed else None
        self.scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads d].

        Raises:
            UnsupportedError: an attention mask other than causal, or packed sequences.
        """
        if attention_mask is not None or options.get("packed_seq_params") is not None:
            raise UnsupportedError("attention_mask and packed_seq_params must be None: attention is causal")
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        length = q.shape[2]
        if self.window is None or self.window >= length:
            output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        else:
            blocks = [self._block(q, k, v, start) for start in range(0, length, WINDOW_BLOCK)]
            output = torch.cat(blocks, dim=2)
        return output.permute(2, 0, 1, 3).flatten(2)

    def _block(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        assert self.window is not None
        stop = min(start + WINDOW_BLOCK, q.shape[2])
        first_key = max(0, start - self.window + 1)
        distance = (
            torch.arange(start, stop, device=q.device)[:, None]
            - torch.arange(first_key, stop, device=q.device)[None, :]
        )
        visible = (distance >= 0) & (distance < self.window)
        keys, values = k[:, :, first_key:stop], v[:, :, first_key:stop]
        return F.scaled_dot_product_attention(
            q[:, :, start:stop], keys, values, attn_mask=visible, scale=self.scale, enable_gqa=True
        )


class BaseRotaryEmbedding(nn.Module):
    """Our rotary embedding with the interface of megatron-core's; every scaling has the one owner."""

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        """Compute the tables.

        Args:
            rope: base and scaling.
            head_dim: width of a head.
        """
        super().__init__()
        self.rotary = RotaryEmbedding(rope, head_dim)

    def forward(self, max_seq_len: int, offset: int = 0, **_unused: Any) -> Tensor:
        """Angles of positions offset..offset + max_seq_len - 1: [max_seq_len, 1, 1, head_dim] float32."""
        positions = torch.arange(offset, offset + max_seq_len, device=self.rotary.short.device)
        return self.rotary.angles(positions, sequence_length=offset + max_seq_len)[:, None, None, :]

    def get_rotary_seq_len(
        self,
        _inference_context: object,
        transformer: TransformerBlock,
        transformer_input: Tensor | None,
        config: TransformerConfig,
        _packed_seq_params: object = None,
    ) -> int:
        """Whole sequence length from this rank's part of the hidden states."""
        received: Tensor | None = transformer.input_tensor
        hidden = transformer_input if received is None else received
        assert hidden is not None, "the first stage has an embedding, the others a received tensor"
        shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
        return int(hidden.shape[0]) * shards


def local_block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Submodules of one pipeline stage's `TransformerBlock`, with our norm and attention."""
    from megatron.core.models.gpt.gpt_layer_specs import get_num_layers_to_build

    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = BaseRMSNorm
    layer.submodules.pre_mlp_layernorm = BaseRMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = BaseRMSNorm
        attention.k_layernorm = BaseRMSNorm
    layers: list[ModuleSpec] = [layer] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=BaseRMSNorm)


def transformer_engine_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """megatron-core's Transformer Engine layer."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)

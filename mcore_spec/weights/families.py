"""Names of the base's weights: one row a tensor, read in both directions.

The left name is megatron-core's (a `GPTModel` with the local layer spec), the right ones Hugging Face's.
``{i}`` is the layer, counted over the whole model on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from mcore_spec.config import BaseArchitecture, Family
from mcore_spec.errors import UnsupportedError
from mcore_spec.weights.cuts import Columns, Cut, GateUp, QueryKeyValue, Replicated, Vocabulary


class Row(NamedTuple):
    """One tensor of the base.

    Attributes:
        megatron: name in the `GPTModel`.
        stored: name or names in the files.
        cut: how the one becomes the other.
    """

    megatron: str
    stored: tuple[str, ...]
    cut: Cut


_REPLICATED, _COLUMNS, _VOCABULARY, _QKV, _GATE_UP = (
    Replicated(),
    Columns(),
    Vocabulary(),
    QueryKeyValue(),
    GateUp(),
)

_EMBEDDING = Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), _VOCABULARY)
_FINAL_NORM = Row("decoder.final_layernorm.weight", ("model.norm.weight",), _REPLICATED)
_HEAD = Row("output_layer.weight", ("lm_head.weight",), _VOCABULARY)

# Rows of a decoder layer, below "decoder.layers.{i}." and "model.layers.{i}.".
_LAYER = (
    Row("input_layernorm.weight", ("input_layernorm.weight",), _REPLICATED),
    Row("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), _COLUMNS),
    Row("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), _REPLICATED),
    Row("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), _COLUMNS),
)
_SEPARATE = (
    Row(
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        _QKV,
    ),
    Row("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), _GATE_UP),
)
_STACKED = (
    Row("self_attention.linear_qkv.weight", ("self_attn.qkv_proj.weight",), _QKV),
    Row("mlp.linear_fc1.weight", ("mlp.gate_up_proj.weight",), _GATE_UP),
)
_QKV_BIAS = (
    Row(
        "self_attention.linear_qkv.bias",
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        _QKV,
    ),
)
_QK_NORM = (
    Row("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), _REPLICATED),
    Row("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), _REPLICATED),
)

LAYER_ROWS: dict[Family, tuple[Row, ...]] = {
    "llama": _LAYER + _SEPARATE,
    "mistral": _LAYER + _SEPARATE,
    "phi3": _LAYER + _STACKED,
    "qwen2": _LAYER + _SEPARATE + _QKV_BIAS,
    "qwen3": _LAYER + _SEPARATE + _QK_NORM,
}

# Where files keep the decoder layers.
STORED_LAYERS = "model.layers."

# With Transformer Engine a norm lives in the linear layer behind it.
TRANSFORMER_ENGINE_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def base_rows(base: BaseArchitecture) -> Iterator[Row]:
    """Every tensor of the base, in the order in which files keep them."""
    yield _EMBEDDING
    for layer in range(base.num_layers if base.has_layers else 0):
        for row in LAYER_ROWS[hf_family(base)]:
            yield Row(
                f"decoder.layers.{layer}.{row.megatron}",
                tuple(f"{STORED_LAYERS}{layer}.{name}" for name in row.stored),
                row.cut,
            )
    yield _FINAL_NORM
    if not base.tie_word_embeddings:
        yield _HEAD


def stored_shapes(row: Row, base: BaseArchitecture) -> list[tuple[int, ...]]:
    """Whole shapes of a row's stored tensors; they follow from the architecture alone."""
    hidden = base.hidden_size
    query, kv = base.num_attention_heads * base.head_dim, base.num_key_value_heads * base.head_dim
    suffix = row.megatron.split(".", 3)[-1] if row.megatron.startswith("decoder.layers.") else row.megatron
    shapes: dict[str, list[tuple[int, ...]]] = {
        "embedding.word_embeddings.weight": [(base.vocab_size, hidden)],
        "output_layer.weight": [(base.vocab_size, hidden)],
        "self_attention.linear_proj.weight": [(hidden, query)],
        "mlp.linear_fc2.weight": [(hidden, base.intermediate_size)],
        "self_attention.linear_qkv.weight": [(query, hidden), (kv, hidden), (kv, hidden)],
        "self_attention.linear_qkv.bias": [(query,), (kv,), (kv,)],
        "mlp.linear_fc1.weight": [(base.intermediate_size, hidden)] * 2,
        "self_attention.q_layernorm.weight": [(base.head_dim,)],
        "self_attention.k_layernorm.weight": [(base.head_dim,)],
    }
    own = shapes.get(suffix, [(hidden,)])
    if len(row.stored) < len(own):
        own = [(sum(shape[0] for shape in own), *own[0][1:])]
    return own


def hf_family(base: BaseArchitecture) -> Family:
    """The family whose Hugging Face class has this base's features.

    Raises:
        UnsupportedError: none has.
    """
    if base.family != "megatron":
        return base.family
    if base.qkv_bias and base.qk_norm:
        raise UnsupportedError("qkv_bias and qk_norm together: no supported Hugging Face family has both")
    if base.qkv_bias:
        return "qwen2"
    if base.qk_norm:
        return "qwen3"
    if base.windowed_layers:
        raise UnsupportedError(
            "windowed_layers without qkv_bias or qk_norm: only Qwen windows some layers and not others"
        )
    return "llama" if base.window_size is None else "mistral"

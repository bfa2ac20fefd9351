"""Sizes of base models: from a Hugging Face ``config.json``, or from a table of well-known ones.

Read without transformers, so that a plan needs no torch. What decides numbers but not sizes (scaling of the rotary
embedding) is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mcore_spec.config import BaseArchitecture
from mcore_spec.config.base import HF_FAMILIES
from mcore_spec.errors import ConfigError, UnsupportedError

# Bases with experts. They are planned, though their weights cannot be read yet.
EXPERT_FAMILIES = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")


class Experts(NamedTuple):
    """The experts of a base, in every layer.

    Attributes:
        num: of a layer.
        active: that a token goes through.
        width: inner width of one.
    """

    num: int
    active: int
    width: int


class ModelShape(NamedTuple):
    """What a plan knows of a base.

    Attributes:
        name: for the report.
        architecture: its sizes.
        experts: ``None``: a dense base.
    """

    name: str
    architecture: BaseArchitecture
    experts: Experts | None = None


def _llama(name: str, sizes: tuple[int, ...], **more: Any) -> dict[str, Any]:
    layers, hidden, intermediate, heads, kv_heads, vocabulary = sizes
    return {
        "architectures": [name],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
        **more,
    }


# layers, hidden, MLP, query heads, key/value heads, vocabulary; from the models' own config.json.
_KNOWN: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _llama("LlamaForCausalLM", (16, 2048, 8192, 32, 8, 128256), head_dim=64, tie_word_embeddings=True),
    "llama-3.1-8b": _llama("LlamaForCausalLM", (32, 4096, 14336, 32, 8, 128256)),
    "llama-3.1-70b": _llama("LlamaForCausalLM", (80, 8192, 28672, 64, 8, 128256)),
    "llama-3.1-405b": _llama("LlamaForCausalLM", (126, 16384, 53248, 128, 8, 128256)),
    "mistral-7b": _llama("MistralForCausalLM", (32, 4096, 14336, 32, 8, 32768), max_position_embeddings=32768),
    "phi-3-mini": _llama(
        "Phi3ForCausalLM", (32, 3072, 8192, 32, 32, 32064), max_position_embeddings=4096, sliding_window=2047
    ),
    "qwen2.5-7b": _llama(
        "Qwen2ForCausalLM", (28, 3584, 18944, 28, 4, 152064), max_position_embeddings=32768, rms_norm_eps=1e-6
    ),
    "qwen2.5-72b": _llama(
        "Qwen2ForCausalLM", (80, 8192, 29568, 64, 8, 152064), max_position_embeddings=32768, rms_norm_eps=1e-6
    ),
    "qwen3-8b": _llama(
        "Qwen3ForCausalLM",
        (36, 4096, 12288, 32, 8, 151936),
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
    ),
    "qwen3-32b": _llama(
        "Qwen3ForCausalLM",
        (64, 5120, 25600, 64, 8, 151936),
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
    ),
    "mixtral-8x7b": _llama(
        "MixtralForCausalLM",
        (32, 4096, 14336, 32, 8, 32000),
        max_position_embeddings=32768,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "qwen3-30b-a3b": _llama(
        "Qwen3MoeForCausalLM",
        (48, 2048, 6144, 32, 4, 151936),
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    "qwen3-235b-a22b": _llama(
        "Qwen3MoeForCausalLM",
        (94, 4096, 12288, 64, 4, 151936),
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=1536,
    ),
}


def known_shapes() -> list[str]:
    """Names that `known_shape` takes."""
    return list(_KNOWN)


def known_shape(name: str) -> ModelShape:
    """One of the table."""
    return _describe(_KNOWN[name], name=name, where=name)


def read_shape(path: Path) -> ModelShape:
    """The sizes in a ``config.json``, or in the one of a directory.

    Raises:
        ConfigError: missing, no JSON, or without a size that is needed.
        UnsupportedError: an architecture that is not planned.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"pretrained_model_path = {path}: no such config.json; give the directory of a Hugging Face model or its "
            "config.json, or choose a --model-shape"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} holds a {type(raw).__name__}; it must hold an object")
    return _describe(raw, name=path.resolve().name if path.is_dir() else str(path), where=str(file))


def _describe(raw: Mapping[str, Any], *, name: str, where: str) -> ModelShape:
    architecture = (raw.get("architectures") or [None])[0]
    if architecture not in HF_FAMILIES and architecture not in EXPERT_FAMILIES:
        raise UnsupportedError(
            f"{where}: architectures = {architecture!r} is not planned; known: "
            f"{', '.join([*HF_FAMILIES, *EXPERT_FAMILIES])}"
        )
    family = HF_FAMILIES.get(architecture, "megatron")
    read = _Reader(raw, where)
    heads, hidden = read.size("num_attention_heads"), read.size("hidden_size")
    experts = _experts(read) if architecture in EXPERT_FAMILIES else None
    window, windowed = _windows(raw, family=family)
    base = BaseArchitecture.parse(
        {
            "family": family,
            "num_layers": read.size("num_hidden_layers"),
            "hidden_size": hidden,
            "intermediate_size": read.size("intermediate_size"),
            "num_attention_heads": heads,
            "num_key_value_heads": raw.get("num_key_value_heads") or heads,
            "head_dim": raw.get("head_dim") or hidden // heads,
            "vocab_size": read.size("vocab_size"),
            "max_position_embeddings": read.size("max_position_embeddings"),
            "rms_norm_eps": raw.get("rms_norm_eps", 1e-6),
            "hidden_act": raw.get("hidden_act", "silu"),
            "tie_word_embeddings": raw.get("tie_word_embeddings", False),
            "qkv_bias": family == "qwen2",
            "qk_norm": family == "qwen3" or architecture == "Qwen3MoeForCausalLM",
            "rope": {"theta": 10000.0},
            "window_size": window,
            "windowed_layers": windowed,
            "num_experts": None if experts is None else experts.num,
            "dtype": raw.get("dtype") or raw.get("torch_dtype") or "bfloat16",
        },
        where=where,
    )
    return ModelShape(name, base, experts)


def _windows(raw: Mapping[str, Any], *, family: str) -> tuple[int | None, tuple[bool, ...]]:
    window, kinds = raw.get("sliding_window"), raw.get("layer_types")
    if window is None or family == "llama" or (family != "mistral" and raw.get("use_sliding_window") is False):
        return None, ()
    if family in ("mistral", "phi3"):
        return window, ()
    windowed = tuple(kind == "sliding_attention" for kind in kinds or ())
    return (window, windowed) if any(windowed) else (None, ())


def _experts(read: _Reader) -> Experts:
    if read.raw.get("mlp_only_layers") or read.raw.get("decoder_sparse_step", 1) != 1:
        raise UnsupportedError(f"{read.where}: layers with and without experts in one model are not planned")
    own_width = "moe_intermediate_size" if "moe_intermediate_size" in read.raw else "intermediate_size"
    num = "num_experts" if "num_experts" in read.raw else "num_local_experts"
    return Experts(read.size(num), read.size("num_experts_per_tok"), read.size(own_width))


class _Reader(NamedTuple):
    """Sizes of a configuration, each of which must be there."""

    raw: Mapping[str, Any]
    where: str

    def size(self, field: str) -> int:
        """A whole number above 0.

        Raises:
            ConfigError: it is missing, or something else.
        """
        value = self.raw.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{self.where}: {field} = {value!r}; it must be a whole number above 0")
        return value

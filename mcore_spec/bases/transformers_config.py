"""A transformers configuration as our description of a base."""

from __future__ import annotations

from typing import Any, get_args

from transformers import AutoConfig, PreTrainedConfig

from mcore_spec.config import BaseArchitecture, DtypeName, Family, RopeConfig
from mcore_spec.config.base import HF_FAMILIES, RopeType
from mcore_spec.errors import ConfigError, UnsupportedError


def describe_hf(raw: dict[str, Any], *, where: str) -> BaseArchitecture:
    """Our description of a Hugging Face configuration; refuses by name what it cannot say exactly.

    Args:
        raw: ``config.json``.
        where: its place, for errors.

    Raises:
        UnsupportedError: another architecture, or a feature that is not represented.
        ConfigError: values that transformers refuses.
    """
    architecture = (raw.get("architectures") or [None])[0]
    if architecture not in HF_FAMILIES:
        raise UnsupportedError(
            f"{where}: architectures = {architecture!r} is not supported; supported: {', '.join(HF_FAMILIES)}"
        )
    family = HF_FAMILIES[architecture]
    config = _parse(raw, where=where)
    for field in ("attention_bias", "mlp_bias", "quantization_config"):
        if raw.get(field):
            raise UnsupportedError(f"{where}: {field} = {raw[field]!r} is not represented; use a model without it")
    window, windowed = _windows(config, family)
    return BaseArchitecture.parse(
        {
            "family": family,
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads or config.num_attention_heads,
            "head_dim": config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": config.rms_norm_eps,
            "hidden_act": config.hidden_act,
            "tie_word_embeddings": config.tie_word_embeddings,
            "qkv_bias": family == "qwen2",
            "qk_norm": family == "qwen3",
            "rope": _rope(config, where=where),
            "window_size": window,
            "windowed_layers": windowed,
            "dtype": _dtype(raw, where=where),
        },
        where=where,
    )


def _parse(raw: dict[str, Any], *, where: str) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(**raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: transformers refuses the configuration: {error}") from error


def _rope(config: PreTrainedConfig, *, where: str) -> RopeConfig:
    scaling = dict(config.rope_parameters)
    theta, rope_type = scaling.pop("rope_theta"), scaling.pop("rope_type", "default")
    if rope_type not in get_args(RopeType):
        raise UnsupportedError(
            f"{where}: rope_type = {rope_type!r} is not represented; supported: {', '.join(get_args(RopeType))}"
        )
    partial = scaling.pop("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise UnsupportedError(f"{where}: partial_rotary_factor = {partial} is not represented; it must be 1")
    scaling.pop("type", None)
    if rope_type == "longrope" and scaling.get("factor") is None:
        # transformers takes the ratio of the two lengths where no factor is written.
        scaling["factor"] = config.max_position_embeddings / scaling["original_max_position_embeddings"]
    if rope_type == "default":
        scaling = {}
    values = {"theta": theta, "rope_type": rope_type, "scaling": scaling}
    return RopeConfig.parse(values, where=f"{where}: rope_parameters")


def _windows(config: PreTrainedConfig, family: Family) -> tuple[int | None, tuple[bool, ...]]:
    """Window and windowed layers; a configuration keeps keys that its class does not read."""
    values = config.to_dict()
    window = None if family == "llama" else values["sliding_window"]
    if window is None:
        return None, ()
    if family not in ("qwen2", "qwen3"):
        return window, ()
    windowed = tuple(kind == "sliding_attention" for kind in values["layer_types"])
    return (window, windowed) if any(windowed) else (None, ())


def _dtype(raw: dict[str, Any], *, where: str) -> DtypeName:
    name = raw.get("dtype") or raw.get("torch_dtype")
    if name is None:
        raise ConfigError(f"{where}: no dtype (torch_dtype) is given; add the dtype of the stored weights to it")
    return name

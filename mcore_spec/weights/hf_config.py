"""Hugging Face's ``config.json`` and our description of a base, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from transformers import AutoConfig, PreTrainedConfig

from mcore_spec.config import BaseArchitecture, DtypeName, Family, RopeConfig
from mcore_spec.config.base import HF_FAMILIES, RopeType
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.weights.families import hf_family

# Files beside the weights that a checkpoint carries along, so that training and export need no source.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
HUB_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", *TOKENIZER_FILES)


def locate(path_or_hub_id: str, *, with_weights: bool = True) -> Path:
    """A local directory, or the snapshot of a hub repository (downloaded if it is not cached).

    Args:
        path_or_hub_id: either.
        with_weights: of a hub repository; otherwise its configuration and tokenizer alone.

    Raises:
        ConfigError: neither.
    """
    local = Path(path_or_hub_id)
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = HUB_PATTERNS if with_weights else ("config.json", *TOKENIZER_FILES)
    try:
        return Path(snapshot_download(path_or_hub_id, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"pretrained_model_path = {path_or_hub_id!r} is no local directory, and the hub did not give it "
            f"({reason}); check the name, or download the model first and give its directory"
        ) from error


def read_hf_config(directory: Path) -> dict[str, Any]:
    """``config.json`` as it is written.

    Raises:
        ConfigError: missing or no JSON.
    """
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{directory} has no config.json; give the directory of a Hugging Face model") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}; it must hold an object")
    return raw


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


def to_hf_config(base: BaseArchitecture) -> dict[str, Any]:
    """A ``config.json`` for a base that came without one (a Megatron-LM checkpoint).

    Raises:
        UnsupportedError: a combination of features that no family has.
    """
    family = hf_family(base)
    names = {ours: theirs for theirs, ours in HF_FAMILIES.items()}
    values: dict[str, Any] = {
        "architectures": [names[family]],
        "model_type": family,
        "hidden_size": base.hidden_size,
        "intermediate_size": base.intermediate_size,
        "num_hidden_layers": base.num_layers,
        "num_attention_heads": base.num_attention_heads,
        "num_key_value_heads": base.num_key_value_heads,
        "head_dim": base.head_dim,
        "hidden_act": base.hidden_act,
        "rms_norm_eps": base.rms_norm_eps,
        "vocab_size": base.vocab_size,
        "max_position_embeddings": base.max_position_embeddings,
        "tie_word_embeddings": base.tie_word_embeddings,
        "rope_parameters": base.rope.to_hf(),
        # The two spellings of transformers before version 5.
        "rope_theta": base.rope.theta,
        "rope_scaling": base.rope.to_hf() if base.rope.scaling else None,
        "dtype": base.dtype,
    }
    if base.window_size is not None:
        values["sliding_window"] = base.window_size
    if base.window_size is not None and family != "mistral":
        windowed = base.windowed_layers or (True,) * base.num_layers
        values["use_sliding_window"] = True
        values["layer_types"] = ["sliding_attention" if on else "full_attention" for on in windowed]
    return values

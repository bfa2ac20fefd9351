"""Hugging Face's ``config.json`` and our description of a base, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mcore_spec.bases.transformers_config import describe_hf
from mcore_spec.config import BaseArchitecture
from mcore_spec.config.base import HF_FAMILIES
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.hosting.key import QUANTIZATION_KEY
from mcore_spec.weights.families import hf_family

__all__ = [
    "MIMO_LAYERS",
    "TOKENIZER_FILES",
    "check_not_quantized",
    "describe_hf",
    "locate",
    "mtp_names",
    "read_hf_config",
    "to_hf_config",
    "without_mtp",
]

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
# Of the layers that MiMo's models have beside those of a Qwen2 model.
MIMO_LAYERS = "model.mtp_layers."
HUB_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", *TOKENIZER_FILES)


def locate(path_or_hub_id: str, *, with_weights: bool = True, field: str = "pretrained_model_path") -> Path:
    """A local directory, or the snapshot of a hub repository (downloaded if it is not cached).

    Args:
        path_or_hub_id: either.
        with_weights: of a hub repository; otherwise its configuration and tokenizer alone.
        field: what the user calls it.

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
            f"{field} = {path_or_hub_id!r} is no local directory, and the hub did not give it "
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


def check_not_quantized(raw: dict[str, Any], *, what: str) -> None:
    """Refuse what ``save_pretrained`` wrote of a quantised model: here its scales would be nobody's.

    Args:
        raw: ``config.json``.
        what: the user named, and how.

    Raises:
        UnsupportedError: it is.
    """
    if raw.get(QUANTIZATION_KEY):
        raise UnsupportedError(
            f"{what} is a quantised model ({QUANTIZATION_KEY} in its config.json), and its scales are read by "
            "from_pretrained alone; give the model that it was made from, and quantise that (mcore-spec quantize)"
        )


def without_mtp(raw: dict[str, Any]) -> dict[str, Any]:
    """A configuration of MiMo's as that of the Qwen2 model that it is without its layers for multi-token prediction.

    Others are given back as they are.
    """
    if not mtp_names(raw):
        return raw
    # Biases on q, k and v are what Qwen2 has; the code that comes with the model is not run.
    left_out = ("attention_bias", "auto_map", "num_nextn_predict_layers")
    plain = {name: value for name, value in raw.items() if name not in left_out}
    return {**plain, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def mtp_names(raw: dict[str, Any]) -> tuple[str, ...]:
    """Beginnings of the names of a base's own multi-token-prediction tensors; none where it has none."""
    return (MIMO_LAYERS,) if "MiMoForCausalLM" in (raw.get("architectures") or []) else ()


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

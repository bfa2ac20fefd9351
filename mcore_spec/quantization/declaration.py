"""What ``config.json`` and ``hf_quant_config.json`` say about quantised weights, in the two forms that engines read."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

from mcore_spec.config.quantization import BLOCK, QuantFormat, Recipe, Scheme
from mcore_spec.errors import UnsupportedError

# ModelOpt's names.
_ALGORITHMS = {"fp8": "FP8", "fp8_per_channel": "FP8_PER_CHANNEL_PER_TOKEN", "fp8_blockwise": "FP8_PB_WO"}
_KINDS = {"e4m3": "float", "int8": "int"}
HF_QUANT_CONFIG = "hf_quant_config.json"


def check_exportable(recipe: Recipe, form: QuantFormat) -> None:
    """Refuse a recipe that this form cannot say.

    Raises:
        UnsupportedError: it cannot.
    """
    if recipe.weight.number not in _KINDS:
        raise UnsupportedError(f"recipe {recipe.name} is for experiments: no engine reads it; choose another to export")
    if form == "modelopt" and recipe.name not in _ALGORITHMS:
        raise UnsupportedError(
            f"recipe {recipe.name} has no name in ModelOpt's form; give --export-quant-format compressed-tensors "
            "(quant_format from Python and in examples/hf)"
        )


def modelopt_file(recipe: Recipe, excluded: Sequence[str]) -> dict[str, Any]:
    """``hf_quant_config.json``."""
    return {
        "producer": _producer(),
        "quantization": {
            "quant_algo": _ALGORITHMS[recipe.name],
            "kv_cache_quant_algo": None if recipe.kv_cache is None else "FP8",
            "exclude_modules": list(excluded),
        },
    }


def quantization_config(recipe: Recipe, excluded: Sequence[str], *, form: QuantFormat) -> dict[str, Any]:
    """``quantization_config`` of ``config.json``.

    Args:
        recipe: of the model.
        excluded: linear maps that are not quantised, by the files' names.
        form: whose.
    """
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": _arguments(recipe.weight, form=form),
        "input_activations": _arguments(recipe.activation, form=form),
    }
    kv_cache = None if recipe.kv_cache is None else _arguments(recipe.kv_cache, form=form)
    common = {"ignore": list(excluded), "kv_cache_scheme": kv_cache, "config_groups": {"group_0": group}}
    if form == "modelopt":
        return {
            "quant_method": "modelopt",
            "quant_algo": _ALGORITHMS[recipe.name],
            "producer": _producer(),
            **common,
        }
    group["output_activations"] = None
    kind = _KINDS[recipe.weight.number]
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        **common,
    }


def _arguments(scheme: Scheme, *, form: QuantFormat) -> dict[str, Any]:
    values: dict[str, Any] = {"num_bits": 8, "type": _KINDS[scheme.number], "dynamic": scheme.is_dynamic}
    if form == "modelopt":
        return values
    values["symmetric"] = True
    if scheme.granularity != "block":
        return {**values, "strategy": scheme.granularity}
    if scheme.is_dynamic:
        return {**values, "strategy": "group", "group_size": BLOCK}
    return {**values, "strategy": "block", "block_structure": [BLOCK, BLOCK]}


def _producer() -> dict[str, str]:
    return {"name": "mcore_spec", "version": metadata.version("mcore-spec")}

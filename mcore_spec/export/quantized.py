"""The quantised part of an export: how weights are written, and what the directory says about it. Both or neither."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.config.quantization import BLOCK, QuantFormat, QuantizationRecord
from mcore_spec.conversion import find_algorithm
from mcore_spec.drafts.draft import Draft
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.export.plan import ExportPlan
from mcore_spec.layers.linear import ShardedLinear
from mcore_spec.quantization.declaration import HF_QUANT_CONFIG, check_exportable, modelopt_file, quantization_config
from mcore_spec.quantization.encodings import encodings_of
from mcore_spec.quantization.installed import Quantization, quantization_of
from mcore_spec.quantization.targets import is_linear_weight, is_meant
from mcore_spec.weights.draft_names import stored_name
from mcore_spec.weights.encoding import Encodings
from mcore_spec.weights.families import base_rows, stored_shapes

DEFAULT_FORM: QuantFormat = "modelopt"
_WEIGHT = ".weight"
_HEAD = "lm_head"


class QuantizedExport(NamedTuple):
    """What quantisation adds to a directory.

    Attributes:
        encodings: of weights, by the files' names.
        config: fields of ``config.json``.
        files: further files, name -> text.
    """

    encodings: Encodings
    config: dict[str, Any]
    files: dict[str, str]


UNQUANTIZED = QuantizedExport({}, {}, {})


def check_form(record: CheckpointRecord, form: QuantFormat | None) -> None:
    """Refuse a form that was asked for and cannot be written, before any weight is read.

    Args:
        record: of the checkpoint.
        form: that was asked for; ``None``: none was.

    Raises:
        ConfigError: a checkpoint that is not quantised.
        UnsupportedError: a recipe that the form cannot say.
    """
    if record.quantization is not None:
        check_exportable(record.quantization.recipe, form or DEFAULT_FORM)
    elif form is not None:
        raise ConfigError(f"export_quant_format = {form!r}: the checkpoint is not quantised; leave it out")


def quantized_base(model: nn.Module, record: CheckpointRecord, form: QuantFormat) -> QuantizedExport:
    """What is added to the base's directory; every rank can tell without communication.

    Raises:
        UnsupportedError: what no engine would read.
    """
    quantization = quantization_of(model)
    if quantization is None:
        return UNQUANTIZED
    recipe = quantization.record.recipe
    stored, excluded, widths = {}, [], {}
    for row in base_rows(record.base):
        name = row.megatron.removesuffix(_WEIGHT)
        if not is_linear_weight(row.megatron):
            continue
        stored[name] = row.stored
        if is_meant(name, recipe):
            widths[name] = stored_shapes(row, record.base)[0][1]
        else:
            excluded += [weight.removesuffix(_WEIGHT) for weight in row.stored]
    if not widths:
        if recipe.kv_cache is not None:
            raise UnsupportedError(
                f"recipe {recipe.name} leaves every linear map of the base alone and quantises its keys and values: no "
                "declaration says that; leave --export-kv-cache-quant out, or include the base"
            )
        return UNQUANTIZED
    _check_widths(quantization.record, widths)
    return _declared(quantization, stored, [_HEAD, *excluded], form)


def quantized_draft(
    model: nn.Module, draft: Draft, plan: ExportPlan, record: CheckpointRecord, form: QuantFormat
) -> QuantizedExport:
    """What is added to the draft's directory, on the last stage.

    Raises:
        UnsupportedError: a form in which engines read no scales, or layers that are quantised in part.
    """
    quantization = quantization_of(model)
    if quantization is None:
        return UNQUANTIZED
    assert record.conversion is not None
    child, recipe = find_algorithm(record.conversion.algorithm).child_name, quantization.record.recipe
    linears = {
        f"{child}.{name}": (module, stored_name(plan.table, f"{name}{_WEIGHT}"))
        for name, module in draft.named_modules()
        if isinstance(module, ShardedLinear)
    }
    meant = [name for name in linears if is_meant(name, recipe)]
    if not meant:
        return UNQUANTIZED
    if not plan.can_be_quantized:
        raise UnsupportedError(
            f"{draft.label} in this form: engines read no scales there; quantise the base alone (--quant-exclude "
            f"'{child}.*'), or choose --export-format hf for a draft that has one"
        )
    excluded = [stored.removesuffix(_WEIGHT) for name, (_, stored) in linears.items() if name not in meant]
    if any("." in name for name in excluded):
        raise UnsupportedError(
            f"{excluded[-1]} of the draft is not quantised and others of its layers are: engines number a draft's "
            f"layers behind the base's and would not find it by its name; quantise all of {child}.layers.* or none"
        )
    _check_widths(quantization.record, {name: linears[name][0].in_features for name in meant})
    stored = {name: (weight,) for name, (_, weight) in linears.items()}
    if form == "compressed-tensors":
        # vLLM compares whole names, and in its draft such a map is one of `model`.
        excluded += [f"model.{name}" for name in excluded]
    return _declared(quantization, stored, [_HEAD, *excluded], form)


def _check_widths(record: QuantizationRecord, widths: Mapping[str, int]) -> None:
    """Engines' kernels for blocks take whole ones of the inputs."""
    partial = [name for name, width in widths.items() if width % BLOCK]
    if record.recipe.weight.granularity == "block" and partial:
        raise UnsupportedError(
            f"recipe {record.recipe.name}: the {widths[partial[0]]} inputs of {partial[0]} are no multiple of {BLOCK}, "
            "which engines need; quantise with another recipe"
        )


def _declared(
    quantization: Quantization, stored: Mapping[str, tuple[str, ...]], excluded: list[str], form: QuantFormat
) -> QuantizedExport:
    recipe = quantization.record.recipe
    check_exportable(recipe, form)
    files = {}
    if form == "modelopt":
        files[HF_QUANT_CONFIG] = json.dumps(modelopt_file(recipe, excluded), indent=2) + "\n"
    config = {"quantization_config": quantization_config(recipe, excluded, form=form)}
    return QuantizedExport(encodings_of(quantization, stored, form=form), config, files)

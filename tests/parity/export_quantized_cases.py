"""What the ranks do in `test_export_quantized`: quantise a base with a draft, export both, and compute with both."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.megatron_build import BaseGPTModel
from mcore_spec.checkpoint.store import make_record
from mcore_spec.config import BaseIdentity
from mcore_spec.config.quantization import QuantFormat, Recipe
from mcore_spec.errors import McoreSpecError
from mcore_spec.export.base import export_base_and_draft
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.quantization.calibrate import quantize
from mcore_spec.quantization.installed import quantization_of
from mcore_spec.weights.hf_import import local_rows
from tests.parity.export_cases import converted, draft_aux_ids, module_outputs, whole_logits


def see(token_ids: Tensor, model: BaseGPTModel) -> None:
    """A calibration on the tokens that are computed afterwards."""
    module_outputs(model, token_ids)


def quantized_model(
    base_directory: Path, layout: Layout, mode: Any, d2t: Tensor | None, recipe: Recipe, token_ids: Tensor
) -> tuple[BaseGPTModel, BaseIdentity]:
    model, record = converted(base_directory, layout, mode, d2t)
    loop = None
    if recipe.is_calibrated:
        loop = partial(see, token_ids) if mode is not None else partial(_see_base, token_ids)
    return quantize(model, recipe, loop), record.identity


def _see_base(token_ids: Tensor, model: BaseGPTModel) -> None:
    MegatronBase(model).features(token_ids)


def export_quantized(
    base_directory: Path,
    directory: Path,
    layout: Layout,
    mode: Any,
    d2t: Tensor | None,
    recipe: Recipe,
    form: QuantFormat | None,
    token_ids: Tensor,
) -> dict[str, Any] | None:
    """Export base and draft; on the last stage, what the modules say about `token_ids`."""
    with parallel_runtime(layout):
        model, identity = quantized_model(base_directory, layout, mode, d2t, recipe, token_ids)
        record = make_record(model, identity)
        export_base_and_draft(model, record, directory, tokenizer_path=base_directory / "none", quant_format=form)
        base = MegatronBase(model)
        with torch.no_grad():
            features = base.features(token_ids, aux_layer_ids=draft_aux_ids(model) if mode is not None else ())
            logits = None if features is None else whole_logits(base, base.logits(features.last), 103)
            outputs = module_outputs(model, token_ids) if mode is not None else None
        return None if logits is None else {"base": logits, "draft": outputs, "weights": stored_weights(model)}


def stored_weights(model: BaseGPTModel) -> dict[str, Tensor]:
    """Fake-quantised weights of this stage under the files' names; whole where one rank holds all."""
    quantization = quantization_of(model)
    assert quantization is not None
    found = {}
    for row, _, tensor in local_rows(model, MegatronBase(model).architecture):
        linear = row.megatron.removesuffix(".weight")
        if linear in quantization.targets:
            with torch.no_grad():
                tensor = quantization.of(linear).weight(tensor)
            parts = row.cut.join([tensor], len(row.stored), MegatronBase(model).architecture)
            found |= dict(zip(row.stored, parts, strict=True))
    return found


def refused(
    base_directory: Path, directory: Path, mode: Any, recipe: Recipe, form: QuantFormat | None, token_ids: Tensor
) -> str:
    """The message of an export that must not be written."""
    with parallel_runtime(Layout()):
        try:
            export_quantized_here(base_directory, directory, mode, recipe, form, token_ids)
        except McoreSpecError as error:
            return f"{type(error).__name__}: {error}"
    return "not refused"


def export_quantized_here(
    base_directory: Path, directory: Path, mode: Any, recipe: Recipe, form: QuantFormat | None, token_ids: Tensor
) -> None:
    model, identity = quantized_model(base_directory, Layout(), mode, None, recipe, token_ids)
    record = make_record(model, identity)
    export_base_and_draft(model, record, directory, tokenizer_path=base_directory / "none", quant_format=form)

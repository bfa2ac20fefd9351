"""What the ranks do for `test_quantization.py`: a tiny base with a draft, quantised in some layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.checkpoint.store import find_checkpoint, load_checkpoint, make_record, save_checkpoint
from mcore_spec.config.quantization import KV_CACHE_FP8, CalibrationMethod, GradientScaling, Recipe, find_recipe
from mcore_spec.conversion import convert
from mcore_spec.data.batch import make_batch
from mcore_spec.errors import McoreSpecError
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.parallel.sharding import gather_whole, sharded_tensors
from mcore_spec.quantization.calibrate import quantize
from mcore_spec.quantization.installed import quantization_of
from mcore_spec.quantization.modes import compute_in_fp8, learn_scales, round_weights
from mcore_spec.training.step import DraftStep
from tests.parallel.checkpoint_cases import identity
from tests.parallel.trainer_cases import CORPUS, see_corpus
from tests.tiny import fill, import_base


def drafted(directory: Path, layout: Layout) -> GPTModel:
    model = import_base(directory, layout).model
    convert(model, [("eagle", {})])
    draft = MegatronBase(model).draft()
    if draft is not None:
        fill(draft, MegatronBase(model).tp)
    return model


def recipe_of(name: str, *, with_kv: bool) -> Recipe:
    return find_recipe(name).model_copy(update={"kv_cache": KV_CACHE_FP8 if with_kv else None})


def quantized(directory: Path, layout: Layout, recipe: Recipe, method: CalibrationMethod = "max") -> GPTModel:
    return quantize(
        drafted(directory, layout), recipe, see_corpus if recipe.is_calibrated else None, calibration=method
    )


def whole_scales(model: GPTModel) -> dict[str, Tensor]:
    """Every scale of this rank's stage, whole."""
    quantization = quantization_of(model)
    assert quantization is not None
    return {
        entry.name.replace("/", "."): gather_whole(entry.tensor, entry.shard, quantization.tp).clone()
        for entry in sharded_tensors(quantization)
    }


def loss_and_gradients(model: GPTModel) -> dict[str, Any] | None:
    """Of a packed row of two documents, whole; where the draft is."""
    step = DraftStep(model)
    draft = step.draft
    batch = make_batch(
        [CORPUS.document(0), CORPUS.document(1)],
        num_steps=step.num_steps,
        document_multiple=step.document_multiple,
        row_multiple=step.row_multiple,
        num_samples=1,
    )
    output = step(batch)
    if output is None or draft is None:
        return None
    output.loss.backward()
    gradients = {
        entry.name: gather_whole(entry.tensor.grad, entry.shard, draft.tp)
        for entry in sharded_tensors(draft)
        if entry.tensor.grad is not None
    }
    return {"loss": output.loss.detach(), "gradients": gradients}


def teachers(*, directory: Path, layout: Layout, recipe: Recipe) -> dict[str, Any] | None:
    """The loss with either teacher, and what the other one is: last hidden states before and after quantisation."""
    with parallel_runtime(layout):
        plain = drafted(directory, layout)
        batch = make_batch([CORPUS.document(0)], num_steps=3, row_multiple=2, num_samples=1)
        with torch.no_grad():
            before = DraftStep(plain).run_base(batch).features
            model = quantize(plain, recipe, see_corpus if recipe.is_calibrated else None)
            losses = [DraftStep(model, teacher=teacher)(batch) for teacher in ("as_loaded", "unquantized")]
            features = DraftStep(model, teacher="unquantized").run_base(batch).features
        if before is None or features is None:
            return None
        return {
            "losses": [float(loss.loss) for loss in losses if loss is not None],
            "is the one before": features.teacher is not None and torch.equal(features.teacher, before.last),
            "is another": not torch.equal(features.last, before.last),
        }


def rounded_once(*, directory: Path, layout: Layout, recipe: Recipe) -> list[float] | None:
    """The loss with weights that are rounded in each pass, and with such as were rounded before."""
    with parallel_runtime(layout):
        model = quantized(directory, layout, recipe)
        batch = make_batch([CORPUS.document(0)], num_steps=3, row_multiple=2, num_samples=1)
        with torch.no_grad():
            before = DraftStep(model)(batch)
            round_weights(model)
            after = DraftStep(model)(batch)
        return None if before is None or after is None else [float(before.loss), float(after.loss)]


def trained_in(*, directory: Path, layout: Layout, name: str, scaling: GradientScaling | None) -> dict[str, Any]:
    """Loss and gradients of draft and learned scales, by FP8 products if a scaling is given."""
    with parallel_runtime(layout):
        model = quantized(directory, layout, recipe_of(name, with_kv=True))
        learn_scales(model)
        quantization = quantization_of(model)
        assert quantization is not None
        quantization.double()
        compute_in_fp8(model, scaling)
        found = loss_and_gradients(model)
        if found is not None:
            found["scales"] = {
                entry.name: gather_whole(entry.tensor.grad, entry.shard, quantization.tp)
                for entry in sharded_tensors(quantization)
                if entry.tensor.grad is not None
            }
            found["learned"] = [name for name, _ in quantization.named_parameters(remove_duplicate=False)]
        return found or {}


def modes_refused(*, directory: Path, layout: Layout, recipe: Recipe | None, scaling: GradientScaling) -> str | None:
    """What FP8 products say of a model with these sizes."""
    with parallel_runtime(layout):
        model = drafted(directory, layout) if recipe is None else quantized(directory, layout, recipe)
        try:
            compute_in_fp8(model, scaling)
        except McoreSpecError as error:
            return str(error)
        return None


def quantize_in(
    *, directory: Path, layout: Layout, recipe: Recipe, method: CalibrationMethod = "max", save: Path | None = None
) -> dict[str, Any]:
    """Scales, loss and gradients of the quantised model; it is saved too, if that is wanted."""
    with parallel_runtime(layout):
        model = quantized(directory, layout, recipe, method)
        if save is not None:
            save_checkpoint(model, save, make_record(model, identity("llama")))
        return {"scales": whole_scales(model), "step": loss_and_gradients(model)}


def load_in(*, directory: Path, layout: Layout) -> dict[str, Any]:
    """The same of what was saved."""
    with parallel_runtime(layout):
        model = load_checkpoint(find_checkpoint(directory), layout)
        return {"scales": whole_scales(model), "step": loss_and_gradients(model)}


def refused(*, directory: Path, layout: Layout, recipe: Recipe, poison: str | None = None) -> str | None:
    """What `quantize` says; with `poison` one weight of one rank alone holds NaN."""
    with parallel_runtime(layout):
        model = drafted(directory, layout)
        if poison is not None and MegatronBase(model).tp.rank == 0:
            with torch.no_grad():
                dict(model.named_parameters())[poison].view(-1)[0] = float("nan")
        before = str(model)
        try:
            quantize(model, recipe, see_corpus if recipe.is_calibrated else None)
        except McoreSpecError as error:
            assert str(model) == before
            return str(error)
        return None

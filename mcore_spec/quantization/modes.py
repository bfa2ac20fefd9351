"""How a quantised model is used: FP8 products in the place of emulation, learned scales, weights rounded for good."""

from __future__ import annotations

import torch
from torch import nn

from mcore_spec.config.quantization import BLOCK, Float8Backend, GradientScaling
from mcore_spec.conversion import as_base
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.parallel.float8 import MULTIPLE, float8_product
from mcore_spec.parallel.layout import run_on_every_rank
from mcore_spec.quantization.gradients import GradientQuantizer, gradient_quantizer
from mcore_spec.quantization.installed import Quantization, quantization_of
from mcore_spec.quantization.learned import add_learned_scales
from mcore_spec.quantization.scales import reduce_max
from mcore_spec.quantization.targets import groups_of


def compute_in_fp8(
    model: nn.Module, scaling: GradientScaling | None, *, backend: Float8Backend = "auto", is_resumed: bool = False
) -> None:
    """Let the linear maps of a quantised model multiply FP8 numbers; every rank must call.

    Args:
        model: quantised, this rank's part.
        scaling: how scales of gradients are found; ``None``: emulate, as a model does at first.
        backend: of the products.
        is_resumed: what delayed scales have seen was loaded.

    Raises:
        ConfigError: a model that is not quantised, or not to FP8; delayed scales of rows; a backend that is not there.
        UnsupportedError: sizes or a device that cannot.
    """
    quantization = _quantization(model, "fp8_compute = true")
    quantization.product = None
    quantization.record = quantization.record.model_copy(update={"gradient_scaling": scaling})
    recipe = quantization.record.recipe
    if scaling is not None:
        if not recipe.is_fp8:
            raise ConfigError(
                f"fp8_compute = true: recipe {recipe.name} has no FP8 numbers; leave it out, or quantise with fp8, "
                "fp8_per_channel or fp8_blockwise"
            )
        if scaling == "delayed" and recipe.gradient.granularity != "tensor":
            raise ConfigError(
                f"fp8_gradient_scaling = delayed: recipe {recipe.name} has a scale for each row of a gradient, and "
                "rows are others in each step; choose current, or recipe fp8"
            )
        run_on_every_rank(lambda: _check_sizes(quantization))
        device = next(model.parameters()).device
        quantization.product = run_on_every_rank(lambda: float8_product(backend, device))
    for target, quantizer in quantization.linear_quantizers():
        if not (is_resumed and quantizer.gradient is not None):
            quantizer.gradient = gradient_quantizer(target, quantization.record)


def _check_sizes(quantization: Quantization) -> None:
    block = quantization.record.recipe.activation.granularity == "block"
    for target, _ in quantization.linear_quantizers():
        rows, columns = target.weight.shape
        multiple = BLOCK if block else MULTIPLE
        if rows % MULTIPLE or columns % multiple:
            raise UnsupportedError(
                f"fp8_compute = true: {target.name} has {rows} outputs and {columns} inputs on a rank; FP8 products "
                f"take multiples of {MULTIPLE} outputs and {multiple} inputs: leave it out, choose another "
                "tensor_model_parallel_size, or quantise without it (--quant-exclude)"
            )


def learn_scales(model: nn.Module) -> None:
    """Let training change the draft's scales; every rank must call, before the optimizer is made.

    Raises:
        ConfigError: a model that is not quantised, or whose draft is not.
    """
    quantization = _quantization(model, "learn_scales = true")
    draft = as_base(model).draft()
    if not quantization.record.has_learned_scales and draft is not None:
        add_learned_scales(draft, quantization.linear_quantizers(), quantization.attention_quantizers())
    quantization.record = quantization.record.model_copy(update={"has_learned_scales": True})

    def check() -> None:
        if draft is not None and not any(True for _ in quantization.parameters()):
            raise ConfigError("learn_scales = true: no linear map of the draft is quantised; leave it out")

    run_on_every_rank(check)
    quantization.requires_grad_(True)


@torch.no_grad()
def round_weights(model: nn.Module) -> None:
    """Round a quantised model's weights once, in place, and not in each forward pass any more.

    For models that only compute from now on: results are the same bit for bit; the weights before are lost.
    """
    quantization = quantization_of(model)
    if quantization is None or quantization.has_rounded_weights:
        return
    for target, quantizer in quantization.linear_quantizers():
        target.weight.copy_(quantizer.weight(target.weight))
    quantization.has_rounded_weights = True


def finish_step(model: nn.Module) -> None:
    """Let delayed scales know what the step's gradients were, on all ranks alike; every rank must call."""
    quantization = quantization_of(model)
    if quantization is None or quantization.product is None or quantization.record.gradient_scaling != "delayed":
        return
    delayed = [module for module in quantization.modules() if isinstance(module, GradientQuantizer)]
    seen = torch.cat([each.seen for each in delayed])
    for group in groups_of(model):
        seen = reduce_max(seen, group)
    for each, largest in zip(delayed, seen.split(1), strict=True):
        each.finish_step(largest)


def _quantization(model: nn.Module, what: str) -> Quantization:
    quantization = quantization_of(model)
    if quantization is None:
        raise ConfigError(f"{what}: the model is not quantised; quantise it first, or leave it out")
    return quantization

"""Quantising a model: its weights are measured, and what its activations are is seen in a forward loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mcore_spec.config.quantization import CalibrationMethod, QuantizationRecord, Recipe, find_recipe
from mcore_spec.errors import ConfigError
from mcore_spec.parallel.collectives import group_size
from mcore_spec.parallel.layout import run_on_every_rank
from mcore_spec.quantization.installed import Quantization, install, remove, unquantized
from mcore_spec.quantization.observers import Histogram, Largest
from mcore_spec.quantization.quantizers import ActivationQuantizer
from mcore_spec.quantization.scales import reduce_max
from mcore_spec.quantization.targets import family_of, groups_of

ForwardLoop = Callable[[Any], object]
Model = TypeVar("Model", bound=nn.Module)


def quantize(
    model: Model,
    recipe: str | Recipe,
    forward_loop: ForwardLoop | None = None,
    *,
    calibration: CalibrationMethod = "max",
    num_conversations: int = 0,
) -> Model:
    """Quantise `model` in place: from now on it computes as an engine with its quantised weights would.

    Weights stay as they are and are quantised where they are used, so that a draft can go on learning. Every rank of
    the model must call.

    Args:
        model: a megatron-core `GPTModel`, this rank's part, or a transformers model; with its draft, if it has one.
        recipe: a name, such as ``"fp8"``, or a `Recipe`.
        forward_loop: runs the model on the conversations that scales of activations are found on; called with the
            model, twice unless `calibration` is "max". Only a recipe with such scales takes one.
        calibration: "max": nothing is cut off; "percentile": all but a ten-thousandth of the values is kept; "mse": the
            cut with the least squared error. Of activations: weights are never cut.
        num_conversations: for the record.

    Returns:
        The same object.

    Raises:
        ConfigError: an unknown recipe, a pattern that matches nothing, a model that is quantised already, a calibration
            that ran nothing or met NaN or infinity, or one that is not needed.
        UnsupportedError: layers that cannot be quantised.
    """
    chosen = find_recipe(recipe) if isinstance(recipe, str) else recipe
    if chosen.is_calibrated and forward_loop is None:
        raise ConfigError(f"recipe {chosen.name} has scales of activations: give conversations to find them on")
    if not chosen.is_calibrated and (forward_loop is not None or calibration != "max"):
        raise ConfigError(f"recipe {chosen.name} computes its scales anew for each activation: leave calibration out")
    record = QuantizationRecord(recipe=chosen, calibration=calibration, num_conversations=num_conversations)
    quantization = install(model, record)
    is_done = False
    try:
        _measure_weights(quantization)
        if forward_loop is not None:
            with unquantized(model), torch.no_grad():
                _calibrate(model, quantization, forward_loop)
        is_done = True
    finally:
        if not is_done:
            remove(model)
    return model


def _measure_weights(quantization: Quantization) -> None:
    """Scales of weights; linear maps that engines join into one have one scale, as those would make of several."""
    measured = [
        (target, quantizer.weight, quantizer.weight.amax(target.weight))
        for target, quantizer in quantization.linear_quantizers()
    ]

    def check() -> None:
        for target, _, amax in measured:
            largest = torch.cat([each.flatten() for each in amax])
            _check_finite(f"the weight of {target.name}", largest)
            if target.weight.requires_grad and not bool(largest.any()):
                raise ConfigError(
                    f"the weight of {target.name} is zero everywhere, and has no size to be rounded by; train the "
                    "draft first, or leave it out (--quant-exclude)"
                )

    run_on_every_rank(check)
    joined: dict[str, Tensor] = {}
    for target, weight, amax in measured:
        if weight.scheme.granularity == "tensor":
            family = family_of(target.name)
            joined[family] = torch.maximum(amax[0], joined.get(family, amax[0]))
    for target, weight, amax in measured:
        weight.set_amax([joined[family_of(target.name)]] if weight.scheme.granularity == "tensor" else amax)


def _calibrate(model: nn.Module, quantization: Quantization, forward_loop: ForwardLoop) -> None:
    places = list(quantization.static_quantizers())
    groups, method = groups_of(model), quantization.record.calibration
    device = next(model.parameters()).device
    observers = [Largest(device) for _ in places]
    _run(model, forward_loop, places, observers)
    amax = torch.cat([observer.amax for observer in observers]) if observers else torch.zeros(0, device=device)
    seen = torch.tensor([observer.num_seen for observer in observers], dtype=torch.float32, device=device)
    for group in groups:
        amax, seen = reduce_max(amax, group), reduce_max(seen, group)

    def check() -> None:
        for (name, _), largest, number in zip(places, amax, seen, strict=True):
            if number == 0:
                raise ConfigError(f"calibration: {name} was never computed; give conversations that reach it")
            _check_finite(name, largest)

    run_on_every_rank(check)
    chosen = list(amax.split(1))
    if method != "max":
        histograms = [Histogram(each) for each in chosen]
        _run(model, forward_loop, places, histograms)
        run_on_every_rank(lambda: _check_seen_again(places, observers, histograms))
        for group in groups:
            for histogram in histograms:
                if group_size(group) > 1:
                    dist.all_reduce(histogram.counts, group=group)
        chosen = [
            histogram.choose(method, quantizer.scheme.number)
            for histogram, (_, quantizer) in zip(histograms, places, strict=True)
        ]
    for (_, quantizer), each in zip(places, chosen, strict=True):
        quantizer.set_amax(each)


def _check_seen_again(
    places: list[tuple[str, ActivationQuantizer]], before: list[Largest], again: list[Histogram]
) -> None:
    """Refuse conversations that run once, such as an iterator: of nothing no cut can be chosen."""
    for (name, _), largest, histogram in zip(places, before, again, strict=True):
        if histogram.counts.sum() != largest.num_seen:
            raise ConfigError(
                f"calibration: {name} had {largest.num_seen:,} values and {int(histogram.counts.sum()):,} when the "
                "conversations ran a second time; forward_loop is called twice: let it begin anew"
            )


def _run(
    model: nn.Module,
    forward_loop: ForwardLoop,
    places: list[tuple[str, ActivationQuantizer]],
    observers: list[Any],
) -> None:
    for (_, quantizer), observer in zip(places, observers, strict=True):
        quantizer.observer = observer
    try:
        forward_loop(model)
    finally:
        for _, quantizer in places:
            quantizer.observer = None


def _check_finite(name: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ConfigError(f"{name} holds NaN or infinity: no scale fits that; look at the data, or at the weights")

"""Gradients of learned scales, against autograd of the formula of learned step sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mcore_spec.config.quantization import Number, Scheme
from mcore_spec.parallel.tensor_parallel import TensorParallel
from mcore_spec.quantization.quantizers import ActivationQuantizer, WeightQuantizer
from tests.reference.quantization import nearest_of_many

CPU = torch.device("cpu")
LARGEST = {"e4m3": 448.0, "int8": 127.0, "int4": 7.0}
# What is nearer than this to the largest number is rounded to it, not cut.
REACH = {"e4m3": 464.0, "int8": 127.5, "int4": 7.5}


def rounded(ratio: Tensor, number: Number) -> Tensor:
    if number == "e4m3":
        return torch.from_numpy(nearest_of_many(ratio.detach().numpy()))
    return ratio.detach().round().clamp(-LARGEST[number], LARGEST[number])


def of_formula(x: Tensor, growth: Tensor, scale: Tensor, number: Number, num_behind: int) -> Tensor:
    """s q(x / s) with a gradient that passes through rounding alone, s = scale exp(growth) with LSQ's factor."""
    factor = 1 / math.sqrt(num_behind * LARGEST[number])
    slowed = growth * factor + (growth - growth * factor).detach()
    step = scale * slowed.exp()
    cut = (x / step).clamp(-REACH[number], REACH[number])
    return (cut + (rounded(cut, number) - cut).detach()) * step


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("number", ["e4m3", "int8", "int4"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_weights(granularity: str, number: Number) -> None:
    weight, grad = drawn(256, 256).requires_grad_(), drawn(256, 256).flip(0)
    scheme = Scheme.parse({"number": number, "granularity": granularity})
    quantizer = WeightQuantizer(scheme, weight, cut=None, tp=TensorParallel(), parts=[torch.arange(256)], name="map")
    # Some weights are cut off.
    quantizer.set_amax([each / 2 for each in quantizer.amax(weight)])
    quantizer.learn(number, num_behind=quantizer.num_behind(), group=None, dtype=torch.float32)
    quantizer.double()
    (growth,) = quantizer.learned().values()
    with torch.no_grad():
        growth.add_(drawn(*growth.shape) / 10)
    found = quantizer(weight)
    mine = torch.autograd.grad(found, (weight, growth), grad)
    num_behind = {"tensor": 256 * 256, "channel": 256, "block": 128 * 128}[granularity]
    assert quantizer.num_behind() == num_behind
    own, scale = growth.detach().clone().requires_grad_(), quantizer.stored()[0]
    whole, whole_scale = own, scale
    if granularity == "block":
        whole, whole_scale = (each.repeat_interleave(128, 0).repeat_interleave(128, 1) for each in (own, scale))
    expected = of_formula(weight, whole, whole_scale, number, num_behind)
    theirs = torch.autograd.grad(expected, (weight, own), grad)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for each, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-9, atol=1e-12)
    assert bool((mine[1] != 0).all())


def test_inputs() -> None:
    x, grad = drawn(40, 16).requires_grad_(), drawn(40, 16).flip(0)
    quantizer = ActivationQuantizer(Scheme(number="e4m3", granularity="tensor"), device=CPU)
    quantizer.set_amax(x.detach().abs().amax().reshape(1) / 2)
    quantizer.learn("e4m3", num_behind=16, group=None, dtype=torch.float32)
    quantizer.double()
    (growth,) = quantizer.learned().values()
    own = growth.detach().clone().requires_grad_()
    found, expected = quantizer(x), of_formula(x, own, quantizer.stored()[0], "e4m3", 16)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    mine = torch.autograd.grad(found, (x, growth), grad)
    for each, other in zip(mine, torch.autograd.grad(expected, (x, own), grad), strict=True):
        torch.testing.assert_close(each, other, rtol=1e-9, atol=1e-12)


def test_scales_that_are_one_stay_one_and_positive() -> None:
    first, second = (ActivationQuantizer(Scheme(number="int4", granularity="tensor"), device=CPU) for _ in range(2))
    shared = first.learn("int4", num_behind=2, group=None, dtype=torch.float32)
    assert second.learn("int4", num_behind=2, group=None, dtype=torch.float32, shared=shared) == shared
    before = first.scales()[0].detach().clone()
    (growth,) = shared.values()
    torch.optim.SGD([growth], lr=50.0).step(lambda: _downwards(growth))
    assert torch.equal(first.scales()[0], second.scales()[0])
    assert 0 < float(first.scales()[0].detach()) < float(before)


def _downwards(growth: Tensor) -> float:
    growth.grad = torch.ones_like(growth)
    return 0.0

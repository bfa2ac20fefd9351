"""FP8 products: against rounded values multiplied in wide numbers, and a reference that knows no casts of torch's."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mcore_spec.config.quantization import GradientScaling, find_recipe
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.parallel.float8 import TorchProduct, float8_product
from mcore_spec.parallel.layout import has_transformer_engine
from mcore_spec.parallel.tensor_parallel import TensorParallel
from mcore_spec.quantization.gradients import HISTORY, GradientQuantizer
from mcore_spec.quantization.products import multiply
from mcore_spec.quantization.quantizers import ActivationQuantizer, LinearQuantizer, WeightQuantizer
from tests.reference.quantization import Array, block_amax, nearest_of_many

CPU = torch.device("cpu")
RECIPES = ("fp8", "fp8_per_channel", "fp8_blockwise")
ROWS, INPUTS, OUTPUTS = 37, 256, 192
# What a signal has above the error that rounding made, in decibels.
LEAST_SQNR = 25.0


class Case(NamedTuple):
    """A linear map, its input, the gradient of its output."""

    x: Tensor
    weight: nn.Parameter
    quantizer: LinearQuantizer
    grad: Tensor


def make_case(name: str, dtype: torch.dtype = torch.float32, scaling: GradientScaling = "current") -> Case:
    """Values of many sizes; some inputs are cut off by a static scale."""
    recipe, generator = find_recipe(name), torch.Generator().manual_seed(8)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * torch.rand(shape[:-1], generator=generator)[..., None]

    weight = nn.Parameter((drawn(OUTPUTS, INPUTS) / 16).to(dtype))
    x = drawn(2, ROWS, INPUTS).to(dtype).requires_grad_()
    parts = [torch.arange(1, OUTPUTS, 2), torch.arange(0, OUTPUTS, 2)]
    of_weight = WeightQuantizer(recipe.weight, weight, cut=None, tp=TensorParallel(), parts=parts, name="map")
    of_weight.set_amax(of_weight.amax(weight))
    activation = ActivationQuantizer(recipe.activation, device=CPU)
    if not recipe.activation.is_dynamic:
        activation.set_amax(x.detach().abs().amax().float().reshape(1) / 2)
    gradient = GradientQuantizer(recipe.gradient, device=CPU, group=None, scaling=scaling)
    return Case(x, weight, LinearQuantizer(of_weight, activation, gradient), drawn(2, ROWS, OUTPUTS).to(dtype))


def sqnr(found: Tensor, expected: Tensor) -> float:
    noise = (found.detach().double() - expected.detach().double()).square().sum()
    return float(10 * torch.log10(expected.detach().double().square().sum() / noise))


def emulated(case: Case) -> Tensor:
    return F.linear(case.quantizer.activation(case.x), case.quantizer.weight(case.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RECIPES)
def test_outputs_and_gradients_are_those_of_fake_quantisation(name: str, dtype: torch.dtype) -> None:
    case = make_case(name, dtype)
    scales = case.quantizer.weight.learn("e4m3", num_behind=1, group=None, dtype=torch.float32)
    wanted = [case.x, case.weight, *scales.values()]
    expected = emulated(case)
    of_expected = torch.autograd.grad(expected, wanted, case.grad)
    found = multiply(case.x, case.weight, None, case.quantizer, TorchProduct(CPU))
    of_found = torch.autograd.grad(found, wanted, case.grad)
    assert found.dtype is dtype and found.shape == expected.shape
    assert sqnr(found, expected) >= (100 if dtype is torch.float32 else 40)
    for mine, theirs in zip(of_found[:2], of_expected[:2], strict=True):
        assert mine.dtype is theirs.dtype
        assert sqnr(mine, theirs) >= LEAST_SQNR
        # FP8 was multiplied, not what it stands for.
        assert not torch.equal(mine, theirs)
    # A scale's gradient sums what mostly cancels.
    for mine, theirs in zip(of_found[2:], of_expected[2:], strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 0.25
    if name == "fp8":
        is_cut = of_expected[0] == 0
        assert bool(is_cut.any()) and torch.equal(of_found[0] == 0, is_cut)


def stands_in(values: Array, amax: Array) -> Array:
    """What e4m3 makes of float64 values; torch rounds them to float32 on the way."""
    scale = (np.float32(amax) / np.float32(448)).astype(np.float64)
    return nearest_of_many(np.float32(values / scale).astype(np.float64)) * scale


@pytest.mark.parametrize("name", RECIPES)
def test_outputs_are_those_of_the_definition(name: str) -> None:
    case = make_case(name, torch.float64)
    x, weight = case.x.detach().double().numpy().reshape(-1, INPUTS), case.weight.detach().double().numpy()
    if name == "fp8":
        x_amax = np.full_like(x, np.float32(np.abs(np.float32(x)).max()) / 2)
        amax = np.full_like(weight, np.abs(weight).max())
    elif name == "fp8_per_channel":
        x_amax = np.broadcast_to(np.abs(x).max(axis=1, keepdims=True), x.shape)
        amax = np.broadcast_to(np.abs(weight).max(axis=1, keepdims=True), weight.shape)
    else:
        x_amax = block_amax(x, (1, 128))
        # Blocks are those of each part of the weight.
        amax = np.empty_like(weight)
        for first in (1, 0):
            amax[first::2] = block_amax(weight[first::2], (128, 128))
    expected = stands_in(x, x_amax) @ stands_in(weight, amax).T
    found = multiply(case.x, case.weight, None, case.quantizer, TorchProduct(CPU))
    # float32 sums of 256 terms.
    torch.testing.assert_close(
        found.detach().double().reshape(expected.shape), torch.from_numpy(expected), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("name", "scaling"), [*((name, "current") for name in RECIPES), ("fp8", "delayed")])
def test_a_gradient_without_numbers_stays_one(name: str, scaling: GradientScaling) -> None:
    case = make_case(name, scaling=scaling)
    if scaling == "delayed":
        assert case.quantizer.gradient is not None
        case.quantizer.gradient.finish_step(torch.ones(1))
    grad = case.grad.clone()
    grad[0, 3, 5] = float("inf")
    found = multiply(case.x, case.weight, None, case.quantizer, TorchProduct(CPU))
    for each in torch.autograd.grad(found, (case.x, case.weight), grad):
        assert not bool(torch.isfinite(each).all())


def test_a_delayed_scale_is_that_of_the_steps_before() -> None:
    case = make_case("fp8", scaling="delayed")
    gradient = case.quantizer.gradient
    assert gradient is not None
    largest = torch.tensor([4.0])
    # Nothing was seen yet: the gradient's own.
    assert float(gradient.encode(torch.tensor([[2.0]])).scale) == pytest.approx(2 / 57344)
    gradient.finish_step(largest)
    assert float(gradient.encode(torch.tensor([[2.0]])).scale) == pytest.approx(4 / 57344)
    # What is larger is cut.
    encoded = gradient.encode(torch.tensor([[9.0]]))
    assert float(encoded.numbers.float() * encoded.scale) == pytest.approx(4)
    assert float(gradient.seen) == 9
    gradient.finish_step(torch.tensor([float("inf")]))
    assert float(gradient.history.max()) == 4 and float(gradient.seen) == 0
    for _ in range(HISTORY):
        gradient.finish_step(torch.tensor([1.0]))
    assert float(gradient.encode(torch.tensor([[2.0]])).scale) == pytest.approx(1 / 57344)
    found = multiply(case.x, case.weight, None, case.quantizer, TorchProduct(CPU))
    gradient.finish_step(case.grad.abs().amax().reshape(1))
    for mine, theirs in zip(
        torch.autograd.grad(found, (case.x, case.weight), case.grad),
        torch.autograd.grad(emulated(case), (case.x, case.weight), case.grad),
        strict=True,
    ):
        assert sqnr(mine, theirs) >= LEAST_SQNR


def test_transformer_engine_is_asked_for_by_name() -> None:
    if has_transformer_engine():
        pytest.skip("Transformer Engine is installed")
    with pytest.raises(ConfigError, match="fp8_backend = transformer_engine needs NVIDIA Transformer Engine.*torch"):
        float8_product("transformer_engine", CPU)
    assert isinstance(float8_product("auto", CPU), TorchProduct)


@pytest.mark.parametrize("name", RECIPES)
def test_transformer_engine_multiplies_the_same_numbers(name: str) -> None:
    if not has_transformer_engine() or not torch.cuda.is_available():
        pytest.skip("needs Transformer Engine and CUDA")
    device = torch.device("cuda")
    case = make_case(name, torch.bfloat16)
    x, weight, quantizer = (
        case.x.detach().to(device).requires_grad_(),
        nn.Parameter(case.weight.to(device)),
        case.quantizer,
    )
    found = [
        multiply(x, weight, None, quantizer.to(device), float8_product(each, device))
        for each in ("torch", "transformer_engine")
    ]
    grads = [torch.autograd.grad(each, (x, weight), case.grad.to(device)) for each in found]
    assert sqnr(found[1], found[0]) > 40
    assert all(sqnr(mine, theirs) > 40 for mine, theirs in zip(grads[1], grads[0], strict=True))


def test_a_device_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "A100")
    with pytest.raises(UnsupportedError, match="A100 has compute capability 8.0"):
        float8_product("torch", torch.device("cuda"))

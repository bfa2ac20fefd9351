"""Rounding to the numbers, saturation and gradients, against tables and definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mcore_spec.quantization.numbers import FORMATS, decode, encode, fake_quantize, scale_of
from tests.reference.quantization import E4M3, nearest_e4m3, quantize

ONE = torch.ones(1)


def test_every_e4m3_number_stands_for_itself() -> None:
    values = torch.tensor(E4M3)
    assert E4M3[-1] == FORMATS["e4m3"].largest == torch.finfo(torch.float8_e4m3fn).max
    for signed in (values, -values):
        assert torch.equal(encode(signed, ONE, "e4m3").float(), signed)
        assert torch.equal(fake_quantize(signed, ONE, "e4m3"), signed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_e4m3_is_torchs_cast_and_saturates(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    ties = torch.tensor([(low + high) / 2 for low, high in zip(E4M3, E4M3[1:], strict=False)])
    drawn = torch.randn(5000, generator=generator) * torch.logspace(-4, 3, 5000)
    x = torch.cat((ties, -ties, drawn, torch.tensor([448.0, 463.9, 464.0, 1e6, -1e6, 0.0]))).to(dtype)
    found = fake_quantize(x, ONE, "e4m3")
    assert found.dtype is dtype
    inside = x.abs() <= 448
    assert torch.equal(found[inside], x[inside].to(torch.float32).to(torch.float8_e4m3fn).to(dtype))
    assert torch.equal(found[~inside], x[~inside].sign() * 448)
    expected = torch.tensor([nearest_e4m3(float(value)) for value in x.double()], dtype=torch.float64)
    assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("number", ["e4m3", "int8", "int4"])
def test_scaled_values_are_the_definitions(number: str) -> None:
    x = torch.randn(7, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    amax = x.abs().amax(dim=1, keepdim=True)
    scale = scale_of(amax, number)  # type: ignore[arg-type]
    found = fake_quantize(x, scale, number)  # type: ignore[arg-type]
    expected = quantize(x.numpy(), np.broadcast_to(amax.numpy(), x.shape), number)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-15, atol=0)
    # What is stored and multiplied by its scale is the same, bit for bit.
    stored = encode(x, scale, number)  # type: ignore[arg-type]
    assert stored.dtype is FORMATS[number].storage  # type: ignore[index]
    assert torch.equal(decode(stored, scale, x.dtype), found)
    assert not torch.equal(found, x)


def test_scale_of_nothing_but_zeros_is_one() -> None:
    assert torch.equal(scale_of(torch.tensor([0.0, 448.0]), "e4m3"), torch.tensor([1.0, 1.0]))
    assert torch.equal(fake_quantize(torch.zeros(3), scale_of(torch.zeros(1), "int8"), "int8"), torch.zeros(3))


def test_nan_stays_nan() -> None:
    for number in ("e4m3", "int8"):
        assert fake_quantize(torch.tensor([float("nan")]), ONE, number).isnan().all()


@pytest.mark.parametrize(("number", "cut"), [("e4m3", 464.0), ("int8", 127.5), ("int4", 7.5)])
def test_gradient_passes_rounding_and_stops_at_the_cut(number: str, cut: float) -> None:
    scale = torch.tensor([0.25], dtype=torch.float64)
    x = torch.tensor([0.3, -1.1, cut, -cut, cut + 1, -cut - 1], dtype=torch.float64) * scale
    x.requires_grad_()
    out = fake_quantize(x, scale, number)  # type: ignore[arg-type]
    out.backward(torch.arange(1.0, 7.0, dtype=torch.float64))
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 3.0, 4.0, 0.0, 0.0]


def test_the_largest_value_behind_a_scale_keeps_its_gradient() -> None:
    """x / (x / 448) may come out above 448 by rounding."""
    x = torch.rand(4096, generator=torch.Generator().manual_seed(0)).requires_grad_()
    fake_quantize(x, scale_of(x.detach().abs(), "e4m3"), "e4m3").sum().backward()
    assert x.grad is not None
    assert bool((x.grad == 1).all())


def test_gradient_of_a_scale_is_that_of_learned_step_sizes() -> None:
    x = torch.tensor([0.26, -0.9, 5.0, -7.0], dtype=torch.float64)
    scale = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    fake_quantize(x, scale, "int4").sum().backward()
    # Inside: round(x / s) - x / s; cut off: the largest number with the sign of x.
    expected = (1 - 0.52) + (-2 + 1.8) + 7 - 7
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(expected, abs=1e-12)

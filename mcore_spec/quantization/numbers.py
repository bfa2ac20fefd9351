"""The numbers that stand for others, and rounding to them with a gradient.

A value x with scale s becomes s q, q the nearest of the numbers to x / s; what is beyond the largest number, infinity
too, becomes the largest, as in engines; NaN stays NaN. The gradient passes through the rounding as if it were not there
and stops where it cut (Bengio et al., arXiv 1308.3432); the scale's gradient is that of learned step sizes (Esser et
al., arXiv 1902.08153).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from mcore_spec.config.quantization import Number


class NumberFormat(NamedTuple):
    """A set of numbers.

    Attributes:
        largest: of them.
        reach: largest absolute value whose nearest number `largest` is, or would be if there were larger ones.
        storage: torch's dtype that holds each of them.
        is_whole: whether they are whole numbers, half-way cases rounded to even ones.
    """

    largest: float
    reach: float
    storage: torch.dtype
    is_whole: bool


FORMATS: dict[Number, NumberFormat] = {
    "e4m3": NumberFormat(448.0, 464.0, torch.float8_e4m3fn, is_whole=False),
    "e5m2": NumberFormat(57344.0, 61440.0, torch.float8_e5m2, is_whole=False),
    "int8": NumberFormat(127.0, 127.5, torch.int8, is_whole=True),
    "int4": NumberFormat(7.0, 7.5, torch.int8, is_whole=True),
}


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which values of this dtype are divided and multiplied by scales."""
    return torch.promote_types(dtype, torch.float32)


def scale_of(amax: Tensor, number: Number) -> Tensor:
    """float32 scales by which the largest absolute values `amax` become the largest number; of nothing but zeros, 1."""
    scale = amax.to(torch.float32) / FORMATS[number].largest
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def encode(x: Tensor, scale: Tensor, number: Number) -> Tensor:
    """The numbers that stand for `x`, in the format's storage.

    Args:
        x: values.
        scale: float32, of a shape that fits `x`.
        number: which numbers.
    """
    return _round(x.to(wide(x.dtype)) / scale, FORMATS[number]).to(FORMATS[number].storage)


def decode(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in storage times their scales, in `dtype`."""
    return (numbers.to(wide(dtype)) * scale).to(dtype)


def fake_quantize(x: Tensor, scale: Tensor, number: Number) -> Tensor:
    """`x` as it is behind `encode` and `decode`, with gradients for `x` and for `scale`, where they want them."""
    return _FakeQuantize.apply(x, scale, number)


def _round(ratio: Tensor, form: NumberFormat) -> Tensor:
    clamped = ratio.clamp(-form.largest, form.largest)
    return clamped.round() if form.is_whole else clamped.to(form.storage).to(ratio.dtype)


class Wanted(NamedTuple):
    """Which gradients are."""

    x: bool
    scale: bool


class RoundingGradients(NamedTuple):
    """Of a rounded value; ``None``: not wanted."""

    x: Tensor | None
    scale: Tensor | None


def straight_through(x: Tensor, scale: Tensor, number: Number, grad: Tensor, wanted: Wanted) -> RoundingGradients:
    """Gradients of what was rounded and of its scale.

    Args:
        x: values before rounding.
        scale: of a shape that fits `x`.
        number: which numbers.
        grad: gradient of the rounded values times their scales, of the shape of `x`.
        wanted: which.
    """
    form = FORMATS[number]
    ratio = x.to(wide(x.dtype)) / scale
    is_inside = ratio.abs() <= form.reach
    for_x = grad * is_inside if wanted.x else None
    for_scale = None
    if wanted.scale:
        slope = _round(ratio, form) - ratio * is_inside
        for_scale = (grad.to(ratio.dtype) * slope).sum_to_size(scale.shape).to(scale.dtype)
    return RoundingGradients(for_x, for_scale)


class _FakeQuantize(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, number: Number) -> Tensor:
        # x is a weight, or an activation that is kept anyway: nothing of its size is kept besides.
        ctx.save_for_backward(x, scale)
        ctx.number = number
        return (_round(x.to(wide(x.dtype)) / scale, FORMATS[number]) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scale = ctx.saved_tensors
        wanted = Wanted(*ctx.needs_input_grad[:2])
        return (*straight_through(x, scale, ctx.number, grads[0], wanted), None)

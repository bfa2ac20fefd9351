"""Linear maps that multiply by a rounded weight in the model's dtype, and do not keep it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from mcore_spec.quantization.quantizers import WeightQuantizer


def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, quantizer: WeightQuantizer) -> Tensor:
    """[..., in] times [out, in], rounded, plus a bias [out] -> [..., out].

    Backward rounds the weight again: a draft uses it in each of its steps, and kept, each step's would be a copy of it.

    Args:
        x: its rounding is another's.
        weight: before rounding.
        bias: is not rounded.
        quantizer: of the weight.
    """
    output: Tensor = _RoundedLinear.apply(x, weight, bias, quantizer.row_scales(), quantizer)
    return output


class _RoundedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, quantizer: WeightQuantizer
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        ctx.quantizer, ctx.bias_dtype = quantizer, None if bias is None else bias.dtype
        return F.linear(x, quantizer.rounded(weight, scale), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        of_x, of_weight, of_bias, of_scale = ctx.needs_input_grad[:4]
        with torch.enable_grad():
            sources = (weight.detach().requires_grad_(of_weight), scale.detach().requires_grad_(of_scale))
            rounded = ctx.quantizer.rounded(*sources)
        # Under autocast the product, and with it its gradient, has another dtype than what was multiplied.
        grad = grads[0]
        rows = grad.flatten(0, -2)
        for_x = (grad @ rounded.detach().to(grad.dtype)).to(x.dtype) if of_x else None
        for_bias = rows.sum(0).to(ctx.bias_dtype) if of_bias else None
        for_rounded: list[Tensor | None] = [None, None]
        if of_weight or of_scale:
            product = (rows.t() @ x.flatten(0, -2).to(grad.dtype)).to(rounded.dtype)
            wanted = [source for source in sources if source.requires_grad]
            found = iter(torch.autograd.grad(rounded, wanted, product))
            for_rounded = [next(found) if source.requires_grad else None for source in sources]
        return for_x, for_rounded[0], for_bias, for_rounded[1], None

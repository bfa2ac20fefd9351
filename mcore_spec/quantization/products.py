"""Linear maps that multiply FP8 numbers, forward and backward, with the scales of a recipe.

Of y = x w^T the numbers of x and w are multiplied as the hardware has them, and the result by their scales. Scales of
outputs or rows can be taken out of the sum; those that lie along it are multiplied into the gradient before that is
rounded, so that both products of backward multiply the numbers of forward:

    dx = s_g (q(g s_w) w_q)        dw = s_g' (q(g^T s_x) x_q)

Blocks of inputs are one such product each, summed in float32. What is rounded has the gradient of fake quantisation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from mcore_spec.parallel.float8 import MULTIPLE, Float8Product
from mcore_spec.quantization.gradients import GradientQuantizer, Numbers
from mcore_spec.quantization.numbers import RoundingGradients, Wanted, encode, straight_through, wide
from mcore_spec.quantization.quantizers import LinearQuantizer


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, quantizer: LinearQuantizer, product: Float8Product
) -> Tensor:
    """[..., in] times [out, in] plus a bias [out] -> [..., out], in the dtype of `x`.

    Rows are filled up to a multiple of 16 with zeros; `in` and `out` are such (see `check_sizes`).
    """
    assert quantizer.gradient is not None, "products are set up with a quantiser of gradients"
    rows = x.flatten(0, -2)
    padded = F.pad(rows, (0, 0, 0, -rows.shape[0] % MULTIPLE))
    scale = quantizer.activation.row_scales(padded)
    if scale.dim() == 1:
        scale = scale.reshape(1, 1)
    operands = (padded, weight, scale, quantizer.weight.row_scales())
    output: Tensor = _Multiply.apply(*operands, quantizer, product)
    output = output[: rows.shape[0]].unflatten(0, x.shape[:-1])
    return output if bias is None else output + bias


class _Operand(NamedTuple):
    """A matrix that is rounded.

    Attributes:
        blocks: its numbers before rounding, [rows, blocks, n]: columns that share a row's scale.
        scale: [rows or 1, blocks].
        numbers: rounded, in storage, like `blocks`.
    """

    blocks: Tensor
    scale: Tensor
    numbers: Tensor

    @property
    def is_one(self) -> bool:
        """Whether all rows have one scale."""
        return self.scale.shape[0] == 1

    def column(self, block: int) -> Tensor:
        """Scales of the rows in one block, [rows or 1, 1]."""
        return self.scale[:, block : block + 1]


def _operand(matrix: Tensor, scale: Tensor, *, num_blocks: int) -> _Operand:
    blocks, scale = matrix.unflatten(1, (num_blocks, -1)), scale.expand(-1, num_blocks)
    return _Operand(blocks, scale, encode(blocks, scale[..., None], "e4m3"))


class _Multiply(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        x_scale: Tensor,
        weight_scale: Tensor,
        quantizer: LinearQuantizer,
        product: Float8Product,
    ) -> Tensor:
        # Numbers are made again in backward: kept, those of every step would be as many copies of the weight.
        ctx.save_for_backward(x, weight, x_scale, weight_scale)
        ctx.quantizer, ctx.product = quantizer, product
        left, right = _operands(x, weight, x_scale, weight_scale)
        total = None
        for block in range(left.blocks.shape[1]):
            term = product(left.numbers[:, block], right.numbers[:, block])
            term = term * left.column(block) * right.column(block).t()
            total = term if total is None else total + term
        assert total is not None
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, x_scale, weight_scale = ctx.saved_tensors
        left, right = _operands(x, weight, x_scale, weight_scale)
        grad = grads[0].to(wide(grads[0].dtype))
        gradient: GradientQuantizer = ctx.quantizer.gradient
        is_by_row = gradient.scheme.granularity == "token"
        shared = None if is_by_row else gradient.encode(grad)
        of_x, of_weight, of_x_scale, of_weight_scale = ctx.needs_input_grad[:4]
        for_x, for_x_scale, for_weight, for_weight_scale = None, None, None, None
        if of_x or of_x_scale:
            through = _Through(gradient, shared, ctx.product, is_whole=False)
            for_x, for_x_scale = _unrounded(left, through(grad, left, right), Wanted(of_x, of_x_scale))
        if of_weight or of_weight_scale:
            # The sum over rows is one over what this rank has.
            turned = None if shared is None else Numbers(shared.numbers.t(), shared.scale)
            through = _Through(gradient, turned, ctx.product, is_whole=is_by_row)
            rounded = through(grad.t(), right, left)
            for_weight, for_weight_scale = _unrounded(right, rounded, Wanted(of_weight, of_weight_scale))
        return for_x, for_weight, for_x_scale, for_weight_scale, None, None


def _operands(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor) -> tuple[_Operand, _Operand]:
    num_blocks = max(x_scale.shape[1], weight_scale.shape[1])
    return _operand(x, x_scale, num_blocks=num_blocks), _operand(weight, weight_scale, num_blocks=num_blocks)


class _Through(NamedTuple):
    """Takes a gradient through the product.

    Attributes:
        gradient: rounds.
        shared: the gradient as it is rounded for all blocks, where there is one scale.
        product: multiplies.
        is_whole: whether the columns of the gradient are all on this rank.
    """

    gradient: GradientQuantizer
    shared: Numbers | None
    product: Float8Product
    is_whole: bool

    def __call__(self, grad: Tensor, target: _Operand, other: _Operand) -> Tensor:
        """[rows of `target`, rows of `other`] -> the gradient of `target` as it is rounded, [rows, blocks, n]."""
        parts = []
        shared = self.shared if other.is_one else None
        for block in range(target.blocks.shape[1]):
            scale = other.column(block).t()
            own = self.gradient.encode(grad * scale, is_whole=self.is_whole) if shared is None else shared
            part = self.product(own.numbers, other.numbers[:, block].t()) * own.scale
            parts.append(part if shared is None else part * scale)
        return torch.stack(parts, dim=1)


def _unrounded(operand: _Operand, grad: Tensor, wanted: Wanted) -> RoundingGradients:
    """Gradients of the matrix before rounding, in its dtype, and of its scales."""
    found = straight_through(operand.blocks, operand.scale[..., None], "e4m3", grad, wanted)
    return RoundingGradients(
        None if found.x is None else found.x.flatten(1).to(operand.blocks.dtype),
        None if found.scale is None else found.scale[..., 0],
    )

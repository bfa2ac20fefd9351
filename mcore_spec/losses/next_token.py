"""A language model's own loss with its gradients, chunk by chunk; the vocabulary stays sharded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mcore_spec.losses.blocks import Scratch, add_head_gradient, block_rows, project
from mcore_spec.losses.softmax import against_labels, all_reduce, row_peak
from mcore_spec.losses.vocabulary import head_slice
from mcore_spec.parallel.tensor_parallel import TensorParallel


class NextTokenOutput(NamedTuple):
    """Sums over the counted rows; the ranks of a tensor-parallel group hold the same values.

    Attributes:
        loss: a scalar that carries the gradients.
        num_rows: int64 scalar.
    """

    loss: Tensor
    num_rows: Tensor


def next_token_loss(
    hidden: Tensor,
    head: Tensor,
    *,
    labels: Tensor,
    counted: Tensor,
    vocab_size: int,
    tp: TensorParallel,
    max_logits: int | None = None,
) -> NextTokenOutput:
    """Cross-entropy of the rows' labels, summed.

    Gradients are made in forward, as `fused.distillation_loss` makes them: that of `hidden` is this rank's term of a
    sum over the group, which `TensorParallel.enter` adds.

    Args:
        hidden: what the head reads, inside the parallel region, [rows, h].
        head: this rank's rows, [padded vocabulary / size, h].
        labels: token ids, int64 [rows], read where `counted`.
        counted: bool [rows].
        vocab_size: without padding.
        tp: the tensor-parallel group.
        max_logits: elements in a block of logits on this rank. Default: by device.

    Raises:
        ConfigError: `max_logits` below 1.
    """
    width = head_slice(head, vocab_size, tp).width
    request = _Request(
        labels=labels,
        rows=counted.nonzero()[:, 0],
        vocab_size=vocab_size,
        tp=tp,
        max_rows=block_rows(width, device=hidden.device, max_logits=max_logits),
        with_grad=torch.is_grad_enabled(),
    )
    return NextTokenOutput(_NextTokenLoss.apply(request, head, hidden), counted.sum())


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What the loss is asked for, without the tensors that may get a gradient."""

    labels: Tensor
    rows: Tensor
    vocab_size: int
    tp: TensorParallel
    max_rows: int
    with_grad: bool


class _NextTokenLoss(Function):
    @staticmethod
    def forward(ctx: Any, request: _Request, head: Tensor, hidden: Tensor) -> Tensor:
        wants_head, wants_hidden = (request.with_grad and needed for needed in ctx.needs_input_grad[1:])
        group, part = request.tp.group, head_slice(head.detach(), request.vocab_size, request.tp)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        wide, narrow = Scratch(dtype, hidden.device), Scratch(hidden.dtype, hidden.device)
        head_grad = torch.zeros_like(head, dtype=dtype) if wants_head else None
        hidden_grad = torch.zeros_like(hidden) if wants_hidden else None
        log_sum, label = torch.zeros((2,), dtype=dtype, device=hidden.device).unbind()
        for start in range(0, request.rows.shape[0], request.max_rows):
            rows = request.rows[start : start + request.max_rows]
            states = hidden.index_select(0, rows)
            logits = project(states, part.weight, wide, narrow)
            highest = row_peak(logits, part.first, group).value
            surprise = against_labels(
                logits, highest, request.labels[rows], part.first, group, wants_gradients=wants_head or wants_hidden
            )
            log_sum += surprise.log_sum.sum()
            label += surprise.label.sum()
            if not (wants_head or wants_hidden):
                continue
            descent = logits if logits.dtype == hidden.dtype else narrow.block(*logits.shape).copy_(logits)
            if hidden_grad is not None:
                hidden_grad.index_copy_(0, rows, -torch.mm(descent, part.weight))
            if head_grad is not None:
                add_head_gradient(head_grad[: part.width], descent, states, factor=-1.0)
        ctx.save_for_backward(head_grad, hidden_grad)
        return log_sum - all_reduce(label.clone(), dist.ReduceOp.SUM, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if grad is None else grad * grads[0] for grad in ctx.saved_tensors)

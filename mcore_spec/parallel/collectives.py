"""Differentiable collectives over one process group.

Each function names what it does forward and what its gradient is; together they are the whole algebra
of tensor and sequence parallelism (Korthikanti et al., arXiv 2205.05198, section 4.2). A group of
``None`` is a group of one rank: every function is then the identity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

Group = dist.ProcessGroup | None


def group_size(group: Group) -> int:
    """Number of ranks in the group; 1 for ``None``."""
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    """Rank of this process in the group; 0 for ``None``."""
    return 0 if group is None else group.rank()


def _all_reduce(tensor: Tensor, group: Group) -> Tensor:
    result = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result


def _all_gather(tensor: Tensor, dim: int, group: Group) -> Tensor:
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(group_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return torch.cat(parts, dim=dim)


def _slice(tensor: Tensor, dim: int, group: Group) -> Tensor:
    return tensor.chunk(group_size(group), dim=dim)[group_rank(group)].contiguous()


def _reduce_scatter(tensor: Tensor, dim: int, group: Group) -> Tensor:
    parts = [part.contiguous() for part in tensor.chunk(group_size(group), dim=dim)]
    result = torch.empty_like(parts[0])
    dist.reduce_scatter(result, parts, group=group)
    return result


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grads[0], ctx.group), None


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        return _all_reduce(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, group: Group, grad_is_partial: bool) -> Tensor:
        ctx.dim, ctx.group, ctx.grad_is_partial = dim, group, grad_is_partial
        return _all_gather(tensor, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        back = _reduce_scatter if ctx.grad_is_partial else _slice
        return back(grads[0], ctx.dim, ctx.group), None, None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter(tensor, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grads[0], ctx.dim, ctx.group), None, None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _slice(tensor, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grads[0], ctx.dim, ctx.group), None, None


def copy_to_group(tensor: Tensor, group: Group) -> Tensor:
    """Identity; the gradient is summed over the group."""
    return tensor if group_size(group) == 1 else _Copy.apply(tensor, group)


def reduce_from_group(tensor: Tensor, group: Group) -> Tensor:
    """Sum over the group; the gradient passes unchanged."""
    return tensor if group_size(group) == 1 else _Reduce.apply(tensor, group)


def gather(tensor: Tensor, dim: int, group: Group, *, grad_is_partial: bool) -> Tensor:
    """Concatenate the ranks' shards along `dim`; the gradient is cut into shards.

    Args:
        tensor: this rank's shard.
        dim: dimension along which the shards are joined.
        group: ranks that hold the shards.
        grad_is_partial: each rank uses the result differently, so that its gradient is one term of a
            sum (reduce-scatter); otherwise every rank computes the same gradient (slice).
    """
    if group_size(group) == 1:
        return tensor
    return _Gather.apply(tensor, dim, group, grad_is_partial)


def reduce_scatter(tensor: Tensor, dim: int, group: Group) -> Tensor:
    """Sum over the group, keep this rank's shard along `dim`; the gradient is gathered."""
    return tensor if group_size(group) == 1 else _ReduceScatter.apply(tensor, dim, group)


def scatter(tensor: Tensor, dim: int, group: Group) -> Tensor:
    """Keep this rank's shard of a replicated tensor along `dim`; the gradient is gathered."""
    return tensor if group_size(group) == 1 else _Scatter.apply(tensor, dim, group)


def gather_without_grad(tensor: Tensor, dim: int, group: Group) -> Tensor:
    """Concatenate the ranks' shards along `dim`, outside of autograd."""
    return tensor if group_size(group) == 1 else _all_gather(tensor.detach(), dim, group)

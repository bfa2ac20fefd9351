"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467), with the statistics in float32 or better."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mcore_spec.parallel.sharding import Shard
from mcore_spec.parallel.tensor_parallel import Placement


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps) over the last dimension, rounded as transformers' Llama does."""

    def __init__(self, size: int, *, eps: float, place: Placement) -> None:
        """Weight of ones.

        Args:
            size: last dimension.
            eps: added to the mean square.
            place: group, dtype and device.
        """
        super().__init__()
        self.size, self.eps, self.tp = size, eps, place.tp
        self.weight = nn.Parameter(torch.ones(size, dtype=place.dtype, device=place.device))

    def shards(self) -> dict[str, Shard]:
        """The weight is replicated."""
        return {"weight": Shard(None)}

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return rms_norm(x, self.tp.replicated(self.weight), self.eps)

    def extra_repr(self) -> str:
        """Size and epsilon."""
        return f"{self.size}, eps={self.eps}"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm itself; statistics at least in float32, the product with the weight in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)

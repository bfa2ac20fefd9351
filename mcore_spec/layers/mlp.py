"""Gated MLP (Shazeer, arXiv 2002.05202), its inner width sharded over the tensor-parallel group."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from mcore_spec.layers.linear import ShardedLinear
from mcore_spec.parallel.tensor_parallel import Placement

# Also the activations that a base may have; one owner for what the names mean.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        hidden_act: str,
        bias: bool,
        place: Placement,
    ) -> None:
        """Allocate this rank's shard.

        Args:
            hidden_size: input and output width.
            intermediate_size: inner width.
            hidden_act: a key of `ACTIVATIONS`.
            bias: bias on the three projections.
            place: group, dtype and device.
        """
        super().__init__()
        self.tp = place.tp
        self.activation = ACTIVATIONS[hidden_act]
        what = "intermediate_size"
        self.gate_proj = ShardedLinear(hidden_size, intermediate_size, shard_dim=0, bias=bias, what=what, place=place)
        self.up_proj = ShardedLinear(hidden_size, intermediate_size, shard_dim=0, bias=bias, what=what, place=place)
        self.down_proj = ShardedLinear(intermediate_size, hidden_size, shard_dim=1, bias=bias, what=what, place=place)

    def forward(self, x: Tensor) -> Tensor:
        """[s or s/size, b, h] -> [s or s/size, b, h]."""
        x = self.tp.enter(x)
        output = self.tp.leave(self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x)))
        if self.down_proj.bias is not None:
            output = output + self.tp.replicated(self.down_proj.bias)
        return output

"""Linear maps whose weight is sharded over the tensor-parallel group, and the vocabulary head.

The layers hold shards and multiply; entering and leaving the parallel region is done once by their
owner (`TensorParallel.enter` and `leave`), so that q, k and v share one gather.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mcore_spec.layers.init import full_normal
from mcore_spec.parallel.collectives import gather, scatter
from mcore_spec.parallel.sharding import Shard
from mcore_spec.parallel.tensor_parallel import SEQUENCE_DIM, Placement

# Dimension of the weight [out, in] that is cut over the ranks.
ShardDim = Literal[0, 1]


class ShardedLinear(nn.Module):
    """y = x W^T (+ b), with W [out, in] cut along `shard_dim`: 0 shards the output, 1 the input.

    With ``shard_dim = 0`` x is replicated and y is this rank's slice of the output. With 1, x is this
    rank's slice of the input and y is one term of a sum over the ranks; a bias would be added once
    only, by the owner after `leave`, so it is kept in `bias` and not applied here.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        shard_dim: ShardDim,
        place: Placement,
        bias: bool = False,
        what: str = "features",
    ) -> None:
        """Allocate this rank's shard; values come from `init_weights` or from a checkpoint.

        Args:
            in_features: columns of the whole weight.
            out_features: rows of the whole weight.
            shard_dim: which of the two is cut.
            place: group, dtype and device.
            bias: whether there is a bias (sharded with the output, replicated for ``shard_dim = 1``).
            what: name of the sharded quantity, for the error when it does not divide.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.shard_dim, self.tp = shard_dim, place.tp
        local = place.tp.local(out_features if shard_dim == 0 else in_features, what=what)
        shape = (local, in_features) if shard_dim == 0 else (out_features, local)
        self.weight = nn.Parameter(torch.empty(shape, dtype=place.dtype, device=place.device))
        self.bias = nn.Parameter(torch.zeros(shape[0], dtype=place.dtype, device=place.device)) if bias else None

    def shards(self) -> dict[str, Shard]:
        """How each parameter is cut over the group."""
        shards = {"weight": Shard(self.shard_dim)}
        if self.bias is not None:
            shards["bias"] = Shard(0 if self.shard_dim == 0 else None)
        return shards

    @torch.no_grad()
    def init_weights(self, name: str, *, std: float, seed: int) -> None:
        """Normal weight, zero bias; the same whole matrix under every tensor-parallel size."""
        full = full_normal((self.out_features, self.in_features), std=std, seed=seed, name=f"{name}.weight")
        self.load_whole(full)
        if self.bias is not None:
            self.bias.zero_()

    @torch.no_grad()
    def load_whole(self, weight: Tensor) -> None:
        """Keep this rank's part of a whole weight [out, in]."""
        self.weight.copy_(weight.chunk(self.tp.size, dim=self.shard_dim)[self.tp.rank])

    def forward(self, x: Tensor) -> Tensor:
        """[..., in (or in/size)] -> [..., out/size (or a term of out)]."""
        return F.linear(x, self.weight, self.applied_bias)

    @property
    def applied_bias(self) -> Tensor | None:
        """The bias that `forward` adds."""
        return self.bias if self.shard_dim == 0 else None

    def extra_repr(self) -> str:
        """Whole sizes, and how they are cut."""
        return f"{self.in_features}, {self.out_features}, shard_dim={self.shard_dim}, tp={self.tp.size}"


def project_sharded_columns(projection: ShardedLinear, x: Tensor) -> Tensor:
    """[s or s/size, b, n] times a weight whose columns are sharded -> [s or s/size, b, out]."""
    tp = projection.tp
    if tp.sequence_parallel:
        # Each rank multiplies its columns for every row, so a row's gradient is one slice a rank.
        x = gather(x, SEQUENCE_DIM, tp.group, grad_is_partial=True)
        x = x.chunk(tp.size, dim=-1)[tp.rank]
    else:
        x = scatter(x, -1, tp.group)
    return tp.leave(projection(x))


class VocabularyHead(nn.Module):
    """Logits over a vocabulary whose rows are sharded; padded with zero rows to the group's size.

    The owner enters the parallel region (`TensorParallel.enter`) and drops the padding's logits.
    """

    def __init__(self, hidden_size: int, vocab_size: int, *, place: Placement) -> None:
        """Allocate this rank's rows.

        Args:
            hidden_size: columns.
            vocab_size: rows without padding.
            place: group, dtype and device.
        """
        super().__init__()
        self.hidden_size, self.vocab_size, self.tp = hidden_size, vocab_size, place.tp
        rows = place.tp.padded(vocab_size) // place.tp.size
        self.weight = nn.Parameter(torch.zeros(rows, hidden_size, dtype=place.dtype, device=place.device))

    def shards(self) -> dict[str, Shard]:
        """How the weight is cut over the group."""
        return {"weight": Shard(0, size=self.vocab_size)}

    @property
    def first_row(self) -> int:
        """Vocabulary index of this rank's first row."""
        return self.tp.rank * self.weight.shape[0]

    @torch.no_grad()
    def load_rows(self, rows: Tensor) -> None:
        """Fill this rank's shard; `rows` are its unpadded rows [<= local, h]."""
        self.weight.zero_()
        self.weight[: rows.shape[0]].copy_(rows)

    def num_valid_rows(self) -> int:
        """How many of this rank's rows are vocabulary entries and not padding."""
        return max(0, min(self.weight.shape[0], self.vocab_size - self.first_row))

    def forward(self, hidden: Tensor) -> Tensor:
        """[s, b, h], inside the parallel region -> this rank's logits [s, b, padded vocabulary / size]."""
        return F.linear(hidden, self.weight)

    def extra_repr(self) -> str:
        """Whole sizes."""
        return f"{self.hidden_size}, {self.vocab_size}, tp={self.tp.size}"

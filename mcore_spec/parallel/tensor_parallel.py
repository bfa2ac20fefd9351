"""What a layer needs to know about tensor and sequence parallelism, as one value.

A draft is written once, for one rank's shard of the heads and one rank's shard of the sequence;
`TensorParallel` says what happens at the borders. With ``TensorParallel()`` there are none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mcore_spec.errors import ConfigError
from mcore_spec.parallel.collectives import (
    Group,
    copy_to_group,
    gather,
    group_rank,
    group_size,
    reduce_from_group,
    reduce_scatter,
)

SEQUENCE_DIM = 0


@dataclass(frozen=True, kw_only=True)
class TensorParallel:
    """A tensor-parallel group and whether the sequence is sharded between its parallel regions.

    Attributes:
        group: the ranks that share each layer; ``None`` for one rank.
        sequence_parallel: outside of the parallel regions each rank holds [s / size, b, h].
    """

    group: Group = None
    sequence_parallel: bool = False

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return group_size(self.group)

    @property
    def rank(self) -> int:
        """This process in the group."""
        return group_rank(self.group)

    def local(self, num: int, *, what: str) -> int:
        """This rank's share of `num` things that must divide evenly.

        Raises:
            ConfigError: `num` is not divisible by the size of the group.
        """
        if num % self.size:
            raise ConfigError(
                f"{what} = {num} is not divisible by tensor_model_parallel_size = {self.size}; "
                f"choose a size that divides {num}"
            )
        return num // self.size

    def padded(self, num: int) -> int:
        """`num` rounded up to a multiple of the group's size (vocabularies are padded, heads are not)."""
        return -(-num // self.size) * self.size

    def enter(self, hidden: Tensor) -> Tensor:
        """[s or s/size, b, h] -> [s, b, h], the input of column-sharded weights (gradients are summed)."""
        if self.sequence_parallel:
            return gather(hidden, SEQUENCE_DIM, self.group, grad_is_partial=True)
        return copy_to_group(hidden, self.group)

    def leave(self, partial: Tensor) -> Tensor:
        """[s, b, h], one term a rank of the row-sharded product -> the sum, [s or s/size, b, h]."""
        if self.sequence_parallel:
            return reduce_scatter(partial, SEQUENCE_DIM, self.group)
        return reduce_from_group(partial, self.group)

    def own_rows(self, values: Tensor) -> Tensor:
        """Values over all rows -> this rank's outside of the parallel regions, [s, ...] -> [s or s/size, ...]."""
        return values.chunk(self.size)[self.rank] if self.sequence_parallel else values

    def replicated(self, weight: Tensor) -> Tensor:
        """A replicated weight that is applied outside of the parallel regions.

        Under sequence parallelism each rank sees other rows, so the weight's gradient is summed over the
        group; otherwise every rank computes the whole gradient already.
        """
        return copy_to_group(weight, self.group) if self.sequence_parallel else weight


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and as what a module's parameters are allocated.

    Attributes:
        tp: the ranks that share each layer.
        dtype: of the parameters; ``None``: torch's default.
        device: of the parameters; ``None``: torch's default.
    """

    tp: TensorParallel = field(default_factory=TensorParallel)
    dtype: torch.dtype | None = None
    device: torch.device | None = None

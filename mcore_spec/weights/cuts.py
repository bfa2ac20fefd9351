"""How a weight of the base stands in Hugging Face's files and in a `GPTModel`, read in both directions.

A `Cut` takes this rank's part out of the file (`read`) and puts the ranks' parts together again
(`join`). Query, key and value, and gate and up, stand in megatron-core in one matrix; in the files they
are two or three tensors, or (Phi-3) one tensor of stacked blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mcore_spec.config import BaseArchitecture
from mcore_spec.parallel.tensor_parallel import TensorParallel
from mcore_spec.weights.safetensors_io import WeightDirectory

Shapes = tuple[tuple[int, ...], ...]


class Cut(Protocol):
    """One way in which a tensor is arranged and cut."""

    def read(self, source: WeightDirectory, names: Sequence[str], base: BaseArchitecture, tp: TensorParallel) -> Tensor:
        """This rank's part of the stored tensor(s) `names`, padded where a vocabulary is."""
        ...

    def join(self, parts: Sequence[Tensor], num_names: int, base: BaseArchitecture) -> list[Tensor]:
        """The stored tensors (`num_names` of them) from every rank's part, in rank order."""
        ...


class Replicated:
    """Every rank holds all of it."""

    def read(self, source: WeightDirectory, names: Sequence[str], base: BaseArchitecture, tp: TensorParallel) -> Tensor:
        """The whole tensor."""
        return source.read(names[0])

    def join(self, parts: Sequence[Tensor], num_names: int, base: BaseArchitecture) -> list[Tensor]:
        """Any rank's."""
        return [parts[0]]


class Columns:
    """Cut along the input dimension (row-parallel layers)."""

    def read(self, source: WeightDirectory, names: Sequence[str], base: BaseArchitecture, tp: TensorParallel) -> Tensor:
        """This rank's columns."""
        local = tp.local(source.tensors[names[0]].shape[1], what=names[0])
        return source.read(names[0], dim=1, start=tp.rank * local, stop=(tp.rank + 1) * local)

    def join(self, parts: Sequence[Tensor], num_names: int, base: BaseArchitecture) -> list[Tensor]:
        """Side by side."""
        return [torch.cat(list(parts), dim=1)]


class Vocabulary:
    """Rows are vocabulary entries, padded with zeros to the group's size."""

    def read(self, source: WeightDirectory, names: Sequence[str], base: BaseArchitecture, tp: TensorParallel) -> Tensor:
        """This rank's rows."""
        local = tp.padded(base.vocab_size) // tp.size
        start = min(tp.rank * local, base.vocab_size)
        rows = source.read(names[0], start=start, stop=min(start + local, base.vocab_size))
        padding = rows.new_zeros(local - rows.shape[0], rows.shape[1])
        return torch.cat((rows, padding)) if padding.shape[0] else rows

    def join(self, parts: Sequence[Tensor], num_names: int, base: BaseArchitecture) -> list[Tensor]:
        """One below the other, without the padding."""
        return [torch.cat(list(parts))[: base.vocab_size]]


class _Block(NamedTuple):
    name: str
    offset: int
    size: int


class _Blocks:
    """Row blocks that the files keep separate or stacked, and megatron-core in one matrix a rank."""

    def sizes(self, base: BaseArchitecture) -> tuple[int, ...]:
        """Rows of each block."""
        raise NotImplementedError

    def merge(self, blocks: Sequence[Tensor], base: BaseArchitecture) -> Tensor:
        """This rank's rows of each block -> this rank's matrix."""
        raise NotImplementedError

    def split(self, part: Tensor, base: BaseArchitecture) -> list[Tensor]:
        """The inverse of `merge`."""
        raise NotImplementedError

    def read(self, source: WeightDirectory, names: Sequence[str], base: BaseArchitecture, tp: TensorParallel) -> Tensor:
        """This rank's rows of every block, merged."""
        rows = []
        for block in self._stored(names, base):
            local = tp.local(block.size, what=block.name)
            start = block.offset + tp.rank * local
            rows.append(source.read(block.name, start=start, stop=start + local))
        return self.merge(rows, base)

    def join(self, parts: Sequence[Tensor], num_names: int, base: BaseArchitecture) -> list[Tensor]:
        """Every block whole, stacked if the file has one tensor."""
        split = [self.split(part, base) for part in parts]
        blocks = [torch.cat(list(block)) for block in zip(*split, strict=True)]
        return blocks if num_names > 1 else [torch.cat(blocks)]

    def _stored(self, names: Sequence[str], base: BaseArchitecture) -> list[_Block]:
        sizes = self.sizes(base)
        if len(names) == len(sizes):
            return [_Block(name, 0, size) for name, size in zip(names, sizes, strict=True)]
        offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        return [_Block(names[0], offset, size) for offset, size in zip(offsets, sizes, strict=True)]


class QueryKeyValue(_Blocks):
    """For each key/value group its queries, its key, its value (megatron-core); q, k and v (files)."""

    def sizes(self, base: BaseArchitecture) -> tuple[int, ...]:
        """Rows of q, k and v."""
        kv = base.num_key_value_heads * base.head_dim
        return (base.num_attention_heads * base.head_dim, kv, kv)

    def merge(self, blocks: Sequence[Tensor], base: BaseArchitecture) -> Tensor:
        """Interleave by group."""
        groups = blocks[1].shape[0] // base.head_dim
        return torch.cat([block.unflatten(0, (groups, -1)) for block in blocks], dim=1).flatten(0, 1)

    def split(self, part: Tensor, base: BaseArchitecture) -> list[Tensor]:
        """Take the groups apart."""
        queries = base.num_attention_heads // base.num_key_value_heads * base.head_dim
        rows = (queries, base.head_dim, base.head_dim)
        return [block.flatten(0, 1) for block in part.unflatten(0, (-1, sum(rows))).split(rows, dim=1)]


class GateUp(_Blocks):
    """This rank's gate rows above this rank's up rows."""

    def sizes(self, base: BaseArchitecture) -> tuple[int, ...]:
        """Rows of gate and up."""
        return (base.intermediate_size, base.intermediate_size)

    def merge(self, blocks: Sequence[Tensor], base: BaseArchitecture) -> Tensor:
        """One above the other."""
        return torch.cat(list(blocks))

    def split(self, part: Tensor, base: BaseArchitecture) -> list[Tensor]:
        """Two halves."""
        return list(part.chunk(2))

"""How a module's tensors are cut over the tensor-parallel group, and what follows from it.

A layer states each cut once (`Sharded.shards`); saving, gathering for export and counting read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mcore_spec.parallel.collectives import gather_without_grad
from mcore_spec.parallel.tensor_parallel import TensorParallel


class Shard(NamedTuple):
    """One tensor's cut.

    Attributes:
        dim: dimension cut over the tensor-parallel group; ``None``: every rank holds all of it.
        size: whole size of `dim` without padding, where it is padded to the group's size.
    """

    dim: int | None
    size: int | None = None


@runtime_checkable
class Sharded(Protocol):
    """A module that states how its own parameters are cut."""

    def shards(self) -> dict[str, Shard]:
        """Parameter name -> cut; buffers that are cut may be among them."""
        ...


class ShardedTensorEntry(NamedTuple):
    """A named tensor of a module, this rank's shard, and its cut."""

    name: str
    tensor: Tensor
    shard: Shard


def sharded_tensors(module: nn.Module) -> Iterator[ShardedTensorEntry]:
    """Every parameter and persistent buffer below `module`, in registration order.

    A parameter whose owner does not state its cut is a fault of ours: saved as replicated it would lose
    the other ranks' shards without a word.
    """
    state = module.state_dict(keep_vars=True)
    for path, child in module.named_modules():
        own = {name for name, _ in child.named_parameters(recurse=False)}
        stated = child.shards() if isinstance(child, Sharded) else {}
        buffers = {name: Shard(None) for name, _ in child.named_buffers(recurse=False)}
        assert own == stated.keys() - buffers, f"{path}: parameters {own} but cuts for {set(stated)}"
        for name, shard in {**stated, **{name: cut for name, cut in buffers.items() if name not in stated}}.items():
            full_name = f"{path}.{name}".lstrip(".")
            if name in own or full_name in state:
                yield ShardedTensorEntry(full_name, state[full_name], shard)


def whole_shape(entry: ShardedTensorEntry, tp: TensorParallel) -> tuple[int, ...]:
    """Shape of the whole, unpadded tensor; every rank can tell it without communication."""
    shape, (dim, size) = list(entry.tensor.shape), entry.shard
    if dim is not None:
        shape[dim] = shape[dim] * tp.size if size is None else size
    return tuple(shape)


@torch.no_grad()
def gather_whole(tensor: Tensor, shard: Shard, tp: TensorParallel) -> Tensor:
    """The whole, unpadded tensor on every rank of the group."""
    if shard.dim is None:
        return tensor.detach()
    whole = gather_without_grad(tensor, shard.dim, tp.group)
    return whole if shard.size is None else whole.narrow(shard.dim, 0, shard.size)


def sharded_state_dict(
    module: nn.Module, prefix: str, *, tp: TensorParallel, metadata: dict[str, Any] | None
) -> dict[str, Any]:
    """megatron-core's description of `module` for `dist_checkpointing`.

    Args:
        module: built of layers that state their cuts.
        prefix: put before every key.
        tp: the group over which the cuts are made.
        metadata: megatron-core's; carries the group over which the module is replicated.
    """
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
    from megatron.core.utils import (
        make_sharded_tensor_for_checkpoint,
        make_tp_sharded_tensor_for_checkpoint,
    )

    groups = {"tp_group": tp.group, "dp_cp_group": ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]}
    entries: dict[str, Any] = {}
    for name, tensor, shard in sharded_tensors(module):
        key = f"{prefix}{name}"
        if shard.dim is None:
            entries[key] = make_sharded_tensor_for_checkpoint(tensor, key, **groups)
        else:
            entries[key] = make_tp_sharded_tensor_for_checkpoint(
                tensor, key, shard.dim, allow_shape_mismatch=shard.size is not None, **groups
            )
    return entries

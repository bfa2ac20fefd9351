"""Scales of weights and activations, and what they make of a tensor.

A scale is that of the whole tensor: it does not depend on the tensor-parallel size, whatever part of
the tensor a rank holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mcore_spec.config.quantization import BLOCK, Scheme
from mcore_spec.errors import ConfigError
from mcore_spec.parallel.collectives import Group, group_size
from mcore_spec.parallel.sharding import Shard
from mcore_spec.parallel.tensor_parallel import TensorParallel
from mcore_spec.quantization.numbers import fake_quantize, scale_of
from mcore_spec.quantization.observers import Observer

_SCALE = "scale"


class WeightQuantizer(nn.Module):
    """The scales of one weight [out, in], of which this rank may hold a part.

    A weight may stand for several, as query, key and value do in one matrix. Scales of channels and blocks are then
    kept for each part in the order of its own rows, as engines' files have them; one scale of the tensor is all parts'.
    """

    order: Tensor

    def __init__(
        self, scheme: Scheme, weight: Tensor, *, cut: int | None, tp: TensorParallel, parts: Sequence[Tensor], name: str
    ) -> None:
        """Allocate scales of one.

        Args:
            scheme: numbers and granularity.
            weight: this rank's, [out, in].
            cut: dimension of the weight that is cut over the ranks; ``None``: each holds all of it.
            tp: those ranks.
            parts: rows of each part, in its own order.
            name: of the linear map, for errors.

        Raises:
            ConfigError: blocks that would lie on two ranks.
        """
        super().__init__()
        self.scheme, self.cut, self.tp = scheme, cut, tp
        self.rows = tuple(len(part) for part in parts)
        order = torch.cat(list(parts)).to(weight.device)
        self.is_ordered = bool((order == torch.arange(len(order), device=order.device)).all())
        self.register_buffer("order", order, persistent=False)
        self.columns = weight.shape[1]
        if scheme.granularity == "block" and tp.size > 1 and cut is not None:
            self._check_blocks(name)
        self.num_parts = len(parts)
        self.num_scales = 1 if scheme.granularity == "tensor" else len(parts)
        for index, shape in enumerate(self._shapes()):
            self.register_buffer(f"{_SCALE}_{index}", torch.ones(shape, dtype=torch.float32, device=weight.device))

    def _check_blocks(self, name: str) -> None:
        sizes = self.rows if self.cut == 0 else (self.columns,)
        if any(size % BLOCK for size in sizes):
            raise ConfigError(
                f"{name}: blocks of {BLOCK} do not divide a rank's {sizes} {'rows' if self.cut == 0 else 'columns'} "
                f"with tensor_model_parallel_size = {self.tp.size}; choose a smaller size, or another recipe"
            )

    def _shapes(self) -> list[tuple[int, ...]]:
        match self.scheme.granularity:
            case "tensor":
                return [(1,)]
            case "channel":
                return [(rows, 1) for rows in self.rows]
        return [(-(-rows // BLOCK), -(-self.columns // BLOCK)) for rows in self.rows]

    def shards(self) -> dict[str, Shard]:
        """How each of the scales is cut over the group."""
        granularity = self.scheme.granularity
        is_cut = granularity == "block" or (granularity == "channel" and self.cut == 0)
        return {name: Shard(self.cut if is_cut else None) for name in self.names()}

    def names(self) -> list[str]:
        """Of the scales."""
        return [f"{_SCALE}_{index}" for index in range(self.num_scales)]

    def scales(self) -> list[Tensor]:
        """This rank's scales, one tensor for all parts or one for each."""
        return [self.get_buffer(name) for name in self.names()]

    @torch.no_grad()
    def amax(self, weight: Tensor) -> list[Tensor]:
        """Largest absolute values behind each scale, float32; all of the tensor-parallel group must call."""
        found = [_largest(part, self.scheme) for part in self._parts(weight.detach().abs())]
        if self.num_scales == 1 and len(found) > 1:
            found = [torch.stack(found).amax(0)]
        is_shared = self.cut is not None and self.shards()[self.names()[0]].dim is None
        return [reduce_max(each.to(torch.float32), self.tp.group if is_shared else None) for each in found]

    @torch.no_grad()
    def set_amax(self, amax: Sequence[Tensor]) -> None:
        """Take the scales that follow from largest absolute values."""
        for scale, each in zip(self.scales(), amax, strict=True):
            scale.copy_(scale_of(each, self.scheme.number))

    def forward(self, weight: Tensor) -> Tensor:
        """[out, in] of this rank -> the same, quantised and back."""
        return fake_quantize(weight, self._expanded(), self.scheme.number)

    def _parts(self, weight: Tensor) -> Sequence[Tensor]:
        return (weight if self.is_ordered else weight[self.order]).split(self.rows)

    def _expanded(self) -> Tensor:
        """Scales of a shape that fits this rank's weight."""
        if self.scheme.granularity == "tensor":
            return self.scales()[0]
        parts = zip(self.scales(), self.rows, strict=True)
        whole = torch.cat([expand_scale(scale, (rows, self.columns)) for scale, rows in parts])
        return whole if self.is_ordered else torch.empty_like(whole).index_copy(0, self.order, whole)

    def extra_repr(self) -> str:
        """The scheme."""
        return str(self.scheme)


def expand_scale(scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """Scales of a tensor [1], of channels [out, 1] or of blocks -> such as fit a weight of `shape`."""
    if scale.dim() == 1 or scale.shape == (shape[0], 1):
        return scale
    rows = scale.repeat_interleave(BLOCK, dim=0)[: shape[0]]
    return rows.repeat_interleave(BLOCK, dim=1)[:, : shape[1]]


def _largest(values: Tensor, scheme: Scheme) -> Tensor:
    match scheme.granularity:
        case "tensor":
            return values.amax().reshape(1)
        case "channel":
            return values.amax(dim=1, keepdim=True)
    rows, columns = values.shape
    padded = F.pad(values, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax(dim=(1, 3))


def reduce_max(values: Tensor, group: Group) -> Tensor:
    """Largest values over the group; what is no number becomes infinity, which every rank then sees."""
    values = values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
    if group_size(group) > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values


class ActivationQuantizer(nn.Module):
    """The scale of one activation [..., n], or how each one's scales are computed."""

    scale_0: Tensor

    def __init__(
        self, scheme: Scheme, *, device: torch.device, group: Group = None, columns: int = BLOCK, name: str = ""
    ) -> None:
        """Allocate a scale of one.

        Args:
            scheme: numbers and granularity.
            device: of the scale.
            group: ranks over which the last dimension is cut; ``None``: it is not.
            columns: this rank's size of the last dimension.
            name: of the linear map, for errors.

        Raises:
            ConfigError: blocks that would lie on two ranks.
        """
        super().__init__()
        self.scheme, self.group = scheme, group
        # Set while a calibration looks at activations.
        self.observer: Observer | None = None
        if not scheme.is_dynamic:
            self.register_buffer(f"{_SCALE}_0", torch.ones(1, dtype=torch.float32, device=device))
        elif scheme.granularity == "block" and group_size(group) > 1 and columns % BLOCK:
            raise ConfigError(
                f"{name}: blocks of {BLOCK} do not divide a rank's {columns} columns with tensor_model_parallel_size = "
                f"{group_size(group)}; choose a smaller size, or another recipe"
            )

    @torch.no_grad()
    def set_amax(self, amax: Tensor) -> None:
        """Take the scale that follows from the largest absolute value, [1]."""
        self.scale_0.copy_(scale_of(amax, self.scheme.number))

    def observe(self, x: Tensor) -> None:
        """Let the observer see what would be quantised, if one is there."""
        if self.observer is not None:
            self.observer(x.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> the same, quantised and back."""
        number = self.scheme.number
        if not self.scheme.is_dynamic:
            return fake_quantize(x, self.scale_0, number)
        if self.scheme.granularity == "token":
            amax = reduce_max(x.detach().abs().amax(dim=-1, keepdim=True).to(torch.float32), self.group)
            return fake_quantize(x, scale_of(amax, number), number)
        blocks = F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
        amax = blocks.detach().abs().amax(dim=-1, keepdim=True)
        return fake_quantize(blocks, scale_of(amax, number), number).flatten(-2)[..., : x.shape[-1]]

    def extra_repr(self) -> str:
        """The scheme."""
        return str(self.scheme)


class LinearQuantizer(nn.Module):
    """The quantisers of one linear map."""

    def __init__(self, weight: WeightQuantizer, activation: ActivationQuantizer) -> None:
        """Take both."""
        super().__init__()
        self.weight, self.activation = weight, activation

    def __repr__(self) -> str:
        """One line: this is what a printed model says of each linear map."""
        return f"weight {self.weight.scheme}; activation {self.activation.scheme}"


class KeyValueQuantizer(nn.Module):
    """The quantisers of one attention's keys and values."""

    def __init__(self, scheme: Scheme, *, device: torch.device) -> None:
        """Allocate scales of one."""
        super().__init__()
        self.key, self.value = (ActivationQuantizer(scheme, device=device) for _ in range(2))

    def __repr__(self) -> str:
        """One line."""
        return f"keys and values {self.key.scheme}"

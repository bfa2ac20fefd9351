"""Scales of weights and activations, and what they make of a tensor.

A scale is that of the whole tensor: it does not depend on the tensor-parallel size, whatever part of
the tensor a rank holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mcore_spec.config.quantization import BLOCK, Scheme
from mcore_spec.errors import ConfigError
from mcore_spec.parallel.collectives import Group, group_size
from mcore_spec.parallel.sharding import Shard
from mcore_spec.parallel.tensor_parallel import TensorParallel
from mcore_spec.quantization.gradients import GradientQuantizer
from mcore_spec.quantization.numbers import fake_quantize, scale_of
from mcore_spec.quantization.observers import Observer
from mcore_spec.quantization.scales import Scales, reduce_max


class WeightQuantizer(Scales):
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
        self.add_scales(self._shapes(), device=weight.device)

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

    def scale_shard(self) -> Shard:
        """See `Scales`."""
        granularity = self.scheme.granularity
        is_cut = granularity == "block" or (granularity == "channel" and self.cut == 0)
        return Shard(self.cut if is_cut else None)

    @property
    def is_shared(self) -> bool:
        """Whether scales are those of weights of several ranks, each of which has all scales."""
        return self.cut is not None and self.scale_shard().dim is None

    def num_behind(self) -> int:
        """How many numbers of the whole weight have one scale."""
        whole_rows = sum(self.rows) * (self.tp.size if self.cut == 0 else 1)
        whole_columns = self.columns * (self.tp.size if self.cut == 1 else 1)
        return {"tensor": whole_rows * whole_columns, "channel": whole_columns}.get(
            self.scheme.granularity, BLOCK * BLOCK
        )

    @torch.no_grad()
    def amax(self, weight: Tensor) -> list[Tensor]:
        """Largest absolute values behind each scale, float32; all of the tensor-parallel group must call."""
        found = [_largest(part, self.scheme) for part in self._parts(weight.detach().abs())]
        if self.num_scales == 1 and len(found) > 1:
            found = [torch.stack(found).amax(0)]
        return [reduce_max(each.to(torch.float32), self.tp.group if self.is_shared else None) for each in found]

    @torch.no_grad()
    def set_amax(self, amax: Sequence[Tensor]) -> None:
        """Take the scales that follow from largest absolute values."""
        for scale, each in zip(self.stored(), amax, strict=True):
            scale.copy_(scale_of(each, self.scheme.number))

    def forward(self, weight: Tensor) -> Tensor:
        """[out, in] of this rank -> the same, quantised and back."""
        return self.rounded(weight, self.row_scales())

    def rounded(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The same with scales that `row_scales` gave."""
        return _fake_quantize_rows(weight, scale, self.scheme)

    def row_scales(self) -> Tensor:
        """One scale [1, 1], or those of this rank's rows, one [out, 1] or one for each block [out, blocks]."""
        if self.scheme.granularity == "tensor":
            return self.scales()[0].reshape(1, 1)
        parts = zip(self.scales(), self.rows, strict=True)
        whole = torch.cat([expand_rows(scale, rows) for scale, rows in parts])
        return whole if self.is_ordered else torch.empty_like(whole).index_copy(0, self.order, whole)

    def _parts(self, weight: Tensor) -> Sequence[Tensor]:
        return (weight if self.is_ordered else weight[self.order]).split(self.rows)

    def extra_repr(self) -> str:
        """The scheme."""
        return str(self.scheme)


def expand_scale(scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """Scales of a tensor [1], of channels [out, 1] or of blocks -> such as fit a weight of `shape`."""
    if scale.dim() == 1 or scale.shape == (shape[0], 1):
        return scale
    return expand_rows(scale, shape[0]).repeat_interleave(BLOCK, dim=1)[:, : shape[1]]


def expand_rows(scale: Tensor, num_rows: int) -> Tensor:
    """Scales of channels [out, 1] or of blocks -> of each of the rows, [out, 1] or [out, blocks of inputs]."""
    return scale if scale.shape[0] == num_rows else scale.repeat_interleave(BLOCK, dim=0)[:num_rows]


def _largest(values: Tensor, scheme: Scheme) -> Tensor:
    match scheme.granularity:
        case "tensor":
            return values.amax().reshape(1)
        case "channel":
            return values.amax(dim=1, keepdim=True)
    rows, columns = values.shape
    padded = F.pad(values, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax(dim=(1, 3))


class ActivationQuantizer(Scales):
    """The scale of one activation [..., n], or how each one's scales are computed."""

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
            self.add_scales([(1,)], device=device)
        elif scheme.granularity == "block" and group_size(group) > 1 and columns % BLOCK:
            raise ConfigError(
                f"{name}: blocks of {BLOCK} do not divide a rank's {columns} columns with tensor_model_parallel_size = "
                f"{group_size(group)}; choose a smaller size, or another recipe"
            )

    @torch.no_grad()
    def set_amax(self, amax: Tensor) -> None:
        """Take the scale that follows from the largest absolute value, [1]."""
        self.stored()[0].copy_(scale_of(amax, self.scheme.number))

    def observe(self, x: Tensor) -> None:
        """Let the observer see what would be quantised, if one is there."""
        if self.observer is not None:
            self.observer(x.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> the same, quantised and back."""
        return _fake_quantize_rows(x, self.row_scales(x), self.scheme)

    def row_scales(self, x: Tensor) -> Tensor:
        """One scale [1], or those of the rows of `x` [..., n], one [..., 1] or one for each block [..., blocks]."""
        if not self.scheme.is_dynamic:
            return self.scales()[0]
        sizes = (x if self.scheme.granularity == "token" else _blocks(x)).detach().abs()
        if self.scheme.granularity == "token":
            amax = reduce_max(sizes.amax(dim=-1, keepdim=True).to(torch.float32), self.group)
        else:
            amax = sizes.amax(dim=-1)
        return scale_of(amax, self.scheme.number)

    def extra_repr(self) -> str:
        """The scheme."""
        return str(self.scheme)


def _fake_quantize_rows(x: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """[..., n] quantised and back, with scales that fit it, or one for each block [..., blocks]."""
    if scheme.granularity != "block":
        return fake_quantize(x, scale, scheme.number)
    return fake_quantize(_blocks(x), scale[..., None], scheme.number).flatten(-2)[..., : x.shape[-1]]


def _blocks(x: Tensor) -> Tensor:
    """[..., n] -> [..., blocks, BLOCK], the last one filled up with zeros."""
    missing = -x.shape[-1] % BLOCK
    # torch copies where nothing is missing.
    whole = F.pad(x, (0, missing)) if missing else x
    return whole.unflatten(-1, (-1, BLOCK))


class LinearQuantizer(nn.Module):
    """The quantisers of one linear map."""

    def __init__(
        self, weight: WeightQuantizer, activation: ActivationQuantizer, gradient: GradientQuantizer | None = None
    ) -> None:
        """Take them; the gradient's is there where FP8 numbers are multiplied."""
        super().__init__()
        self.weight, self.activation, self.gradient = weight, activation, gradient

    def __repr__(self) -> str:
        """One line: this is what a printed model says of each linear map."""
        described = f"weight {self.weight.scheme}; activation {self.activation.scheme}"
        return described if self.gradient is None else f"{described}; FP8 products, gradient {self.gradient.scheme}"


class KeyValueQuantizer(nn.Module):
    """The quantisers of one attention's keys and values."""

    def __init__(self, scheme: Scheme, *, device: torch.device) -> None:
        """Allocate scales of one."""
        super().__init__()
        self.key, self.value = (ActivationQuantizer(scheme, device=device) for _ in range(2))

    def __repr__(self) -> str:
        """One line."""
        return f"keys and values {self.key.scheme}"

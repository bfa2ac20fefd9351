"""What quantisers have in common: their scales, which a calibration finds and training may go on with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from mcore_spec.config.quantization import Number
from mcore_spec.parallel.collectives import Group, copy_to_group, group_size
from mcore_spec.parallel.sharding import Shard
from mcore_spec.quantization.numbers import FORMATS

_SCALE = "scale"
# Begins the names of what is trained.
LEARNED = "log_growth"


class Scales(nn.Module):
    """Scales as a calibration found them; where they are learned, times what training made of them.

    What is trained is the logarithm of that factor, zero at first: scales stay positive, and a step of Adam changes
    large and small ones by the same share (Jain et al., arXiv 1903.08066). Its gradient is that of a learned step size
    with its factor 1 / sqrt(numbers that have the scale x largest number) (Esser et al., arXiv 1902.08153).
    """

    def __init__(self) -> None:
        """No scales yet."""
        super().__init__()
        self.num_scales = 0
        self.gradient_factor = 1.0
        self.gradient_group: Group = None

    def add_scales(self, shapes: Sequence[tuple[int, ...]], *, device: torch.device) -> None:
        """Allocate scales of one."""
        self.num_scales = len(shapes)
        for index, shape in enumerate(shapes):
            self.register_buffer(f"{_SCALE}_{index}", torch.ones(shape, dtype=torch.float32, device=device))

    def _apply(self, fn: Any, recurse: bool = True) -> Scales:
        """Move with the model; scales stay what they are where its dtype becomes a shorter one."""
        before = self.stored()
        super()._apply(fn, recurse)
        for name, scale in zip(self.names(), before, strict=True):
            moved = self.get_buffer(name)
            if moved.dtype.itemsize < scale.dtype.itemsize:
                self.register_buffer(name, scale.to(moved.device))
        return self

    def scale_shard(self) -> Shard:
        """How each scale is cut over the tensor-parallel group."""
        return Shard(None)

    def shards(self) -> dict[str, Shard]:
        """See `Sharded`."""
        return dict.fromkeys((*self.names(), *self.learned()), self.scale_shard())

    def names(self) -> list[str]:
        """Of the calibrated scales."""
        return [f"{_SCALE}_{index}" for index in range(self.num_scales)]

    def stored(self) -> list[Tensor]:
        """This rank's calibrated scales."""
        return [self.get_buffer(name) for name in self.names()]

    def learned(self) -> dict[str, nn.Parameter]:
        """What is trained, by name; empty where scales are fixed."""
        return dict(self.named_parameters(recurse=False))

    def scales(self) -> list[Tensor]:
        """This rank's scales as they are now."""
        learned = self.learned().values()
        if not learned:
            return self.stored()
        return [
            scale * _with_gradient_of(growth.to(scale.dtype), self.gradient_factor, self.gradient_group).exp()
            for scale, growth in zip(self.stored(), learned, strict=True)
        ]

    def learn(
        self,
        number: Number,
        *,
        num_behind: int,
        group: Group,
        dtype: torch.dtype,
        shared: dict[str, nn.Parameter] | None = None,
    ) -> dict[str, nn.Parameter]:
        """Let training change the scales.

        Args:
            number: that stands for what they scale.
            num_behind: how many numbers of the whole tensor have one scale.
            group: over whose ranks a scale's gradient is summed; ``None``: each has all of it.
            dtype: of the model's parameters: optimizers do not take two.
            shared: another quantiser's, whose scales are to stay the same as these.

        Returns:
            What is trained.
        """
        self.gradient_factor = 1 / math.sqrt(num_behind * FORMATS[number].largest)
        self.gradient_group = group
        for index, scale in enumerate(self.stored()):
            name = f"{LEARNED}_{index}"
            own = nn.Parameter(torch.zeros_like(scale, dtype=dtype)) if shared is None else shared[name]
            self.register_parameter(name, own)
        return self.learned()


class _ScaleGradient(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def _with_gradient_of(value: Tensor, factor: float, group: Group) -> Tensor:
    """The value; its gradient is summed over the group and multiplied."""
    scaled: Tensor = _ScaleGradient.apply(value, factor)
    return copy_to_group(scaled, group)


def reduce_max(values: Tensor, group: Group) -> Tensor:
    """Largest values over the group; what is no number becomes infinity, which every rank then sees."""
    values = values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
    if group_size(group) > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values

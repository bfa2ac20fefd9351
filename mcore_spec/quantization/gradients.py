"""Rounding gradients where linear maps multiply FP8 numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mcore_spec.config.quantization import GradientScaling, QuantizationRecord, Scheme
from mcore_spec.parallel.collectives import Group
from mcore_spec.quantization.numbers import encode, scale_of
from mcore_spec.quantization.scales import reduce_max
from mcore_spec.quantization.targets import Target

# Steps whose largest gradients a delayed scale comes from.
HISTORY = 16


class Numbers(NamedTuple):
    """What was rounded: numbers in storage, and their scale, [1] or [rows, 1]."""

    numbers: Tensor
    scale: Tensor


class GradientQuantizer(nn.Module):
    """Rounds gradients to numbers that are multiplied: one scale, or one for each row."""

    history: Tensor
    seen: Tensor

    def __init__(self, scheme: Scheme, *, device: torch.device, group: Group, scaling: GradientScaling) -> None:
        """Nothing was seen.

        Args:
            scheme: of a tensor or of tokens.
            device: of the gradients.
            group: ranks over which the gradient's last dimension is cut; ``None``: it is not.
            scaling: "delayed": the one scale is that of the largest values of the steps before.
        """
        super().__init__()
        self.scheme, self.group, self.scaling = scheme, group, scaling
        if scaling == "delayed":
            self.register_buffer("history", torch.zeros(HISTORY, dtype=torch.float32, device=device))
            self.register_buffer("seen", torch.zeros(1, dtype=torch.float32, device=device), persistent=False)

    def encode(self, grad: Tensor, *, is_whole: bool = False) -> Numbers:
        """[rows, n] -> its numbers; with `is_whole` the last dimension is not cut over ranks."""
        group = None if is_whole else self.group
        sizes = grad.abs()
        if self.scheme.granularity == "token":
            amax = reduce_max(sizes.amax(dim=-1, keepdim=True).to(torch.float32), group)
        else:
            amax = reduce_max(sizes.amax().reshape(1).to(torch.float32), group)
        scale = scale_of(self._delayed(amax) if self.scaling == "delayed" else amax, self.scheme.number)
        return Numbers(encode(grad, scale, self.scheme.number), scale)

    def _delayed(self, amax: Tensor) -> Tensor:
        """What the steps before say; of the first step its own. A gradient without numbers is not hidden by a cut."""
        self.seen.copy_(torch.maximum(self.seen, amax))
        before = self.history.amax(dim=0, keepdim=True)
        return torch.where((before > 0) & torch.isfinite(amax), before, amax)

    @torch.no_grad()
    def finish_step(self, largest: Tensor) -> None:
        """Remember the largest value of the step on all ranks, [1]; a step without numbers is skipped."""
        if bool(torch.isfinite(largest)):
            self.history.copy_(torch.cat((largest, self.history[:-1])))
        self.seen.zero_()

    def extra_repr(self) -> str:
        """The scheme."""
        return f"{self.scheme}, {self.scaling}"


def gradient_quantizer(target: Target, record: QuantizationRecord) -> GradientQuantizer | None:
    """Of the gradient of a linear map's output, in a run whose linear maps multiply FP8 numbers."""
    if record.gradient_scaling is None:
        return None
    group = target.tp.group if target.cut == 0 else None
    return GradientQuantizer(
        record.recipe.gradient, device=target.weight.device, group=group, scaling=record.gradient_scaling
    )

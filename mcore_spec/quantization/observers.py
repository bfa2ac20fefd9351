"""What a calibration remembers of an activation, and the largest absolute value that it chooses."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mcore_spec.config.quantization import CalibrationMethod, Number
from mcore_spec.quantization.numbers import fake_quantize, scale_of

NUM_BINS = 2048
# Share of the values that are not cut off, and the cuts among which the squared error is smallest, in bins.
PERCENTILE = 0.9999
_CUTS = range(NUM_BINS // 64, NUM_BINS + 1, NUM_BINS // 64)


class Observer(Protocol):
    """Sees every activation of one place."""

    def __call__(self, x: Tensor) -> None:
        """One activation."""
        ...


class Largest:
    """The largest absolute value, and how many there were."""

    def __init__(self, device: torch.device) -> None:
        """Nothing was seen.

        Args:
            device: of the activations.
        """
        self.amax = torch.zeros(1, dtype=torch.float32, device=device)
        self.num_seen = 0

    def __call__(self, x: Tensor) -> None:
        """NaN stays NaN."""
        if x.numel():
            self.amax = torch.maximum(self.amax, x.abs().amax().to(torch.float32))
            self.num_seen += x.numel()


class Histogram:
    """How many absolute values lie in each of `NUM_BINS` bins up to a largest one."""

    def __init__(self, amax: Tensor) -> None:
        """Nothing was seen.

        Args:
            amax: the largest value of all ranks, [1].
        """
        self.amax = amax
        self.counts = torch.zeros(NUM_BINS, dtype=torch.float64, device=amax.device)

    def __call__(self, x: Tensor) -> None:
        """Count."""
        values = x.abs().flatten().to(torch.float32)
        width = torch.where(self.amax > 0, self.amax, torch.ones_like(self.amax)) / NUM_BINS
        bins = (values / width).to(torch.int64).clamp(max=NUM_BINS - 1)
        self.counts += torch.bincount(bins, minlength=NUM_BINS).to(self.counts.dtype)

    def choose(self, method: CalibrationMethod, number: Number) -> Tensor:
        """The largest value that is not cut off, [1]; `counts` are those of all ranks by now."""
        if method == "percentile":
            reached = (self.counts.cumsum(0) >= PERCENTILE * self.counts.sum()).nonzero()
            return self.amax * (int(reached[0, 0]) + 1) / NUM_BINS
        centres = (torch.arange(NUM_BINS, device=self.amax.device) + 0.5) / NUM_BINS * self.amax
        errors = []
        for cut in _CUTS:
            scale = scale_of(self.amax * cut / NUM_BINS, number)
            errors.append((self.counts * (fake_quantize(centres, scale, number) - centres).double().square()).sum())
        return self.amax * _CUTS[int(torch.stack(errors).argmin())] / NUM_BINS

"""The final norm of a base, for engines and tools whose last state stands before it."""

from __future__ import annotations

from torch import Tensor

from mcore_spec.layers.norm import rms_norm
from mcore_spec.weights.base_directory import BaseDirectory
from mcore_spec.weights.safetensors_io import WeightDirectory

_NAME = "model.norm.weight"


class FinalNorm:
    """A function of hidden states, [..., h] -> [..., h], in their dtype with statistics in float32 at least."""

    def __init__(self, base: BaseDirectory) -> None:
        """Read the weight.

        Raises:
            CheckpointError: it is not there.
        """
        with WeightDirectory(base.directory) as weights:
            self._weight: Tensor = weights.read(_NAME)
        self._eps = base.architecture.rms_norm_eps

    def __call__(self, hidden: Tensor) -> Tensor:
        """The norm of each row."""
        return rms_norm(hidden, self._weight.to(hidden), self._eps)

"""EAGLE-1 (Li et al., arXiv 2401.15077): predicts the base's next last-layer feature.

The first decoder layer has no input norm and there is no final norm; the head is the base's. Trained
over several steps of its own features it is HASS (Zhang et al., arXiv 2408.15766).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mcore_spec.config import BaseArchitecture, EagleConfig
from mcore_spec.drafts.recurrent import RecurrentDraft
from mcore_spec.layers.linear import ShardedLinear
from mcore_spec.parallel.tensor_parallel import Placement


class Eagle1Draft(RecurrentDraft):
    """The EAGLE-1 module."""

    label: ClassVar[str] = "EAGLE-1"

    def __init__(self, config: EagleConfig, base: BaseArchitecture, *, place: Placement) -> None:
        """Allocate this rank's shard.

        Args:
            config: resolved against `base`.
            base: the base model.
            place: group, dtype and device.
        """
        super().__init__(config, base, first_input_norm=False, place=place)
        hidden = base.hidden_size
        self.fc = ShardedLinear(2 * hidden, hidden, shard_dim=1, what="2 x hidden_size", place=place)

    @property
    def projection(self) -> ShardedLinear:
        """fc, of [embedding ; feature]."""
        return self.fc

    def finish(self, x: Tensor) -> Tensor:
        """The predicted feature is the last layer's output."""
        return x

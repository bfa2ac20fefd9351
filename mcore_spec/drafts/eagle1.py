"""EAGLE-1 (Li et al., arXiv 2401.15077): predicts the base's next last-layer feature.

The first decoder layer has no input norm and there is no final norm; the head is the base's. Trained
over several steps of its own features it is HASS (Zhang et al., arXiv 2408.15766).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mcore_spec.config import BaseArchitecture, EagleConfig
from mcore_spec.drafts.draft import Reads
from mcore_spec.drafts.recurrent import RecurrentDraft, decoder_layers
from mcore_spec.drafts.resolve import resolve_rope
from mcore_spec.layers.decoder import LayerShape, init_linear_weights
from mcore_spec.layers.linear import ShardedLinear, project_sharded_columns
from mcore_spec.parallel.tensor_parallel import TensorParallel


class Eagle1Draft(RecurrentDraft):
    """The EAGLE-1 module."""

    reads: ClassVar[Reads] = "last"

    def __init__(
        self,
        config: EagleConfig,
        base: BaseArchitecture,
        *,
        tp: TensorParallel,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate this rank's shard.

        Args:
            config: resolved against `base`.
            base: the base model.
            tp: the tensor-parallel group.
            dtype: parameter dtype.
            device: parameter device.
        """
        super().__init__(tp=tp)
        self.architecture = config.eagle_architecture_config
        args: dict[str, Any] = {"tp": tp, "dtype": dtype, "device": device}
        shape = LayerShape(self.architecture, base, resolve_rope(self.architecture, base))
        self.fc = ShardedLinear(2 * base.hidden_size, base.hidden_size, shard_dim=1, what="2 x hidden_size", **args)
        self.layers = decoder_layers(shape, self.architecture.num_hidden_layers, first_input_norm=False, **args)

    def init_weights(self, *, seed: int) -> None:
        """Normal matrices with standard deviation ``initializer_range``; norms one."""
        init_linear_weights(self, std=self.architecture.initializer_range, seed=seed)

    def join(self, embedding: Tensor, state: Tensor) -> Tensor:
        """fc([embedding ; feature])."""
        return project_sharded_columns(self.fc, torch.cat((embedding, state), dim=-1))

    def finish(self, x: Tensor) -> Tensor:
        """The predicted feature is the last layer's output."""
        return x

"""EAGLE-MTP: the multi-token-prediction module of DeepSeek-V3 (arXiv 2412.19437, section 2.2), applied recurrently.

Its decoder layer is the base's own (query/key norms and qkv bias included); embedding and hidden state
are normed before they are joined; the head is the base's.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mcore_spec.config import BaseArchitecture, EagleConfig
from mcore_spec.drafts.recurrent import RecurrentDraft
from mcore_spec.layers.linear import ShardedLinear, project_sharded_columns
from mcore_spec.layers.norm import RMSNorm
from mcore_spec.parallel.tensor_parallel import Placement


class MTPDraft(RecurrentDraft):
    """The EAGLE-MTP module."""

    label: ClassVar[str] = "EAGLE-MTP"

    def __init__(self, config: EagleConfig, base: BaseArchitecture, *, place: Placement) -> None:
        """Allocate this rank's shard.

        Args:
            config: resolved against `base`.
            base: the base model.
            place: group, dtype and device.
        """
        super().__init__(config, base, first_input_norm=True, place=place)
        self.starts_from_base = config.eagle_reuse_base_decoder
        hidden, eps = base.hidden_size, self.shape.eps
        self.enorm = RMSNorm(hidden, eps=eps, place=place)
        self.hnorm = RMSNorm(hidden, eps=eps, place=place)
        self.eh_proj = ShardedLinear(2 * hidden, hidden, shard_dim=1, what="2 x hidden_size", place=place)
        self.norm = RMSNorm(hidden, eps=eps, place=place)

    def layer_of_base(self) -> nn.Module | None:
        """The first layer, where the configuration says so."""
        return self.layers[0] if self.starts_from_base else None

    def join(self, embedding: Tensor, state: Tensor) -> Tensor:
        """eh_proj([norm(embedding) ; norm(hidden)])."""
        joined = torch.cat((self.enorm(embedding), self.hnorm(state)), dim=-1)
        return project_sharded_columns(self.eh_proj, joined)

    def finish(self, x: Tensor) -> Tensor:
        """The final norm; its output is fed back, as MiMo's engines do."""
        return self.norm(x)

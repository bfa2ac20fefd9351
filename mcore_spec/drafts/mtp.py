"""EAGLE-MTP: the multi-token-prediction module of DeepSeek-V3 (arXiv 2412.19437, section 2.2), applied recurrently.

Its decoder layer is the base's own (query/key norms and qkv bias included); embedding and hidden state
are normed before they are joined; the head is the base's.
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
from mcore_spec.layers.norm import RMSNorm
from mcore_spec.parallel.tensor_parallel import TensorParallel


class MTPDraft(RecurrentDraft):
    """The EAGLE-MTP module."""

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
        hidden = base.hidden_size
        self.enorm = RMSNorm(hidden, eps=shape.eps, **args)
        self.hnorm = RMSNorm(hidden, eps=shape.eps, **args)
        self.eh_proj = ShardedLinear(2 * hidden, hidden, shard_dim=1, what="2 x hidden_size", **args)
        self.layers = decoder_layers(shape, self.architecture.num_hidden_layers, first_input_norm=True, **args)
        self.norm = RMSNorm(hidden, eps=shape.eps, **args)

    def init_weights(self, *, seed: int) -> None:
        """Normal matrices with standard deviation ``initializer_range``; norms one."""
        init_linear_weights(self, std=self.architecture.initializer_range, seed=seed)

    def join(self, embedding: Tensor, state: Tensor) -> Tensor:
        """eh_proj([norm(embedding) ; norm(hidden)])."""
        joined = torch.cat((self.enorm(embedding), self.hnorm(state)), dim=-1)
        return project_sharded_columns(self.eh_proj, joined)

    def finish(self, x: Tensor) -> Tensor:
        """The final norm; its output is fed back, as MiMo's engines do."""
        return self.norm(x)

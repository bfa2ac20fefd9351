"""EAGLE-MTP: the multi-token-prediction module of DeepSeek-V3 (arXiv 2412.19437, section 2.2), applied recurrently.

Its decoder layer is the base's own (query/key norms and qkv bias included); embedding and hidden state
are normed before they are joined; the head is the base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from mcore_spec.config import BaseArchitecture, EagleConfig
from mcore_spec.drafts.draft import Reads
from mcore_spec.drafts.recurrent import Joined, RecurrentDraft
from mcore_spec.drafts.steps import StepOutput
from mcore_spec.layers.attention import Rows
from mcore_spec.layers.linear import ShardedLinear
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

    @property
    def projection(self) -> ShardedLinear:
        """eh_proj, of [norm(embedding) ; norm(hidden)]."""
        return self.eh_proj

    def prepare(self, embedding: Tensor, state: Tensor) -> Joined:
        """Both normed."""
        return Joined(self.enorm(embedding), self.hnorm(state))

    @property
    def last_norm(self) -> RMSNorm:
        """The module's own."""
        return self.norm

    @property
    def hands_on_size(self) -> bool:
        """The state is normed before it is joined."""
        return False

    def finish(self, x: Tensor) -> Tensor:
        """The final norm; its output is fed back, as MiMo's engines do."""
        return self.norm(x)


class MiMoDraft(MTPDraft):
    """EAGLE-MTP as engines compute MiMo's layer (Xiaomi, arXiv 2505.07608), for bases that its layout can hold.

    Three things differ: the base's hidden state is read before the final norm, `eh_proj` takes it before the embedding,
    and the row at position 0 reads no token.
    """

    reads: ClassVar[Reads] = "aux"
    state_comes_first: ClassVar[bool] = True

    @property
    def aux_layer_ids(self) -> tuple[int, ...]:
        """The base's last layer."""
        return self.architecture.eagle_aux_hidden_state_layer_ids

    def step(self, state: Tensor, embedding: Tensor, rows: Sequence[Rows]) -> StepOutput:
        """One step; arguments as of `StepwiseDraft.step`."""
        num_rows = embedding.shape[0] * (self.tp.size if self.tp.sequence_parallel else 1)
        is_first = self.tp.own_rows(rows[0].places(num_rows, embedding.device).positions == 0)
        return super().step(state, embedding.masked_fill(is_first[:, None, None], 0.0), rows)

    def facts(self) -> list[str]:
        """Which state it reads."""
        return ["reads the base's last layer before its final norm, as MiMo", *super().facts()]


def build_mtp(config: EagleConfig, base: BaseArchitecture, *, place: Placement) -> MTPDraft:
    """The module; which of the two its resolved configuration says."""
    draft_class = MiMoDraft if config.eagle_architecture_config.eagle_aux_hidden_state_layer_ids else MTPDraft
    return draft_class(config, base, place=place)

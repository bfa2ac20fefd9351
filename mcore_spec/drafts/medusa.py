"""Medusa (Cai et al., arXiv 2401.10774): head i predicts token x[t+2+i] from the base's last hidden state.

Inside the heads every rank holds whole rows and its own share of the features; gradients of whole rows
are one term a rank, summed where the rows entered the parallel region. The base is frozen, so that there they end.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mcore_spec.config import BaseArchitecture, MedusaConfig
from mcore_spec.drafts.draft import Draft, Reads
from mcore_spec.layers.linear import ShardedLinear, VocabularyHead
from mcore_spec.parallel.collectives import gather
from mcore_spec.parallel.documents import Documents
from mcore_spec.parallel.tensor_parallel import Placement


class ResidualBlock(nn.Module):
    """z + SiLU(W z + b), W's rows sharded; the identity at the start."""

    def __init__(self, hidden_size: int, *, place: Placement) -> None:
        """Allocate this rank's rows.

        Args:
            hidden_size: width.
            place: group, dtype and device.
        """
        super().__init__()
        self.linear = ShardedLinear(hidden_size, hidden_size, shard_dim=0, bias=True, what="hidden_size", place=place)

    def forward(self, z: Tensor) -> Tensor:
        """[s, b, h], inside the parallel region -> the same."""
        return z + gather(F.silu(self.linear(z)), -1, self.linear.tp.group, grad_is_partial=True)


class MedusaHead(nn.Module):
    """Residual blocks and a head of its own."""

    def __init__(self, num_layers: int, *, hidden_size: int, vocab_size: int, place: Placement) -> None:
        """Allocate this rank's shard.

        Args:
            num_layers: residual blocks.
            hidden_size: width of the base.
            vocab_size: tokens that it can propose.
            place: group, dtype and device.
        """
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(hidden_size, place=place) for _ in range(num_layers))
        self.lm_head = VocabularyHead(hidden_size, vocab_size, place=place)

    def forward(self, z: Tensor) -> Tensor:
        """[s, b, h], inside the parallel region -> what the head reads, the same."""
        for block in self.blocks:
            z = block(z)
        return z


class MedusaDraft(Draft):
    """All heads."""

    label: ClassVar[str] = "Medusa"
    reads: ClassVar[Reads] = "last"
    reads_tokens: ClassVar[bool] = False

    def __init__(self, config: MedusaConfig, base: BaseArchitecture, *, place: Placement) -> None:
        """Allocate this rank's shard.

        Args:
            config: number of heads and layers.
            base: the base model.
            place: group, dtype and device.
        """
        super().__init__(tp=place.tp)
        self.config = config
        hidden, vocab_size = base.hidden_size, config.draft_vocab_size or base.vocab_size
        self.reserve_vocabulary(vocab_size, base_size=base.vocab_size, device=place.device)
        self.heads = nn.ModuleList(
            MedusaHead(config.medusa_num_layers, hidden_size=hidden, vocab_size=vocab_size, place=place)
            for _ in range(config.medusa_num_heads)
        )

    def medusa_heads(self) -> list[MedusaHead]:
        """The heads, in the order of the tokens that they predict."""
        return [head for head in self.heads if isinstance(head, MedusaHead)]

    def own_heads(self) -> list[VocabularyHead]:
        """One a head."""
        return [head.lm_head for head in self.medusa_heads()]

    def facts(self) -> list[str]:
        """How many tokens it knows, where they are fewer than the base's."""
        return [f"draft vocabulary {self.own_heads()[0].vocab_size:,}"] if self.has_reduced_vocabulary else []

    @torch.no_grad()
    def init_weights(self, *, seed: int) -> None:
        """Zero residual blocks, as in the paper: an untrained head is the base's; `seed` is not needed."""
        for name, parameter in self.heads.named_parameters():
            if ".blocks." in name:
                parameter.zero_()

    def forward(self, features: Tensor, *, documents: Documents | None = None) -> list[Tensor]:
        """Logits of every head, for serving: training never holds logits of all rows, see `states`.

        Args:
            features: the base's last hidden state after its final norm [s or s/size, b, h].
            documents: taken as the other drafts take it; there is no attention, so every row is computed by
                itself and the bounds change nothing.

        Returns:
            One a head, this rank's [s, b, padded vocabulary / size]; entry i is the base's token
            `head_token_ids`[i].
        """
        states = self.states(features)
        return [head.lm_head(state) for head, state in zip(self.medusa_heads(), states, strict=True)]

    def states(self, features: Tensor, *, recompute: bool = False) -> list[Tensor]:
        """What every head reads: the output of its residual blocks.

        Args:
            features: the base's last hidden state after its final norm [s or s/size, b, h].
            recompute: keep no activations between the blocks; compute them again in backward.

        Returns:
            One a head [s, b, h], inside the parallel region.
        """
        z = self.tp.enter(features)
        if not recompute:
            return [head(z) for head in self.heads]
        # Nothing is drawn at random: there is no random state to keep.
        return [checkpoint(head, z, use_reentrant=False, preserve_rng_state=False) for head in self.heads]

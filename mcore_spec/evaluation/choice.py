"""From logits that are sharded by vocabulary to tokens: the likeliest ones, or drawn ones.

Vocabulary padding is never chosen, of equal logits the lowest id is, and every rank of the group comes to one result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_spec.losses.softmax import all_reduce, row_peak
from mcore_spec.parallel.collectives import gather_without_grad
from mcore_spec.parallel.tensor_parallel import TensorParallel


@dataclass(frozen=True, kw_only=True)
class HeadVocabulary:
    """Which tokens the columns of a rank's logits are.

    Attributes:
        size: entries of the head's vocabulary, without padding.
        vocab_size: entries of the base's vocabulary.
        target_ids: base token id of each entry, int64 [size]; ``None``: entry i is token i.
        tp: the group over which the entries are cut, evenly with padding.
    """

    size: int
    vocab_size: int
    target_ids: Tensor | None
    tp: TensorParallel

    def likeliest(self, logits: Tensor, num: int) -> Tensor:
        """The `num` likeliest tokens of each row, in falling order.

        Args:
            logits: this rank's columns, padding included, [n, padded size / ranks].
            num: at most the size of the vocabulary.

        Returns:
            Base token ids, int64 [n, num].
        """
        first = self.tp.rank * logits.shape[1]
        valid = logits[:, : max(0, self.size - first)]
        found: list[Tensor] = []
        for index in range(num):
            if index > 0:
                local = found[-1] - first
                is_here = (local >= 0) & (local < valid.shape[1])
                hidden = torch.where(is_here, local, 0)[:, None]
                valid = valid.clone() if index == 1 else valid
                if valid.shape[1]:
                    old = valid.gather(1, hidden)
                    valid.scatter_(1, hidden, old.masked_fill(is_here[:, None], float("-inf")))
            found.append(all_reduce(row_peak(valid, first, self.tp.group).entry, dist.ReduceOp.MIN, self.tp.group))
        entries = torch.stack(found, dim=1)
        return entries if self.target_ids is None else self.target_ids[entries]

    def whole_logits(self, logits: Tensor) -> Tensor:
        """[n, padded size / ranks] -> [n, size] on every rank of the group."""
        return gather_without_grad(logits, 1, self.tp.group)[:, : self.size]

    def probabilities(self, logits: Tensor, temperature: float) -> Tensor:
        """Softmax of the logits over `temperature`, float64 [n, base vocabulary]; zero for unknown tokens."""
        own = (self.whole_logits(logits).double() / temperature).softmax(dim=1)
        if self.target_ids is None:
            return own
        return own.new_zeros(own.shape[0], self.vocab_size).index_copy_(1, self.target_ids, own)


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """One entry of each row with probability proportional to its weight, by inverting the cumulative sum.

    Args:
        weights: not negative, not all zero, [n, size].
        uniforms: in [0, 1), [n].

    Returns:
        int64 [n].
    """
    sums = weights.cumsum(dim=1)
    entries = torch.searchsorted(sums, (uniforms * sums[:, -1])[:, None], right=True)[:, 0]
    # Rounding may lead behind the last entry that has weight.
    size = weights.shape[1]
    last = size - 1 - (weights.flip(1) > 0).int().argmax(dim=1)
    return torch.minimum(entries, last)


class Kept(NamedTuple):
    """What becomes of proposals, both int64 [n].

    Attributes:
        num: how many are kept, from the first.
        next_ids: the token behind them.
    """

    num: Tensor
    next_ids: Tensor


def verify_by_rejection(proposed: Tensor, draft: Tensor, base: Tensor, uniforms: Tensor, final: Tensor) -> Kept:
    """Speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1): the base's distribution exactly.

    A proposed token d is kept with probability min(1, p(d) / q(d)); the first that is not is replaced by a draw from
    max(p - q, 0); behind the last one the base's own distribution is drawn from.

    Args:
        proposed: int64 [n, k], drawn from `draft`.
        draft: q, [n, k, vocabulary].
        base: p, [n, k + 1, vocabulary].
        uniforms: in [0, 1), [n, k].
        final: in [0, 1), [n].
    """
    num_rows, num_steps = proposed.shape
    index = proposed[..., None]
    p, q = base[:, :num_steps].gather(2, index)[..., 0], draft.gather(2, index)[..., 0]
    is_kept = uniforms * q < p
    num_kept = is_kept.int().cumprod(dim=1).sum(dim=1)
    rows = torch.arange(num_rows, device=base.device)
    no_draft = draft.new_zeros(num_rows, 1, draft.shape[2])
    rest = (base[rows, num_kept] - torch.cat((draft, no_draft), dim=1)[rows, num_kept]).clamp(min=0)
    # Where p and q are one distribution but for rounding, nothing is rejected but by rounding.
    is_empty = rest.sum(dim=1, keepdim=True) <= 0
    return Kept(num_kept, draw(torch.where(is_empty, base[rows, num_kept], rest), final))

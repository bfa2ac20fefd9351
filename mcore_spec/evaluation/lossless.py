"""Whether greedy decoding with a draft says what the base says alone, and where it does not, why.

The base computes the same logits in other groups of rows, so that rounding may turn the order of two tokens that are
equally likely but for rounding. Such a tie is told from a fault by computing the logits at that place once more in
both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn import functional as F

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.evaluation.choice import HeadVocabulary
from mcore_spec.evaluation.drafters import RowShare
from mcore_spec.layers.cache import KeyValueCache, NewRows, Span
from mcore_spec.quantization.installed import quantization_of

# A gap of at most this many times the measured rounding is a tie.
TIE_FACTOR = 4.0
# Two ways to compute the same logits that differ by more than this many units in the last place of the largest one
# are not explained by rounding.
MAX_ROUNDING_UNITS = 64.0


class Difference(NamedTuple):
    """The first token in which two answers differ.

    Attributes:
        name: of the request.
        position: of the token in the answer, from 0.
        speculative: token with the draft.
        plain: token without it.
        gap: between the two tokens' logits.
        rounding: largest difference between the base's logits there, computed in two ways.
        is_tie: whether rounding explains it.
    """

    name: str
    position: int
    speculative: int
    plain: int
    gap: float
    rounding: float
    is_tie: bool

    def describe(self) -> str:
        """One line."""
        return (
            f"{self.name}: token {self.position + 1} of the answer is {self.speculative} with the draft and "
            f"{self.plain} without; their logits are {self.gap:.3g} apart, rounding there is {self.rounding:.3g}"
        )


@torch.no_grad()
def find_difference(
    model: GPTModel,
    prompt: Sequence[int],
    speculative: Sequence[int],
    plain: Sequence[int],
    *,
    name: str,
    num_rows: int,
) -> Difference | None:
    """Compare two answers to a prompt; every rank of the model must call.

    Args:
        model: this rank's part.
        prompt: token ids.
        speculative: answer with the draft.
        plain: answer without it.
        name: of the request.
        num_rows: of a verification pass.
    """
    equal = [ours == theirs for ours, theirs in zip(speculative, plain, strict=False)]
    if all(equal) and len(speculative) == len(plain):
        return None
    position = equal.index(False) if False in equal else len(equal)
    # Answers end by one rule: as long as they are equal, so is where they end.
    assert position < min(len(speculative), len(plain)), "one answer is the beginning of the other"
    ours, theirs = speculative[position], plain[position]
    token_ids = [*prompt, *plain[:position]]
    numbers = _measure(model, token_ids, num_last=min(num_rows, len(token_ids) - 1), pair=(ours, theirs))
    gap, rounding, largest = numbers
    unit = _resolution(model) * largest
    is_tie = rounding <= MAX_ROUNDING_UNITS * unit and gap <= TIE_FACTOR * max(rounding, unit)
    return Difference(name, position, ours, theirs, gap, rounding, is_tie)


def _resolution(model: GPTModel) -> float:
    """Relative size of what rounding may change of a number.

    Where inputs of linear maps are quantised, a difference in the last place may make another number of one of them.
    That moves the product of n inputs by a share of one of them; bfloat16's resolution is about as much.
    """
    resolution = torch.finfo(model.config.params_dtype).eps
    return resolution if quantization_of(model) is None else max(resolution, torch.finfo(torch.bfloat16).eps)


class _Measured(NamedTuple):
    """Gap of two logits, rounding, and the largest logit by magnitude."""

    gap: float
    rounding: float
    largest: float


def _measure(model: GPTModel, token_ids: list[int], *, num_last: int, pair: tuple[int, int]) -> _Measured:
    base = MegatronBase(model)
    whole = _last_logits(base, token_ids, cut=0)
    parts = _last_logits(base, token_ids, cut=len(token_ids) - num_last) if num_last else whole
    device = next(model.parameters()).device
    numbers = torch.zeros(3, dtype=torch.float64, device=device)
    if whole is not None and parts is not None:
        first, second = pair
        numbers[0] = (whole[first] - whole[second]).abs()
        numbers[1] = (whole - parts).abs().max()
        numbers[2] = whole.abs().max()
    if base.num_stages > 1:
        dist.broadcast(numbers, dist.get_global_rank(base.pp_group, base.num_stages - 1), group=base.pp_group)
    return _Measured(*numbers.tolist())


def _last_logits(base: MegatronBase, token_ids: list[int], *, cut: int) -> Tensor | None:
    """Float64 logits behind the last token, [vocabulary]; the rows from `cut` on in a pass of their own."""
    size, share = base.architecture.vocab_size, RowShare(base.tp)
    cache = KeyValueCache(num_sequences=1, capacity=len(token_ids))
    vocabulary = HeadVocabulary(size=size, vocab_size=size, target_ids=None, tp=base.tp)
    device, features, num_filled = next(base.model.parameters()).device, None, 0
    for start, stop in ((0, cut), (cut, len(token_ids))):
        if start == stop:
            continue
        num_filled = stop - start
        rows = NewRows([Span(0, start, num_filled, len(token_ids))], device=device, multiple=share.multiple)
        part = torch.tensor(token_ids[start:stop], device=device)
        features = base.cached_features(F.pad(part, (0, rows.num_rows - num_filled))[None], rows, cache)
    if features is None:
        return None
    hidden = share.join(features.last, num_filled)[-1:]
    return vocabulary.whole_logits(F.linear(hidden, base.head_weight()))[0].double()

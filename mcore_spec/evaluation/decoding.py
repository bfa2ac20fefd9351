"""Decoding several sequences at once with key/value caches, with a draft or without one.

A forward pass of the base reads the last token of each sequence and the tokens proposed behind it; those that it would
have chosen itself are kept, and one more of its own. Sequences of different lengths, with different numbers of kept
tokens, share a packed row (`layers.cache`), without padding between them.

With pipeline stages the last one decides and tells the others. Every data- and context-parallel rank decodes
sequences of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn import functional as F

from mcore_spec.bases.features import Features, features_for
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.megatron_build import check_cacheable
from mcore_spec.drafts.draft import Draft
from mcore_spec.errors import ConfigError
from mcore_spec.evaluation.choice import HeadVocabulary, draw, verify_by_rejection
from mcore_spec.evaluation.drafters import Drafter, Proposals, Reading, RowShare, aux_layers_of, make_drafter
from mcore_spec.evaluation.tree import ROOT, Topology
from mcore_spec.evaluation.typical import TypicalAcceptance
from mcore_spec.layers.cache import KeyValueCache, NewRows, Span
from mcore_spec.parallel.layout import run_on_every_rank


class Request(NamedTuple):
    """A sequence that is to be continued.

    Attributes:
        token_ids: the prompt, at least one token.
        max_new_tokens: after which it ends, at least one.
        seed: of what is drawn for it, if anything is.
        name: for errors.
    """

    token_ids: tuple[int, ...]
    max_new_tokens: int
    seed: int = 0
    name: str = "the prompt"


@dataclass
class Answer:
    """What a sequence was continued with.

    Attributes:
        token_ids: new tokens, an end-of-sequence token included.
        accepted: proposals kept in each verification, whether or not they lie behind an end or a limit, as engines
            count them.
        origins: for each new token whether the draft had proposed it.
    """

    token_ids: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    origins: list[bool] = field(default_factory=list)


class Decoded(NamedTuple):
    """A batch that was decoded.

    Attributes:
        answers: one a request.
        seconds: from the end of the prompts' pass to the end.
    """

    answers: list[Answer]
    seconds: float

    @property
    def num_timed_tokens(self) -> int:
        """Tokens that came in that time: all but each sequence's first."""
        return sum(len(answer.token_ids) - 1 for answer in self.answers)


class Verdict(NamedTuple):
    """What the base made of one sequence's proposals: the nodes that it kept, from the root, and its own token."""

    kept: list[int]
    next_id: int


@dataclass
class _Sequence:
    """One sequence while it grows. All tokens but the last have their rows in the base's cache."""

    index: int
    request: Request
    tokens: list[int]
    answer: Answer
    generator: torch.Generator
    proposed: list[int] = field(default_factory=list)
    is_done: bool = False

    @property
    def length(self) -> int:
        return len(self.request.token_ids) + self.request.max_new_tokens


class Decoder:
    """A model on this rank that continues sequences. Every rank of the model must make the same calls."""

    def __init__(
        self,
        model: GPTModel,
        *,
        topology: Topology,
        temperature: float = 0.0,
        typical: TypicalAcceptance | None = None,
        end_ids: Sequence[int] = (),
    ) -> None:
        """Look at the model.

        Args:
            model: this rank's part.
            topology: of the proposals; without nodes, the base decodes alone and needs no draft.
            temperature: of sampling; 0: the likeliest token.
            typical: keep what the base finds likely enough, not only what it would say.
            end_ids: tokens that end a sequence.

        Raises:
            ConfigError: no draft, more steps than it has heads, or a tree that is to be sampled from.
            UnsupportedError: layers without a cache, or a kind of draft that cannot be served.
        """
        if temperature > 0 and not topology.is_chain:
            raise ConfigError(
                f"temperature = {temperature} with a tree: sampling is built for chains; leave --tree and --top-k out"
            )
        if temperature > 0 and typical is not None:
            raise ConfigError(
                f"temperature = {temperature} with typical acceptance, which has one of its own and draws nothing; "
                "leave one of the two out"
            )
        check_cacheable(model)
        self.base, self.topology, self.temperature = MegatronBase(model), topology, temperature
        self.typical, self.end_ids = typical, frozenset(end_ids)
        self.share = RowShare(self.base.tp)
        self.device = next(model.parameters()).device
        self.draft: Draft | None = None
        self.drafter: Drafter | None = None
        self.aux_layer_ids: tuple[int, ...] = ()
        # What the tokens under verification were drawn from; on the last stage.
        self._proposals: Proposals | None = None
        if len(topology):
            self.aux_layer_ids = aux_layers_of(model)
            self.draft = self.base.draft()
            self.drafter = run_on_every_rank(self._make_drafter)
        vocab_size = self.base.architecture.vocab_size
        self.vocabulary = HeadVocabulary(size=vocab_size, vocab_size=vocab_size, target_ids=None, tp=self.base.tp)

    def _make_drafter(self) -> Drafter | None:
        if self.draft is None:
            return None
        return make_drafter(self.base, self.draft, self.topology, temperature=self.temperature)

    def check(self, request: Request) -> None:
        """Refuse a request that the base has no positions for.

        Raises:
            ConfigError: prompt, new tokens and proposals are more than the base's positions.
        """
        architecture = self.base.architecture
        length = len(request.token_ids) + request.max_new_tokens + self.topology.depth
        if not request.token_ids or request.max_new_tokens < 1:
            raise ConfigError(f"{request.name} is empty, or nothing is to be said to it; give at least one token each")
        if length > architecture.max_position_embeddings:
            raise ConfigError(
                f"{request.name}: {len(request.token_ids)} tokens + {request.max_new_tokens} new ones (osl) + "
                f"{self.topology.depth} steps are more than the base's {architecture.max_position_embeddings} "
                "positions; lower --osl or --steps, or shorten the prompt"
            )
        if not 0 <= min(request.token_ids) <= max(request.token_ids) < architecture.vocab_size:
            raise ConfigError(
                f"{request.name} has token ids from {min(request.token_ids)} to {max(request.token_ids)}, outside of "
                f"the base's vocabulary of {architecture.vocab_size}; give the tokenizer that belongs to the base"
            )

    @torch.no_grad()
    def decode(
        self, requests: Sequence[Request], *, on_tokens: Callable[[int, Answer, int], None] | None = None
    ) -> Decoded:
        """Continue all requests, in one batch.

        Args:
            requests: the same on every rank of the model.
            on_tokens: called when a sequence has new tokens with its number, its answer so far and how many are new.

        Raises:
            ConfigError: see `check`.
        """
        for request in requests:
            self.check(request)
        sequences = [_begin(index, request) for index, request in enumerate(requests)]
        capacity = max(sequence.length for sequence in sequences) + len(self.topology) + 1
        cache = KeyValueCache(num_sequences=len(sequences), capacity=capacity)
        if self.drafter is not None:
            self.drafter.begin(num_sequences=len(sequences), capacity=capacity)
        self._advance(sequences, cache, on_tokens)
        begun = self._now()
        while active := [sequence for sequence in sequences if not sequence.is_done]:
            self._advance(active, cache, on_tokens)
        return Decoded([sequence.answer for sequence in sequences], self._now() - begun)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _advance(
        self,
        active: list[_Sequence],
        cache: KeyValueCache,
        on_tokens: Callable[[int, Answer, int], None] | None,
    ) -> None:
        """One forward pass of the base, and the proposals for the next one."""
        spans = [self._span(sequence) for sequence in active]
        features = self._forward(active, spans, cache)
        logits = None if features is None else self._logits(features, spans)
        verdicts = self._told(active, None if logits is None else self._judge(active, logits))
        readings = []
        first = 0
        for sequence, span, verdict in zip(active, spans, verdicts, strict=True):
            rows = self._confirmed_rows(sequence, span, verdict)
            if not self.topology.is_chain:
                cache.move(sequence.index, [span.start + row for row in rows], span.start)
            old_length = len(sequence.tokens)
            self._extend(sequence, verdict, on_tokens)
            if not sequence.is_done and self.topology.depth:
                # Behind a prompt of n tokens stands the first new one: row t reads token t + 1.
                token_ids = sequence.tokens[span.start + 1 :] if span.start == 0 else sequence.tokens[old_length:]
                readings.append(
                    Reading(sequence.index, span.start, [first + row for row in rows], token_ids, sequence.length)
                )
            first += span.num
        if readings:
            self._propose([s for s in active if not s.is_done], features, first, readings)

    def _span(self, sequence: _Sequence) -> Span:
        """The prompt, or the last token and what is proposed behind it."""
        is_prompt = not sequence.answer.token_ids
        start = 0 if is_prompt else len(sequence.tokens) - 1
        count = len(sequence.tokens) if is_prompt else 1 + len(self.topology)
        return Span(sequence.index, start, count, sequence.length)

    def _forward(self, active: list[_Sequence], spans: list[Span], cache: KeyValueCache) -> Features | None:
        token_ids = [
            token
            for sequence, span in zip(active, spans, strict=True)
            for token in (*sequence.tokens[span.start :], *sequence.proposed)
        ]
        is_tree = not self.topology.is_chain and active[0].proposed
        nodes = [ROOT, *range(len(self.topology))]
        tree = self.topology.part(nodes, first_new=0, device=self.device) if is_tree else None
        rows = NewRows(spans, device=self.device, multiple=self.share.multiple, tree=tree)
        padded = F.pad(torch.tensor(token_ids, device=self.device), (0, rows.num_rows - rows.num_filled))
        return self.base.cached_features(padded[None], rows, cache, aux_layer_ids=self.aux_layer_ids)

    def _logits(self, features: Features, spans: list[Span]) -> Tensor:
        """This rank's logits of each sequence's last 1 + nodes rows, or of a prompt's last, [rows, columns]."""
        num_filled = sum(span.num for span in spans)
        hidden, first = self.share.join(features.last, num_filled), 0
        wanted: list[int] = []
        for span in spans:
            wanted += range(first, first + span.num) if span.start else [first + span.num - 1]
            first += span.num
        return F.linear(hidden[wanted], self.base.head_weight())

    def _judge(self, active: list[_Sequence], logits: Tensor) -> list[Verdict]:
        """Which proposals are kept, and the base's own token behind them."""
        num = len(active)
        if self.temperature == 0:
            chosen = self.vocabulary.likeliest(logits, 1).view(num, -1).tolist()
            if self.typical is not None and active[0].proposed:
                rows = self.vocabulary.probabilities(logits, self.typical.temperature).unflatten(0, (num, -1))
                paths = [self.typical.keep(self.topology, s.proposed, p) for s, p in zip(active, rows, strict=True)]
                # The base's own token comes behind the last one kept; row 0 is the root's.
                pairs = zip(paths, chosen, strict=True)
                return [Verdict(path, own[path[-1] + 1 if path else 0]) for path, own in pairs]
            return [self._walk(sequence, own) for sequence, own in zip(active, chosen, strict=True)]
        base = self.vocabulary.probabilities(logits, self.temperature).unflatten(0, (num, -1))
        num_proposed = base.shape[1] - 1
        uniforms = _uniforms(active, num_proposed + 1).to(self.device)
        if num_proposed == 0:
            return [Verdict([], token) for token in draw(base[:, 0], uniforms[:, 0]).tolist()]
        assert self._proposals is not None
        assert self._proposals.probabilities is not None
        kept = verify_by_rejection(
            self._proposals.token_ids, self._proposals.probabilities, base, uniforms[:, :-1], uniforms[:, -1]
        )
        numbers = zip(kept.num.tolist(), kept.next_ids.tolist(), strict=True)
        return [Verdict(list(range(number)), token) for number, token in numbers]

    def _walk(self, sequence: _Sequence, chosen: list[int]) -> Verdict:
        """Down the tree while a child is what the base would say; `chosen` is that behind the root and each node."""
        kept: list[int] = []
        node = ROOT
        children = self.topology.children if sequence.proposed else lambda _node: []
        while True:
            same = [child for child in children(node) if sequence.proposed[child] == chosen[node + 1]]
            if not same:
                return Verdict(kept, chosen[node + 1])
            node = same[0]
            kept.append(node)

    def _confirmed_rows(self, sequence: _Sequence, span: Span, verdict: Verdict) -> list[int]:
        """Rows of the span that stay: the whole prompt, or the last token's and those of the kept nodes."""
        return [0, *(1 + node for node in verdict.kept)] if sequence.answer.token_ids else list(range(span.num))

    def _extend(
        self, sequence: _Sequence, verdict: Verdict, on_tokens: Callable[[int, Answer, int], None] | None
    ) -> None:
        """Take the new tokens, up to an end or the limit."""
        answer = sequence.answer
        if answer.token_ids:
            answer.accepted.append(len(verdict.kept))
        num_before = len(answer.token_ids)
        for token in (*(sequence.proposed[node] for node in verdict.kept), verdict.next_id):
            sequence.tokens.append(token)
            answer.token_ids.append(token)
            answer.origins.append(len(answer.token_ids) - num_before <= len(verdict.kept))
            if token in self.end_ids or len(answer.token_ids) == sequence.request.max_new_tokens:
                sequence.is_done = True
                break
        sequence.proposed = []
        if on_tokens is not None:
            on_tokens(sequence.index, answer, len(answer.token_ids) - num_before)

    def _propose(
        self, active: list[_Sequence], features: Features | None, num_filled: int, readings: list[Reading]
    ) -> None:
        """Let the draft read what was confirmed, and every stage know what it proposes."""
        token_ids = torch.empty(len(active), len(self.topology), dtype=torch.int64, device=self.device)
        if features is not None:
            assert self.draft is not None
            assert self.drafter is not None
            whole = self.share.join(features_for(self.draft, features), num_filled)
            uniforms = _uniforms(active, len(self.topology)).to(self.device) if self.temperature > 0 else None
            self._proposals = self.drafter.propose(whole, readings, uniforms)
            token_ids = self._proposals.token_ids
        for sequence, proposed in zip(active, self._broadcast(token_ids).tolist(), strict=True):
            sequence.proposed = proposed

    def _told(self, active: list[_Sequence], verdicts: list[Verdict] | None) -> list[Verdict]:
        """The last stage's verdicts, on every stage."""
        if self.base.num_stages == 1:
            assert verdicts is not None
            return verdicts
        depth = self.topology.depth
        rows = [[0] * (2 + depth)] * len(active)
        if verdicts is not None:
            rows = [[len(kept), token, *kept, *[0] * (depth - len(kept))] for kept, token in verdicts]
        told = self._broadcast(torch.tensor(rows, device=self.device)).tolist()
        return [Verdict(kept[:number], token) for number, token, *kept in told]

    def _broadcast(self, tensor: Tensor) -> Tensor:
        """What the last stage has."""
        if self.base.num_stages > 1:
            source = dist.get_global_rank(self.base.pp_group, self.base.num_stages - 1)
            tensor = tensor.contiguous()
            dist.broadcast(tensor, source, group=self.base.pp_group)
        return tensor


def _begin(index: int, request: Request) -> _Sequence:
    return _Sequence(
        index=index,
        request=request,
        tokens=list(request.token_ids),
        answer=Answer(),
        generator=torch.Generator().manual_seed(request.seed),
    )


def _uniforms(sequences: Sequence[_Sequence], num: int) -> Tensor:
    """In [0, 1), float64 [sequences, num], each row from its sequence's own generator."""
    rows = [torch.rand(num, generator=sequence.generator, dtype=torch.float64) for sequence in sequences]
    return torch.stack(rows)

"""The draft's side of speculative decoding, on the last pipeline stage: from the base's features to proposals.

A draft that is fed with its own states reads the rows that the base has just confirmed once more, with the base's own
features, before it goes on from its own: what its cache holds of confirmed tokens comes from the base, as in engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn import functional as F

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.config import EagleConfig
from mcore_spec.conversion import conversion_of
from mcore_spec.drafts.draft import Draft
from mcore_spec.drafts.medusa import MedusaDraft
from mcore_spec.drafts.steps import StepOutput
from mcore_spec.drafts.stepwise import StepwiseDraft
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.evaluation.choice import HeadVocabulary, draw
from mcore_spec.evaluation.tree import ROOT, Topology
from mcore_spec.layers.cache import CachedRows, KeyValueCache, NewRows, Span, Tree
from mcore_spec.layers.linear import VocabularyHead
from mcore_spec.parallel.collectives import gather_without_grad
from mcore_spec.parallel.tensor_parallel import SEQUENCE_DIM, TensorParallel


class Reading(NamedTuple):
    """Rows of one sequence that the base has confirmed.

    Attributes:
        sequence: its place in the caches.
        start: position of the first of them.
        rows: which rows of the base's forward pass they are.
        token_ids: behind each of them.
        length: tokens that the sequence may grow to.
    """

    sequence: int
    start: int
    rows: list[int]
    token_ids: list[int]
    length: int

    @property
    def stop(self) -> int:
        """Rows that the sequence has with these."""
        return self.start + len(self.rows)


class Proposals(NamedTuple):
    """What is to be verified.

    Attributes:
        token_ids: one a node of the tree, int64 [sequences, nodes].
        probabilities: of the distributions that a chain was drawn from, float64 [sequences, nodes, base
            vocabulary]; ``None`` where nothing was drawn.
    """

    token_ids: Tensor
    probabilities: Tensor | None


class Drafter(Protocol):
    """Proposes tokens for several sequences at a time."""

    def begin(self, *, num_sequences: int, capacity: int) -> None:
        """Forget all sequences; the new ones have at most `capacity` rows, proposals included."""

    def propose(self, features: Tensor, readings: Sequence[Reading], uniforms: Tensor | None) -> Proposals:
        """Proposals behind the last token of each reading.

        Args:
            features: of every row of the base's forward pass, [rows, ...].
            readings: the sequences that go on.
            uniforms: in [0, 1), [sequences, nodes], to draw a chain with; ``None``: take the likeliest.
        """


class RowShare:
    """Rows of a packed row on this rank: all of them, or under sequence parallelism a part."""

    def __init__(self, tp: TensorParallel) -> None:
        """Remember the group."""
        self.tp = tp

    @property
    def multiple(self) -> int:
        """What the number of rows must be a multiple of."""
        return self.tp.size if self.tp.sequence_parallel else 1

    def take(self, whole: Tensor, num_rows: int) -> Tensor:
        """[filled rows, w] on every rank -> padded to `num_rows` and shared out, [rows or rows/size, 1, w]."""
        padded = F.pad(whole, (0, 0, 0, num_rows - whole.shape[0]))[:, None]
        return padded.chunk(self.tp.size)[self.tp.rank] if self.tp.sequence_parallel else padded

    def join(self, share: Tensor, num_filled: int) -> Tensor:
        """[rows or rows/size, 1, w] -> [filled rows, w] on every rank."""
        whole = gather_without_grad(share, SEQUENCE_DIM, self.tp.group) if self.tp.sequence_parallel else share
        return whole[:num_filled, 0]


def aux_layers_of(model: GPTModel) -> tuple[int, ...]:
    """Base layers that the model's draft reads.

    Raises:
        ConfigError: it has no draft.
    """
    conversion = conversion_of(model)
    if conversion is None:
        raise ConfigError("the model has no draft; attach one first (convert), or decode without steps")
    if conversion.draft_class.reads == "last":
        return ()
    assert isinstance(conversion.config, EagleConfig)
    return conversion.config.eagle_architecture_config.eagle_aux_hidden_state_layer_ids


def make_drafter(base: MegatronBase, draft: Draft, topology: Topology, *, temperature: float) -> Drafter:
    """The drafter for a kind of draft.

    Raises:
        UnsupportedError: a kind that can be served in no known way.
        ConfigError: more steps than it has heads, or more branches than its vocabulary has tokens.
    """
    own = draft.own_heads()
    size, num_branches = own[0].vocab_size if own else base.architecture.vocab_size, max(topology.ranks) + 1
    if num_branches > size:
        raise ConfigError(
            f"{num_branches} proposals at a step, but the draft's vocabulary has {size} tokens; lower --top-k, or the "
            "ranks in --tree"
        )
    if isinstance(draft, StepwiseDraft):
        return StepwiseDrafter(base, draft, topology, temperature=temperature)
    if isinstance(draft, MedusaDraft):
        return MedusaDrafter(base, draft, topology, temperature=temperature)
    raise UnsupportedError(
        f"decoding with a {draft.label} draft: it is neither a StepwiseDraft nor a MedusaDraft; let its class be one"
    )


class StepwiseDrafter:
    """Drafts that are fed with their own states, each step of all sequences at once."""

    def __init__(self, base: MegatronBase, draft: StepwiseDraft, topology: Topology, *, temperature: float) -> None:
        """Look at the draft.

        Args:
            base: on the last stage.
            draft: on this rank.
            topology: of the proposals.
            temperature: of drawn proposals.
        """
        self.base, self.draft, self.topology, self.temperature = base, draft, topology, temperature
        self.share = RowShare(base.tp)
        vocab_size = base.architecture.vocab_size
        self.head: VocabularyHead | None = draft.step_head
        further = draft.parallel_draft_heads
        num_further = 0 if further is None else len(further.medusa_heads)
        # The last step proposes by all of its heads, the others by their own alone.
        self.num_steps = max(1, topology.depth - num_further)
        self.vocabulary = HeadVocabulary(
            size=vocab_size if self.head is None else self.head.vocab_size,
            vocab_size=vocab_size,
            target_ids=None if self.head is None else draft.head_token_ids(),
            tp=base.tp,
        )
        self.cache = KeyValueCache(num_sequences=0, capacity=0)

    def begin(self, *, num_sequences: int, capacity: int) -> None:
        """Take new memory."""
        self.cache = KeyValueCache(num_sequences=num_sequences, capacity=capacity)

    def propose(self, features: Tensor, readings: Sequence[Reading], uniforms: Tensor | None) -> Proposals:
        """Read the confirmed rows, then go down the tree, one step a depth, and the rest from the last step."""
        device = features.device
        spans = [Span(each.sequence, each.start, len(each.rows), each.length) for each in readings]
        rows = NewRows(spans, device=device, multiple=self.share.multiple)
        wanted = torch.tensor([row for each in readings for row in each.rows], device=device)
        token_ids = torch.tensor([token for each in readings for token in each.token_ids], device=device)
        state = self.draft.start(self.share.take(features[wanted], rows.num_rows))
        hidden, feedback = (each[rows.last_rows, None] for each in self._step(state, token_ids, rows))
        parents, num_sequences = [ROOT], len(readings)
        proposed = torch.zeros(num_sequences, len(self.topology), dtype=torch.int64, device=device)
        probabilities: list[Tensor] = []

        def choose(logits: Tensor, depth: int, num_above: int) -> None:
            """The tokens of a depth, from logits of the rows that lie `num_above` depths above."""
            nodes = self.topology.at_depth(depth)
            if uniforms is not None:
                probabilities.append(self.vocabulary.probabilities(logits, self.temperature))
                proposed[:, nodes] = draw(probabilities[-1], uniforms[:, depth - 1])[:, None]
                return
            above = [parents.index(self.topology.above(node, num_above)) for node in nodes]
            ranks = [self.topology.ranks[node] for node in nodes]
            best = self.vocabulary.likeliest(logits, max(ranks) + 1)
            proposed[:, nodes] = best.unflatten(0, (num_sequences, -1))[:, above, ranks]

        for depth in range(1, self.num_steps + 1):
            choose(self._logits(hidden.flatten(0, 1)), depth, 1)
            if depth == self.num_steps:
                break
            inner = [node for node in self.topology.at_depth(depth) if node in self.topology.inner]
            above = torch.tensor([parents.index(self.topology.parents[node]) for node in inner], device=device)
            rows = self._rows_of(readings, inner)
            state = self.share.take(feedback[:, above].flatten(0, 1), rows.num_rows)
            output = self._step(state, proposed[:, inner].flatten(), rows)
            hidden, feedback = (each.unflatten(0, (num_sequences, -1)) for each in output)
            parents = inner
        further = self.draft.parallel_draft_heads
        if further is not None and self.num_steps < self.topology.depth:
            states = further.states(hidden.flatten(0, 1))
            for number in range(1, self.topology.depth - self.num_steps + 1):
                choose(further.lm_head(states[number - 1]), self.num_steps + number, 1 + number)
        return Proposals(proposed, torch.stack(probabilities, dim=1) if probabilities else None)

    def _rows_of(self, readings: Sequence[Reading], nodes: list[int]) -> NewRows:
        """Rows of the inner nodes of one depth, behind those of the depths above."""
        device = self.base.head_weight().device
        so_far = [node for node in self.topology.inner if node <= nodes[-1]]
        first_new = len(so_far) - len(nodes)
        spans = [Span(each.sequence, each.stop + first_new, len(nodes), each.length) for each in readings]
        tree: Tree = self.topology.part(so_far, first_new=first_new, device=device)
        return NewRows(spans, device=device, multiple=self.share.multiple, tree=tree)

    def _step(self, state: Tensor, token_ids: Tensor, rows: NewRows) -> StepOutput:
        """Hidden state and feedback of the filled rows, each [rows, h]."""
        padded = F.pad(token_ids, (0, rows.num_rows - rows.num_filled))
        embedding = self.base.embed(padded[None])
        layers = [CachedRows(rows, self.cache, layer) for layer in range(len(self.draft.layers))]
        output = self.draft.step(state, embedding, layers)
        return StepOutput(*(self.share.join(each, rows.num_filled) for each in output))

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.base.head_weight()) if self.head is None else self.head(hidden)


class MedusaDrafter:
    """Every head reads the base's hidden state of the last confirmed row: one forward pass, nothing kept."""

    def __init__(self, base: MegatronBase, draft: MedusaDraft, topology: Topology, *, temperature: float) -> None:
        """Look at the draft.

        Args:
            base: on the last stage.
            draft: on this rank.
            topology: of the proposals.
            temperature: of drawn proposals.

        Raises:
            ConfigError: more steps than heads.
        """
        heads = draft.own_heads()
        if topology.depth > len(heads):
            raise ConfigError(
                f"steps = {topology.depth}, but the draft has {len(heads)} Medusa heads, one a step; lower --steps"
            )
        self.draft, self.topology, self.temperature = draft, topology, temperature
        self.share = RowShare(base.tp)
        self.vocabulary = HeadVocabulary(
            size=heads[0].vocab_size,
            vocab_size=base.architecture.vocab_size,
            target_ids=draft.head_token_ids(),
            tp=base.tp,
        )

    def begin(self, *, num_sequences: int, capacity: int) -> None:
        """Nothing is kept."""

    def propose(self, features: Tensor, readings: Sequence[Reading], uniforms: Tensor | None) -> Proposals:
        """The tokens of each head, whatever stands above them in the tree."""
        last = torch.tensor([each.rows[-1] for each in readings], device=features.device)
        num_rows = -(-len(readings) // self.share.multiple) * self.share.multiple
        by_head = self.draft(self.share.take(features[last], num_rows))
        proposed = torch.zeros(len(readings), len(self.topology), dtype=torch.int64, device=features.device)
        probabilities: list[Tensor] = []
        for depth in range(1, self.topology.depth + 1):
            nodes, logits = self.topology.at_depth(depth), by_head[depth - 1][: len(readings), 0]
            if uniforms is None:
                ranks = [self.topology.ranks[node] for node in nodes]
                proposed[:, nodes] = self.vocabulary.likeliest(logits, max(ranks) + 1)[:, ranks]
            else:
                probabilities.append(self.vocabulary.probabilities(logits, self.temperature))
                proposed[:, nodes] = draw(probabilities[-1], uniforms[:, depth - 1])[:, None]
        return Proposals(proposed, torch.stack(probabilities, dim=1) if probabilities else None)

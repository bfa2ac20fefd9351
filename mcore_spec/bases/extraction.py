"""Running the base alone over conversations, in any layout, into a store of hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mcore_spec.bases.features import Features
from mcore_spec.data.batch import make_batch
from mcore_spec.data.document import Document
from mcore_spec.data.hidden_states import DocumentStates, StatesWriter
from mcore_spec.data.hidden_states.plan import ExtractionPlan
from mcore_spec.data.hidden_states.writer import begin_store, finish_store, written_shards
from mcore_spec.data.packing import pack
from mcore_spec.parallel.collectives import Group, group_rank
from mcore_spec.parallel.documents import Documents, document_multiple, row_multiple, whole_rows
from mcore_spec.parallel.layout import run_on_every_rank, run_on_rank_zero
from mcore_spec.parallel.tensor_parallel import TensorParallel


class RunningBase(Protocol):
    """A base that computes features: `MegatronBase` or `TransformersBase`.

    Attributes:
        tp: the ranks over which the last pipeline stage is cut.
    """

    tp: TensorParallel

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the features."""
        ...

    def features(
        self, token_ids: Tensor, *, aux_layer_ids: Sequence[int] = (), documents: Documents | None = None
    ) -> Features | None:
        """Features of this rank's rows on the last stage, ``None`` on the others."""
        ...


@dataclass(frozen=True, kw_only=True)
class DataShare:
    """Which of the samples this rank's copy of the base takes.

    Attributes:
        rank: of the copy.
        size: number of copies.
        context_group: ranks that share the rows of a sample.
        device: of the base.
    """

    rank: int
    size: int
    context_group: Group
    device: torch.device


class Extracted(NamedTuple):
    """How far an extraction came.

    Attributes:
        num_before: conversations that an earlier attempt had left.
        num_computed: that were added.
        is_finished: whether the store is whole; otherwise the run was asked to stop.
    """

    num_before: int
    num_computed: int
    is_finished: bool


@torch.no_grad()
def extract_states(
    base: RunningBase,
    plan: ExtractionPlan,
    directory: Path,
    *,
    backend: str,
    share: DataShare,
    rows_at_once: int,
    is_stopped: Callable[[], bool],
    advance: Callable[[int], None],
    max_shard_bytes: int,
) -> Extracted:
    """Compute what is missing in the store, and finish it; every rank must call.

    Of each copy of the base one rank writes: the first of the last stage's tensor- and context-parallel ranks.

    Args:
        base: this rank's part.
        plan: what is extracted.
        directory: of the store.
        backend: what the description calls the base's library.
        share: of this rank's copy.
        rows_at_once: tokens of a forward pass at most; longer documents have one of their own.
        is_stopped: whether to end early; the same on every rank.
        advance: told after each round how many conversations all copies added.
        max_shard_bytes: see `StatesWriter`.

    Raises:
        CheckpointError: the directory holds another store, or a damaged one.
        ConfigError: states that are no numbers.
        OSError: the store cannot be written; the same call goes on with it.
    """
    rounds = run_on_rank_zero(lambda: _begin(plan, directory, backend, rows_at_once, share.size))
    is_writer = base.is_last_stage and group_rank(base.tp.group) == 0 and group_rank(share.context_group) == 0

    def open_writer() -> StatesWriter | None:
        if not is_writer:
            return None
        return StatesWriter(directory, plan.describe(backend), writer=share.rank, max_shard_bytes=max_shard_bytes)

    writer = run_on_every_rank(open_writer)
    num_computed = 0
    try:
        for documents in rounds.documents:
            if is_stopped():
                break
            own = documents[share.rank]
            given = [plan.documents.document(number) for number in own]
            states = list(document_states(base, given, aux_layer_ids=plan.aux_layer_ids, share=share)) if own else []
            # On every rank: one that failed alone would leave the others in the next forward pass.
            run_on_every_rank(partial(_append, writer, own, states))
            num_new = sum(map(len, documents))
            num_computed += num_new
            advance(num_new)
        run_on_every_rank(lambda: None if writer is None else writer.flush())
    finally:
        if writer is not None:
            writer.release()
    is_finished = rounds.num_before + num_computed == plan.num_documents
    if is_finished:
        run_on_rank_zero(lambda: finish_store(directory))
    return Extracted(rounds.num_before, num_computed, is_finished)


class _Rounds(NamedTuple):
    """What is left to do.

    Attributes:
        num_before: conversations that are there.
        documents: for each round the conversations of each copy of the base, which it takes in one forward pass.
    """

    num_before: int
    documents: list[list[list[int]]]


def _begin(plan: ExtractionPlan, directory: Path, backend: str, rows_at_once: int, num_copies: int) -> _Rounds:
    """On one rank, so that all agree on what is there."""
    begin_store(directory, plan.describe(backend))
    done = set(chain.from_iterable(shard.documents for shard in written_shards(directory)))
    missing = np.array([index for index in range(plan.num_documents) if index not in done], dtype=np.int64)
    lengths = plan.documents.lengths[missing]
    bins = pack(lengths, capacity=max(rows_at_once, int(lengths.max(initial=0))))
    samples = [missing[bins.bin(number)].tolist() for number in range(bins.num_bins)]
    samples += [[] for _ in range(-len(samples) % num_copies)]
    return _Rounds(len(done), [samples[start : start + num_copies] for start in range(0, len(samples), num_copies)])


def document_states(
    base: RunningBase, given: Sequence[Document], *, aux_layer_ids: Sequence[int], share: DataShare
) -> Iterator[DocumentStates]:
    """Run the base once; every rank of its copy must call.

    Args:
        base: this rank's part.
        given: at least one; they see each other as little as in training.
        aux_layer_ids: 0-based, by output, ascending.
        share: of this rank's copy.

    Yields:
        Of each document on the last stage; nothing on earlier ones.
    """
    batch = make_batch(
        given,
        num_steps=1,
        document_multiple=document_multiple(share.context_group),
        row_multiple=row_multiple(share.context_group, base.tp),
        num_samples=1,
    )
    documents = Documents(batch.bounds, lengths=batch.lengths, group=share.context_group)
    token_ids = batch.token_ids.to(share.device)
    features = base.features(token_ids[None], aux_layer_ids=aux_layer_ids, documents=documents)
    if features is None:
        return
    last = whole_rows(features.last, documents, base.tp)
    aux = last.new_zeros(last.shape[0], 0)
    if features.aux is not None:
        aux = whole_rows(features.aux, documents, base.tp)
    aux = aux.unflatten(1, (len(aux_layer_ids), last.shape[1]))
    for (_, mask), start, length in zip(given, batch.bounds, batch.lengths, strict=False):
        rows = slice(start, start + length)
        yield DocumentStates(batch.token_ids[rows], torch.from_numpy(mask), aux[rows], last[rows])


def _append(writer: StatesWriter | None, numbers: Sequence[int], states: Sequence[DocumentStates]) -> None:
    if writer is not None:
        for number, each in zip(numbers, states, strict=True):
            writer.append(number, each)

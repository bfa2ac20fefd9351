"""Batches with the hidden states of their documents, brought here ahead of the step that takes them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mcore_spec.data.batch import Batch, Batches, BatchStates
from mcore_spec.data.hidden_states.store import StatesStore

# Micro-batches that are read before they are asked for.
NUM_AHEAD = 4


class StatesReader(Protocol):
    """Where the hidden states of batches come from. Used by one thread at a time.

    Attributes:
        num_asked: batches that are asked for before the first of them is taken.
    """

    num_asked: int

    def ask(self, batch: Batch) -> None:
        """Announce that `batch` will be taken, behind those that were announced before."""
        ...

    def take(self, batch: Batch) -> BatchStates:
        """States of the batch that was asked for first of those not taken yet.

        Raises:
            McoreSpecError: they cannot be had.
        """
        ...


class StoreReader:
    """Reads them in a store; see `StatesReader`."""

    num_asked = 1

    def __init__(self, store: StatesStore, *, aux_layer_ids: Sequence[int]) -> None:
        """Take the store.

        Args:
            store: holds all layers that are wanted.
            aux_layer_ids: which the draft reads, ascending.
        """
        self._store, self._aux_layer_ids = store, tuple(aux_layer_ids)

    def ask(self, batch: Batch) -> None:
        """The disk needs no notice."""

    def take(self, batch: Batch) -> BatchStates:
        """Read.

        Raises:
            CheckpointError: a damaged shard.
        """
        parts = [self._store.states(number, aux_layer_ids=self._aux_layer_ids) for number in batch.numbers]
        return lay_out(batch, [StateRows(each.aux, each.last) for each in parts])


class StateRows(NamedTuple):
    """Of one document.

    Attributes:
        aux: [n, aux layers, h].
        last: [n, h].
    """

    aux: Tensor
    last: Tensor


def lay_out(batch: Batch, parts: Sequence[StateRows]) -> BatchStates:
    """Rows of the batch, those of a document behind its start; zero in padding.

    Args:
        batch: of the documents.
        parts: of each, all of the same layers and dtype.
    """
    num_rows, (num_aux, hidden_size) = batch.bounds[-1], parts[0].aux.shape[1:]
    dtype = parts[0].last.dtype
    last = torch.zeros(num_rows, hidden_size, dtype=dtype)
    aux = torch.zeros(num_rows, num_aux * hidden_size, dtype=dtype) if num_aux else None
    for start, part in zip(batch.bounds, parts, strict=False):
        rows = slice(start, start + len(part.last))
        last[rows] = part.last
        if aux is not None:
            aux[rows] = part.aux.flatten(1)
    return BatchStates(aux, last)


class StoredBatches:
    """Batches of a stream with their states. A thread reads in order; an error of its is raised where it is met.

    Which batches were asked for and taken depends on the calls alone, not on how fast the thread is.

    Attributes:
        waited_s: seconds that `micro_batches` waited for the thread so far.
    """

    def __init__(self, batches: Batches, reader: StatesReader, *, num_ahead: int = NUM_AHEAD) -> None:
        """Take the batches; from here on only the thread asks for them.

        Args:
            batches: of documents that `reader` has.
            reader: of their states.
            num_ahead: micro-batches that are held at most.
        """
        self._batches, self._reader, self._num_ahead = batches, reader, num_ahead
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hidden states")
        self._read: deque[Future[Batch | None]] = deque()
        self._asked: deque[Batch | None] = deque()
        self._sequence: Iterator[Batch | None] = iter(())
        self._next: int | None = None
        self.waited_s = 0.0

    def micro_batches(self, index: int) -> Iterator[Batch]:
        """This rank's micro-batches of global batch `index`, from 0. One behind the other is read ahead.

        Raises:
            CheckpointError: a damaged shard.
        """
        if index != self._next:
            self._begin(index)
        self._next = None
        while (batch := self._take()) is not None:
            yield batch
        self._next = index + 1

    def _begin(self, index: int) -> None:
        """Drop what was read, and read from here on."""
        for pending in self._read:
            pending.result()
        self._read.clear()
        self._thread.submit(self._drop_asked).result()
        self._sequence = self._from(index)
        for _ in range(self._num_ahead):
            self._submit()

    def _drop_asked(self) -> None:
        """What was asked for comes, and must be taken."""
        while self._asked:
            batch = self._asked.popleft()
            if batch is not None:
                self._reader.take(batch)

    def _from(self, index: int) -> Iterator[Batch | None]:
        """Micro-batches without end; ``None`` behind those of each global batch."""
        coming = self._without_states(index)
        while True:
            while len(self._asked) < self._reader.num_asked:
                batch = next(coming)
                if batch is not None:
                    self._reader.ask(batch)
                self._asked.append(batch)
            batch = self._asked.popleft()
            yield None if batch is None else replace(batch, states=self._reader.take(batch))

    def _without_states(self, index: int) -> Iterator[Batch | None]:
        for number in count(index):
            yield from self._batches.micro_batches(number)
            yield None

    def _submit(self) -> None:
        sequence = self._sequence
        self._read.append(self._thread.submit(lambda: next(sequence)))

    def _take(self) -> Batch | None:
        begun = time.perf_counter()
        batch = self._read.popleft().result()
        self.waited_s += time.perf_counter() - begun
        self._submit()
        return batch

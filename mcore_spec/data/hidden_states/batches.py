"""Batches with the hidden states of their documents, read ahead of the step that takes them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import count

import torch

from mcore_spec.data.batch import Batch, Batches, BatchStates
from mcore_spec.data.hidden_states.store import StatesStore

# Micro-batches that are read before they are asked for.
NUM_AHEAD = 4


class StoredBatches:
    """Batches of a stream over a store. A thread reads them in their order; an error of its is raised where it is met.

    Attributes:
        waited_s: seconds that `micro_batches` waited for the thread so far.
    """

    def __init__(
        self,
        batches: Batches,
        store: StatesStore,
        *,
        aux_layer_ids: Sequence[int],
        num_ahead: int = NUM_AHEAD,
    ) -> None:
        """Take the batches; from here on only the thread asks for them.

        Args:
            batches: of documents in `store`.
            store: holds all layers that are wanted.
            aux_layer_ids: which the draft reads, ascending.
            num_ahead: micro-batches that are held at most.
        """
        self._batches, self._store, self._num_ahead = batches, store, num_ahead
        self._aux_layer_ids = tuple(aux_layer_ids)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hidden states")
        self._read: deque[Future[Batch | None]] = deque()
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
            pending.cancel()
        self._read.clear()
        # Behind the read that may be going on.
        self._thread.submit(lambda: None).result()
        self._sequence = self._from(index)
        for _ in range(self._num_ahead):
            self._submit()

    def _from(self, index: int) -> Iterator[Batch | None]:
        """Micro-batches without end; ``None`` behind those of each global batch."""
        for number in count(index):
            for batch in self._batches.micro_batches(number):
                yield replace(batch, states=self._states(batch))
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

    def _states(self, batch: Batch) -> BatchStates:
        """Rows of the batch, those of a document behind its start."""
        description = self._store.description
        parts = [self._store.states(number, aux_layer_ids=self._aux_layer_ids) for number in batch.numbers]
        num_rows, hidden_size = batch.bounds[-1], description.hidden_size
        dtype = parts[0].last.dtype
        last = torch.zeros(num_rows, hidden_size, dtype=dtype)
        aux = (
            torch.zeros(num_rows, len(self._aux_layer_ids) * hidden_size, dtype=dtype) if self._aux_layer_ids else None
        )
        for start, part in zip(batch.bounds, parts, strict=False):
            rows = slice(start, start + len(part.last))
            last[rows] = part.last
            if aux is not None:
                aux[rows] = part.aux.flatten(1)
        return BatchStates(aux, last)

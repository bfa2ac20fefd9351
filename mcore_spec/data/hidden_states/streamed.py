"""Hidden states that other ranks of the job compute while they are wanted: no disk.

The training ranks that hold copies of one model see the same batches. The first of them asks an extraction rank for the
documents of a batch; that rank sends their states to each of them. Batches go round the extraction ranks. What is asked
for and not taken yet is bounded, and a message that nobody takes stays where it is: a slow side holds up the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from threading import Lock, Thread
from typing import NamedTuple

import torch

from mcore_spec.data.batch import Batch, BatchStates
from mcore_spec.data.hidden_states.batches import StateRows, lay_out
from mcore_spec.errors import TrainingError
from mcore_spec.parallel.sides import Bridge, LostRankError

# Kinds of notices; from 0 on: a request, and the number of the stream that it is of.
READY, STOP, FAILED, PROBE = -1, -2, -3, -4
_HEADER_SIZE = 3
_NOTICE_TAG, _FIRST_STATES_TAG = 0, 1


class Notice(NamedTuple):
    """What a training rank tells an extraction rank.

    Attributes:
        sender: rank on the bridge.
        kind: `READY`: the conversations can be read. `STOP`: the run is over. `FAILED`: it ended with an error.
            `PROBE`: nothing. Otherwise a request of the stream of this number.
        numbers: of the documents that are asked for.
        receivers: who is sent their states.
    """

    sender: int
    kind: int
    numbers: tuple[int, ...] = ()
    receivers: tuple[int, ...] = ()


def states_tag(stream: int) -> int:
    """Tag of the messages with states of a stream."""
    return _FIRST_STATES_TAG + stream


class Notices:
    """The training side: what goes from this rank to extraction ranks. Threads may share it."""

    def __init__(self, bridge: Bridge) -> None:
        """Take the bridge."""
        self.bridge = bridge
        self._lock = Lock()

    def send(self, to: int, kind: int, numbers: Sequence[int] = (), receivers: Sequence[int] = ()) -> None:
        """Tell one extraction rank.

        Raises:
            LostRankError: it has ended.
        """
        header = torch.tensor([kind, len(numbers), len(receivers)])
        # The two belong together.
        with self._lock:
            sent = [self.bridge.send(header, to, tag=_NOTICE_TAG)]
            if numbers:
                body = torch.tensor([*numbers, *receivers])
                sent.append(self.bridge.send(body, to, tag=_NOTICE_TAG))
        for each in sent:
            each.wait()

    def send_all(self, kind: int) -> None:
        """Tell every extraction rank.

        Raises:
            LostRankError: one has ended.
        """
        for rank in self.bridge.sides.extract_ranks:
            self.send(rank, kind)


@contextmanager
def notices_to_extraction(bridge: Bridge) -> Iterator[Notices]:
    """Notices for the time of a run; the extraction ranks are told of its end.

    Raises:
        LostRankError: an extraction rank has ended, also where another rank met that first.
    """
    notices, is_done = Notices(bridge), False
    try:
        yield notices
        is_done = True
    except RuntimeError:
        # A collective may have failed because another training rank met the loss before and ended.
        notices.send_all(PROBE)
        raise
    finally:
        if is_done:
            notices.send_all(STOP)
        else:
            for rank in bridge.sides.extract_ranks:
                with suppress(LostRankError):
                    notices.send(rank, FAILED)


class RequestQueue:
    """The extraction side: requests of all training ranks, in the order in which they arrive."""

    def __init__(self, bridge: Bridge) -> None:
        """Begin to listen, one thread for each training rank."""
        self.bridge = bridge
        self._arrived: SimpleQueue[Notice | LostRankError] = SimpleQueue()
        self._requests: deque[Notice] = deque()
        self._num_ready = self._num_stopped = 0
        for rank in bridge.sides.train_ranks:
            # A daemon: nothing ends a wait for a message of a rank that lives.
            Thread(target=self._listen, args=(rank,), name=f"training rank {rank}", daemon=True).start()

    def _listen(self, rank: int) -> None:
        try:
            while True:
                header = self.bridge.receive((_HEADER_SIZE,), torch.int64, rank, tag=_NOTICE_TAG)
                kind, num_numbers, num_receivers = header.tolist()
                body: list[int] = []
                if num_numbers:
                    size = num_numbers + num_receivers
                    body = self.bridge.receive((size,), torch.int64, rank, tag=_NOTICE_TAG).tolist()
                self._arrived.put(Notice(rank, kind, tuple(body[:num_numbers]), tuple(body[num_numbers:])))
                if kind in (STOP, FAILED):
                    return
        except LostRankError as error:
            self._arrived.put(error)

    def wait_until_ready(self) -> None:
        """Until every training rank has read the conversations.

        Raises:
            LostRankError: a training rank has ended.
            TrainingError: it ended with an error.
        """
        while self._num_ready < self.bridge.sides.num_train:
            self._take()

    def next(self) -> Notice | None:
        """The next request; ``None`` when every training rank has stopped.

        Raises:
            LostRankError: a training rank has ended.
            TrainingError: it ended with an error.
        """
        while not self._requests and self._num_stopped < self.bridge.sides.num_train:
            self._take()
        return self._requests.popleft() if self._requests else None

    def _take(self) -> None:
        notice = self._arrived.get()
        if isinstance(notice, LostRankError):
            raise notice
        if notice.kind == FAILED:
            raise TrainingError(
                f"training rank {notice.sender} ended with an error, which it told itself; extraction ends too"
            )
        self._num_ready += notice.kind == READY
        self._num_stopped += notice.kind == STOP
        if notice.kind >= 0:
            self._requests.append(notice)


class Replica(NamedTuple):
    """The training ranks that hold the last stage of one copy of the model.

    Attributes:
        number: of the copy, its data-parallel rank.
        num_replicas: copies.
        ranks: on the bridge; the first asks for all.
    """

    number: int
    num_replicas: int
    ranks: tuple[int, ...]


class StreamedStates:
    """Takes the states of a stream of batches from extraction ranks; see `StatesReader`."""

    def __init__(
        self,
        notices: Notices,
        replica: Replica,
        *,
        stream: int,
        num_asked: int,
        num_aux: int,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        """Take this rank's place.

        Args:
            notices: to extraction ranks.
            replica: that this rank belongs to.
            stream: number of the stream, the same on all ranks; its messages have a tag of their own.
            num_asked: batches that are asked for before the first of them is taken.
            num_aux: aux layers.
            hidden_size: h.
            dtype: in which the base computes.
        """
        self._notices, self._replica, self._stream = notices, replica, stream
        self.num_asked = num_asked
        self._num_aux, self._hidden_size, self._dtype = num_aux, hidden_size, dtype
        self._count = 0
        self._sources: deque[int] = deque()

    def ask(self, batch: Batch) -> None:
        """Ask the extraction rank whose turn it is.

        Raises:
            LostRankError: it has ended.
        """
        bridge, replica = self._notices.bridge, self._replica
        ranks = bridge.sides.extract_ranks
        source = ranks[(self._count * replica.num_replicas + replica.number) % len(ranks)]
        self._count += 1
        self._sources.append(source)
        if bridge.rank == replica.ranks[0]:
            self._notices.send(source, self._stream, batch.numbers, replica.ranks)

    def take(self, batch: Batch) -> BatchStates:
        """Wait for them.

        Raises:
            LostRankError: the extraction rank has ended.
        """
        shape = (sum(batch.lengths), self._num_aux + 1, self._hidden_size)
        tag = states_tag(self._stream)
        states = self._notices.bridge.receive(shape, self._dtype, self._sources.popleft(), tag=tag)
        parts = states.split(batch.lengths)
        return lay_out(batch, [StateRows(each[:, :-1], each[:, -1]) for each in parts])

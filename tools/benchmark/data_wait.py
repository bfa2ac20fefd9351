"""Whether reading stored hidden states bounds a training step: the share of waiting with cold and with warm files.

    python -m tools.benchmark.data_wait --load CHECKPOINT --states DIR --work-dir runs/data_wait [--train-iters 10]

Trains twice from the same store with `mcore-spec finetune`. `warm`: every file was read before, and stays in memory.
`cold`: all pages of the store are dropped before the run, and again all the time while it lasts (posix_fadvise), so
that what a step reads comes from the disk. Keep the run within one epoch: what was mapped and read once stays mapped.
What the disk gives is measured by reading the dropped files from one end to the other.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

import numpy as np

from mcore_spec.data.hidden_states import StatesStore
from mcore_spec.data.hidden_states.files import SHARDS
from tools.benchmark.commands import check_settings, run_once, words_of
from tools.benchmark.markdown import markdown_table

HEAD = ("files", "tokens/s", "bytes/s wanted", "of a run waiting", "of the slowest step", "read by the process, MiB")
_EVICT_EVERY_S = 0.1
_BLOCK = 1 << 20


class Row(NamedTuple):
    """One training.

    Attributes:
        name: warm or cold.
        tokens_per_second: of all steps.
        bytes_per_token: of the store.
        waiting: share of the time of all steps.
        most_waiting: the largest share of a step.
        read_mib: what the process read from disks, whatever for.
    """

    name: str
    tokens_per_second: float
    bytes_per_token: float
    waiting: float
    most_waiting: float
    read_mib: float

    def cells(self) -> tuple[str, ...]:
        """In the order of `HEAD`."""
        return (
            self.name,
            f"{self.tokens_per_second:,.0f}",
            f"{self.tokens_per_second * self.bytes_per_token:,.0f}",
            f"{self.waiting:.2%}",
            f"{self.most_waiting:.2%}",
            f"{self.read_mib:,.0f}",
        )


def shards_of(states: Path) -> list[Path]:
    """The files of a store that hold states."""
    return sorted(states.glob(SHARDS))


def read_through(paths: Sequence[Path]) -> float:
    """Read every byte; returns bytes a second."""
    begun, num_bytes = time.perf_counter(), 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                num_bytes += len(block)
    return num_bytes / (time.perf_counter() - begun)


def read_documents(states: Path) -> float:
    """Read every document as a run does, one behind the other in another order than on disk; returns bytes a second."""
    store = StatesStore(states)
    begun = time.perf_counter()
    for index in np.random.RandomState(0).permutation(len(store)):
        store.states(int(index))
    return store.num_bytes / (time.perf_counter() - begun)


def drop_pages(paths: Sequence[Path]) -> None:
    """Let the system forget what it has in memory of them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@contextmanager
def kept_cold(paths: Sequence[Path]) -> Iterator[None]:
    """Drop their pages now and all the time during the block."""
    done = Event()

    def drop() -> None:
        while not done.wait(_EVICT_EVERY_S):
            drop_pages(paths)

    drop_pages(paths)
    thread = Thread(target=drop)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def measure(name: str, given: argparse.Namespace, store: StatesStore) -> Row:
    """Train, unless that was done before."""
    place: Path = given.work_dir / name
    place.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(given).items() if key != "work_dir"}
    check_settings(place, settings)
    paths = shards_of(given.states)
    values = {
        "load": given.load,
        "save": place / "trained",
        "offline-distillation-data": given.states,
        "train-iters": given.train_iters,
        "global-batch-size": given.global_batch_size,
        "split": "100,0,0",
        "fit-start": 0,
        "log-interval": 1,
    }
    words = words_of("finetune", values)
    if name == "warm":
        read_through(paths)
    with kept_cold(paths) if name == "cold" else nullcontext():
        finished = run_once(place / "finetune", words)
    entries = [json.loads(line) for line in (place / "trained" / "train_log.jsonl").read_text().splitlines()]
    seconds, waited, before, shares = 0.0, 0.0, 0, []
    for entry in entries:
        elapsed = (entry["consumed_tokens"] - before) / entry["tokens_per_second"]
        before = entry["consumed_tokens"]
        seconds, waited = seconds + elapsed, waited + elapsed * entry["data_wait"]
        shares.append(entry["data_wait"])
    return Row(
        name,
        tokens_per_second=before / seconds,
        bytes_per_token=store.num_bytes / int(store.lengths.sum()),
        waiting=waited / seconds,
        most_waiting=max(shares),
        read_mib=finished.read_mib,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, required=True, help="checkpoint with a draft")
    parser.add_argument("--states", type=Path, required=True, help="store of its base's hidden states")
    parser.add_argument("--work-dir", type=Path, required=True, help="where everything goes")
    parser.add_argument("--train-iters", type=int, default=10, help="optimizer steps")
    parser.add_argument("--global-batch-size", type=int, default=4, help="samples of a step")
    given = parser.parse_args(arguments)
    store = StatesStore(given.states)
    rows = [measure(name, given, store) for name in ("cold", "warm")]
    paths = shards_of(given.states)
    rates = []
    for read in (read_through, lambda _paths: read_documents(given.states)):
        drop_pages(paths)
        rates += [read(paths), read(paths)]
    print(markdown_table(HEAD, [row.cells() for row in rows]))
    print(f"\n{len(store):,} conversations, {int(store.lengths.sum()):,} tokens, {store.num_bytes:,} bytes.")
    disk, memory, cold, warm = (f"{rate / 2**20:,.0f} MiB/s" for rate in rates)
    print(
        f"Files from end to end: {disk} cold, {memory} warm. Documents, as a run reads them: {cold} cold, {warm} warm."
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

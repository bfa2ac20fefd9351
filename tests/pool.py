"""Several ranks for a test, without starting several processes for each test.

Importing torch and megatron-core takes longer than most tests, so the workers are forked from a process that has done
it, and stay for the session. A job is a function named by a string, `"tests.parallel.cases:function"`; each rank
calls it inside a fresh gloo process group and sends its result back. A worker whose job went wrong is
never used again: what it left behind in megatron-core's global state is not worth guessing about.
"""

from __future__ import annotations

import faulthandler
import importlib
import io
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.forked import process_context

# Products of three axes of parallelism. A worker takes about half a gigabyte, so none starts before a job needs it.
MAX_WORLD_SIZE = 8
COLLECTIVE_TIMEOUT_S = 60
JOB_TIMEOUT_S = 240.0
# After the first failure the others are heard this long, so that the cause is told from its echoes.
ECHO_S = 0.5


class RankError(RuntimeError):
    """A job failed on a rank.

    Attributes:
        rank: where it failed first.
        detail: the traceback of that rank, or how its process ended.
    """

    def __init__(self, rank: int, target: str, world_size: int, detail: str) -> None:
        super().__init__(f"rank {rank} of {world_size} failed in {target}:\n{detail}")
        self.rank = rank
        self.detail = detail


def _pack(value: object) -> bytes:
    """Bytes for a pipe; torch's own format, so that a tensor arrives with its dtype, bit for bit."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(data), weights_only=False)


def _run_job(job: dict[str, Any]) -> object:
    """Call the function of a job on this rank, inside a process group that is gone afterwards."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group(
        "gloo",
        init_method=f"file://{job['rendezvous']}",
        rank=job["rank"],
        world_size=job["world_size"],
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    module, _, function = job["target"].partition(":")
    result = getattr(importlib.import_module(module), function)(**_unpack(job["kwargs"]))
    dist.barrier()  # a group that goes while another rank still uses it fails there
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return result


def _work(pipe: Connection) -> None:
    """The life of a worker: jobs in, results out, until the pipe closes or a job fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the session, which closes the pipes
    faulthandler.register(signal.SIGUSR1)  # where a rank hangs, on its stderr

    import megatron.core  # noqa: F401
    import torch

    import mcore_spec  # noqa: F401  # imported once, here, for every job

    torch.set_num_threads(1)
    pipe.send_bytes(_pack({"is_ready": True}))
    while True:
        try:
            job = _unpack(pipe.recv_bytes())
        except EOFError:
            return
        try:
            reply = _pack({"result": _run_job(job)})
        except BaseException:  # noqa: BLE001  # pytest.fail and SystemExit too must reach the test
            # Sent before the process ends and its group with it: other ranks fail after this one.
            pipe.send_bytes(_pack({"error": traceback.format_exc(), "time": time.monotonic()}))
            return
        pipe.send_bytes(reply)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection

    @classmethod
    def start(cls) -> _Worker:
        """Start a process. Not a daemon: saving a distributed checkpoint starts a helper of its own."""
        context = process_context()
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=False)
        process.start()
        theirs.close()
        return cls(process, ours)

    def end(self, *, grace_s: float = 0.0) -> None:
        """Close the pipe, which ends an idle worker; a busy one is ended by its process id."""
        self.pipe.close()
        self.process.join(grace_s)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class RankPool:
    """Up to `MAX_WORLD_SIZE` worker processes; rank r is worker r, started when a job first needs it."""

    def __init__(self) -> None:
        self._workers: dict[int, _Worker] = {}

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def process_ids(self) -> dict[int, int | None]:
        """rank -> process id of the workers that are running."""
        return {rank: worker.process.pid for rank, worker in sorted(self._workers.items())}

    def run(self, target: str, *, world_size: int, timeout: float = JOB_TIMEOUT_S, **kwargs: object) -> list[Any]:
        """Call `target` on ranks 0 .. world_size - 1.

        Args:
            target: "module:function"; the function finds its rank in `torch.distributed`.
            world_size: ranks in the process group, 1 to `MAX_WORLD_SIZE`.
            timeout: seconds for the whole job, start of the workers included.
            kwargs: handed to the function on every rank.

        Returns:
            What the function returned, by rank.

        Raises:
            RankError: the function raised on a rank, its process ended, or the time was over.
        """
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"world_size = {world_size}; the pool has 1 to {MAX_WORLD_SIZE} ranks")
        deadline = time.monotonic() + timeout
        new = [rank for rank in range(world_size) if rank not in self._workers]
        for rank in new:
            self._workers[rank] = _Worker.start()
        with tempfile.TemporaryDirectory(prefix="rank_pool_") as directory:
            job = {
                "target": target,
                "kwargs": _pack(kwargs),
                "world_size": world_size,
                "rendezvous": str(Path(directory) / "rendezvous"),
            }
            try:
                # All ranks begin together: those that are there would else wait in a collective for imports.
                self._collect({}, new, job, deadline=deadline, timeout=timeout)
                replies = self._exchange(job, deadline=deadline, timeout=timeout)
            except BaseException:
                self._drop(world_size)
                raise
        return [replies[rank]["result"] for rank in range(world_size)]

    def _exchange(self, job: dict[str, Any], *, deadline: float, timeout: float) -> dict[int, dict[str, Any]]:
        """Send a job to its ranks and collect one reply from each, or raise for the first that failed."""
        ranks = range(job["world_size"])
        replies: dict[int, dict[str, Any]] = {}
        for rank in ranks:
            try:
                self._workers[rank].pipe.send_bytes(_pack(job | {"rank": rank}))
            except BrokenPipeError:
                replies[rank] = self._death(rank)
        return self._collect(replies, ranks, job, deadline=deadline, timeout=timeout)

    def _collect(
        self,
        replies: dict[int, dict[str, Any]],
        ranks: Sequence[int],
        job: dict[str, Any],
        *,
        deadline: float,
        timeout: float,
    ) -> dict[int, dict[str, Any]]:
        """One reply from each of the ranks, those that are there already included."""
        target, world_size = job["target"], job["world_size"]
        while len(replies) < len(ranks):
            failed = any("error" in reply for reply in replies.values())
            pipes = {self._workers[rank].pipe: rank for rank in ranks if rank not in replies}
            ready = wait(list(pipes), ECHO_S if failed else max(0.0, deadline - time.monotonic()))
            if not ready and failed:
                break
            if not ready:
                self._show_stacks(pipes.values())
                detail = f"no result after {timeout:g} s from rank(s) {sorted(pipes.values())}"
                raise RankError(min(pipes.values()), target, world_size, detail)
            for pipe in ready:
                rank = pipes[pipe]  # type: ignore[index]
                replies[rank] = self._receive(rank)
        failures = {rank: reply for rank, reply in replies.items() if "error" in reply}
        if failures:
            first = min(failures, key=lambda rank: failures[rank]["time"])
            others = sorted(set(failures) - {first})
            echo = f"\n(after it, rank(s) {others} failed too)" if others else ""
            raise RankError(first, target, world_size, failures[first]["error"] + echo)
        return replies

    def _receive(self, rank: int) -> dict[str, Any]:
        try:
            return _unpack(self._workers[rank].pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            return self._death(rank)

    def _death(self, rank: int) -> dict[str, Any]:
        """The reply of a worker that cannot reply. It is the cause of whatever the others report."""
        process = self._workers[rank].process
        process.join(5)
        return {"error": f"its process ended with exit code {process.exitcode}", "time": 0.0}

    def _show_stacks(self, ranks: Any) -> None:
        """Let hanging ranks write where they are to stderr."""
        for rank in ranks:
            pid = self._workers[rank].process.pid
            if pid is not None and self._workers[rank].process.is_alive():
                os.kill(pid, signal.SIGUSR1)
        time.sleep(ECHO_S)

    def _drop(self, world_size: int) -> None:
        """End the workers of a failed job; the next job starts new ones."""
        for rank in range(world_size):
            self._workers.pop(rank).end()

    def close(self) -> None:
        """End every worker."""
        for worker in self._workers.values():
            worker.pipe.close()  # all begin to end before the first is waited for
        for worker in self._workers.values():
            worker.end(grace_s=5)
        self._workers.clear()

"""Two sides of one job: ranks that train, and behind them ranks that run the base for them.

The ranks of the launcher are split: the first ones are a world of their own to torch.distributed and to megatron-core,
and so are the last ones; nothing of either side's groups knows of the other. A bridge of host memory (gloo) over all of
them carries messages from rank to rank. Ranks of the bridge are the launcher's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_spec.errors import ConfigError, TrainingError, UnsupportedError
from mcore_spec.parallel.layout import Layout, Membership, init_process_group, world_size_from_environment

# Messages wait for as long as the other rank lives: a validation or a checkpoint may take its time.
_NO_LIMIT = timedelta(days=365)


class LostRankError(TrainingError):
    """A rank of the other side has ended."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Who is on which side.

    Attributes:
        num_train: ranks that train, from 0.
        num_extract: ranks behind them that run the base.
    """

    num_train: int
    num_extract: int

    @property
    def train_ranks(self) -> range:
        """Of the bridge."""
        return range(self.num_train)

    @property
    def extract_ranks(self) -> range:
        """Of the bridge."""
        return range(self.num_train, self.num_train + self.num_extract)

    def describe(self, rank: int) -> str:
        """``extraction rank 3``."""
        return f"{'training' if rank < self.num_train else 'extraction'} rank {rank}"


class Sent(NamedTuple):
    """A message that is on its way. It must be kept until `wait`."""

    work: dist.Work
    tensor: Tensor
    to: str

    def wait(self) -> None:
        """Until the other rank has taken it.

        Raises:
            LostRankError: it has ended.
        """
        _wait(self.work, self.to)


class Bridge:
    """This rank's end of the bridge. Messages of one tag between two ranks keep their order; threads may share it.

    Attributes:
        sides: who is where.
        rank: of this process on the bridge.
    """

    def __init__(self, sides: Sides, rank: int, group: Any) -> None:
        """Take the group over all ranks, a `ProcessGroupGloo`, of whose methods torch declares no types."""
        self.sides, self.rank, self._group = sides, rank, group

    @property
    def is_training(self) -> bool:
        """On which side this rank is."""
        return self.rank in self.sides.train_ranks

    def send(self, tensor: Tensor, to: int, *, tag: int) -> Sent:
        """Begin to send a tensor on the host.

        Raises:
            LostRankError: the other rank has ended.
        """
        name = self.sides.describe(to)
        given = tensor.contiguous()
        try:
            return Sent(self._group.send([given], to, tag), given, name)
        except RuntimeError as error:
            raise _lost(name, error) from error

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int, *, tag: int) -> Tensor:
        """Wait for a tensor on the host.

        Raises:
            LostRankError: the other rank has ended.
        """
        tensor, name = torch.empty(tuple(shape), dtype=dtype), self.sides.describe(source)
        try:
            work = self._group.recv([tensor], source, tag)
        except RuntimeError as error:
            raise _lost(name, error) from error
        _wait(work, name)
        return tensor


def _wait(work: dist.Work, name: str) -> None:
    try:
        work.wait(_NO_LIMIT)
    except RuntimeError as error:
        raise _lost(name, error) from error


def _lost(name: str, error: RuntimeError) -> LostRankError:
    reason = " ".join(str(error).split("] ")[-1].split())
    return LostRankError(
        f"{name} has ended ({reason}); its own message, if it had one, says why. Checkpoints are as they were: give "
        "the same command to go on from the newest"
    )


@contextmanager
def split_ranks(layout: Layout, *, num_extract: int, timeout_s: int = 1800) -> Iterator[Bridge]:
    """Process groups of this rank's side, and the bridge, for the time of a ``with`` block.

    Args:
        layout: of the training side.
        num_extract: the last ranks of the launcher, which run the base.
        timeout_s: seconds after which a collective that waits for a lost rank of its own side fails.

    Raises:
        ConfigError: nobody is left to train, or a layout that does not fit those who are.
        UnsupportedError: somebody else has made a process group of all ranks.
    """
    sides = _share_out(layout, num_extract=num_extract)
    if dist.is_initialized():
        raise UnsupportedError(
            f"extract_ranks = {num_extract} makes process groups of its own, and there is one already; start the "
            "command with torchrun or srun"
        )
    timeout = timedelta(seconds=timeout_s)
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    is_training = rank < sides.num_train
    own = sides.train_ranks if is_training else sides.extract_ranks
    side = dist.PrefixStore("train" if is_training else "extract", store)
    init_process_group(timeout, Membership(side, rank - own.start, len(own)))
    group = dist.ProcessGroupGloo(dist.PrefixStore("bridge", store), rank, size, timeout)
    try:
        yield Bridge(sides, rank, group)
    finally:
        dist.destroy_process_group()


def _share_out(layout: Layout, *, num_extract: int) -> Sides:
    world_size = world_size_from_environment()
    num_train, model_ranks = world_size - num_extract, layout.tensor * layout.pipeline * layout.context
    if num_train < 1 or "RANK" not in os.environ:
        raise ConfigError(
            f"extract_ranks = {num_extract} of world size {world_size} leaves no rank to train; start "
            f"{model_ranks + num_extract} processes (torchrun --nproc_per_node={model_ranks + num_extract})"
        )
    if num_train % model_ranks:
        raise ConfigError(
            f"world size {world_size} without extract_ranks = {num_extract} leaves {num_train} training ranks, not "
            f"divisible by tensor, pipeline and context parallel sizes of {layout.tensor} x {layout.pipeline} x "
            f"{layout.context}; start {model_ranks + num_extract} processes, or {model_ranks} more at a time"
        )
    return Sides(num_train=num_train, num_extract=num_extract)

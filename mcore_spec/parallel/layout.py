"""The parallel layout: which ranks share a layer, which hold the next ones, and starting it all up."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

from mcore_spec.errors import ConfigError, McoreSpecError
from mcore_spec.parallel import cpu_runtime
from mcore_spec.parallel.tensor_parallel import TensorParallel

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the model is cut over the ranks; what is left over is data parallel.

    Attributes:
        tensor: ranks that share each layer.
        pipeline: stages.
        context: ranks that share the rows of each sequence.
        sequence_parallel: shard the sequence over the tensor group between parallel regions.
        last_stage_layers: decoder layers on the last stage, where they should not be split evenly.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence_parallel: bool = False
    last_stage_layers: int | None = None

    def check(self, *, world_size: int) -> None:
        """Refuse a layout that does not fit the number of ranks.

        Raises:
            ConfigError: sizes that do not divide.
        """
        model_ranks = self.tensor * self.pipeline * self.context
        if world_size % model_ranks:
            context = "" if self.context == 1 else f" x context_parallel_size = {self.context}"
            raise ConfigError(
                f"world size {world_size} is not divisible by tensor_model_parallel_size = {self.tensor} x "
                f"pipeline_model_parallel_size = {self.pipeline}{context}; start {model_ranks} processes or a multiple "
                f"(torchrun --nproc_per_node={model_ranks})"
            )


def world_size_from_environment() -> int:
    """Number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_data_ranks(layout: Layout) -> int:
    """Ranks that hold the same part of the model and see other samples."""
    return dist.get_world_size() // (layout.tensor * layout.pipeline * layout.context)


def device() -> torch.device:
    """The device of this rank: its GPU, or the host."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def parallel_runtime(layout: Layout, *, seed: int = 1234, timeout_s: int = 1800) -> Iterator[None]:
    """Process groups of `layout` for the time of a ``with`` block.

    A process group that exists already (somebody else's launcher) is used and left alone.

    Args:
        layout: how to cut.
        seed: of megatron-core's random states.
        timeout_s: seconds after which a collective that waits for a lost rank fails.

    Raises:
        ConfigError: the layout does not fit the number of ranks.
    """
    starts_group = not dist.is_initialized()
    layout.check(world_size=world_size_from_environment() if starts_group else dist.get_world_size())
    from megatron.core import parallel_state, tensor_parallel

    cpu_runtime.install()
    with process_group(timeout_s=timeout_s):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            context_parallel_size=layout.context,
        )
        try:
            tensor_parallel.model_parallel_cuda_manual_seed(seed)
            yield
        finally:
            parallel_state.destroy_model_parallel()


@contextmanager
def process_group(*, timeout_s: int) -> Iterator[None]:
    """All ranks of the launcher for the time of a ``with`` block, unless they are a group already.

    Around several `parallel_runtime` one after the other: gloo cannot begin a second group with the same launcher.
    """
    starts_group = not dist.is_initialized()
    if starts_group:
        init_process_group(timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        if starts_group:
            dist.destroy_process_group()


class Membership(NamedTuple):
    """One process of a group that is not all of the launcher's.

    Attributes:
        store: where the group meets.
        rank: of this process in it.
        size: of the group.
    """

    store: dist.Store
    rank: int
    size: int


def init_process_group(timeout: timedelta, member: Membership | None = None) -> None:
    """The default group: of the launcher's ranks, unless a membership says otherwise; of one without a launcher."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if member is None and "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
        return
    # One process without a launcher needs no address to meet at.
    alone = Membership(dist.HashStore(), 0, 1)
    store, rank, size = alone if member is None else member
    dist.init_process_group(backend, rank=rank, world_size=size, store=store, timeout=timeout)


def tensor_parallel(layout: Layout) -> TensorParallel:
    """This rank's tensor-parallel group, inside of `parallel_runtime`."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    return TensorParallel(group=group, sequence_parallel=layout.sequence_parallel)


def is_rank_zero() -> bool:
    """Whether this process speaks for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def run_on_rank_zero(function: Callable[[], Result]) -> Result:
    """Call `function` on rank 0 alone; every rank returns its result, or raises its error.

    An error that only rank 0 saw would leave the others waiting in the next collective.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except (McoreSpecError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def run_on_every_rank(function: Callable[[], Result]) -> Result:
    """Call `function` on every rank; where it fails on one, every rank raises that error.

    A rank that failed alone would leave the others waiting in the next collective.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return function()
    result: Result | None = None
    own: McoreSpecError | OSError | None = None
    try:
        result = function()
    except (McoreSpecError, OSError) as error:
        own = error
    errors: list[McoreSpecError | OSError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, own)
    for each in errors:
        if each is not None:
            raise each
    return cast(Result, result)


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed."""
    return importlib.util.find_spec("transformer_engine") is not None


def require_transformer_engine(what: str, *, instead: str) -> None:
    """Fail with the remedy where Transformer Engine is asked for and not installed.

    Args:
        what: the option that asks for it.
        instead: the option that does not.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{what} needs NVIDIA Transformer Engine: pip install 'mcore-spec[gpu]', or choose {instead} ({error})"
        ) from error

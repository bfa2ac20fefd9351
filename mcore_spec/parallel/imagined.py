"""One rank of a layout without the others: for building a model that nobody runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from mcore_spec.errors import ConfigError
from mcore_spec.parallel import cpu_runtime
from mcore_spec.parallel.layout import Layout, world_size_from_environment


def imagined_world_size(layout: Layout, *, num_gpus: int | None) -> int:
    """How many ranks there would be.

    Args:
        layout: how the model is cut.
        num_gpus: that were asked for; ``None``: those that torchrun started, or one copy of the model.

    Raises:
        ConfigError: not a multiple of what one copy of the model takes.
    """
    started = world_size_from_environment()
    world_size = num_gpus or (layout.tensor * layout.pipeline * layout.context if started == 1 else started)
    layout.check(world_size=world_size)
    return world_size


def last_stage_rank(layout: Layout, *, world_size: int) -> int:
    """The first rank of the last pipeline stage: megatron-core's stages are blocks of ranks."""
    return world_size - world_size // layout.pipeline


@contextmanager
def imagined_rank(layout: Layout, *, rank: int, world_size: int) -> Iterator[None]:
    """Process groups as rank `rank` would have them, with nobody at the other end.

    Collectives return at once with what was in memory; nothing may be computed from them.

    Raises:
        ConfigError: a process group exists already.
    """
    # Where torch keeps its groups without communication; there is no public place for them yet.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ConfigError("a layout cannot be imagined while a process group exists; call it outside of that")
    layout.check(world_size=world_size)
    from megatron.core import parallel_state

    cpu_runtime.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            context_parallel_size=layout.context,
            # Its second groups, for objects, name a backend that has other ends.
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()

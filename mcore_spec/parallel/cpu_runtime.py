"""Megatron-core on a machine without CUDA: gloo instead of NCCL, host memory instead of device memory.

megatron-core asks `torch.cuda` for the current device, for random states and for streams wherever it
allocates or communicates. `install` answers those questions for the CPU. It is called by
`parallel_runtime`, works once, does nothing where CUDA exists, and touches only what megatron-core 0.16 was seen to
call; each entry says who asks. Remove an entry once megatron-core asks `torch.accelerator` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch

_installed = False


class _HostStream:
    """Stands for a CUDA stream or event: on the host every operation has finished when it returns."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def wait_stream(self, _other: object) -> None: ...

    def wait_event(self, _event: object) -> None: ...

    def record(self, _stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def wait(self, _stream: object = None) -> None: ...


def _host_context(*_args: Any, **_kwargs: Any) -> AbstractContextManager[None]:
    return nullcontext()


def _nothing() -> Callable[..., None]:
    """A new function each time: torch.compile refuses one function under several of torch's names."""
    return lambda *_args, **_kwargs: None


def _set_rng_state(state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
    torch.set_rng_state(state)


def _causal_mask(size: int) -> torch.Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu(1)


# Makers of tensors that megatron-core calls with ``device="cuda"``.
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange")


class _HostTorch(ModuleType):
    """torch as a module of megatron-core sees it: what is asked for on "cuda" is made on the host."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            vars(self)[name] = _on_host(vars(torch)[name])

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return factory(*args, device="cpu" if device == "cuda" else device, **kwargs)

    return make


@contextmanager
def tensor_types_of_cuda() -> Iterator[None]:
    """Let tensors on the host say ``torch.cuda.FloatTensor`` of themselves during the block.

    megatron-core's mixed-precision optimizers sort parameters by these names when they are built, and refuse
    every other.
    """
    of_host = torch.Tensor.type

    def of_cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        named = of_host(tensor, *args, **kwargs)
        return named.replace("torch.", "torch.cuda.") if isinstance(named, str) else named

    torch.Tensor.type = of_cuda  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = of_host  # type: ignore[method-assign]


def install() -> None:
    """Let megatron-core run on the host; inert where CUDA is available, and when called again."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    from megatron.core.fusions import fused_softmax
    from megatron.core.optimizer import optimizer
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import moe_utils

    cuda: Any = torch.cuda
    # tensor_parallel.mappings, layers, p2p_communication: `device=torch.cuda.current_device()`.
    cuda.current_device = lambda: torch.device("cpu")
    # dist_checkpointing moves tensors to the device of this rank before it loads them.
    cuda.set_device = _nothing()
    # tensor_parallel.random keeps one random state per region; P2P and checkpoint writing synchronise.
    cuda.get_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    cuda.set_rng_state = _set_rng_state
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.synchronize = _nothing()
    cuda.empty_cache = _nothing()
    # dist_checkpointing's asynchronous writer copies on a stream of its own.
    cuda.Stream = _HostStream
    cuda.Event = _HostStream
    cuda.stream = _host_context
    cuda.current_stream = _HostStream
    # The default generators are indexed by device number.
    cuda.default_generators = (torch.default_generator,)
    megatron_random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = _set_rng_state
    # Its own attention makes the causal mask on device "cuda" where it is given none.
    fused_softmax.get_default_causal_mask = _causal_mask
    # The router asks whether this is None; without Transformer Engine, which needs CUDA, it is no name at all.
    vars(moe_utils).setdefault("te_general_gemm", None)
    # LanguageModule copies the tied embedding with `.cuda()` before it reduces it over the stages.
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign]
    # Loss scale, overflow flag and token counters.
    for module in (optimizer, schedules):
        vars(module)["torch"] = _HostTorch()
    _installed = True

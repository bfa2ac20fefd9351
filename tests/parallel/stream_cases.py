"""What the ranks do for `test_streaming.py`: some train, the others run the base for them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mcore_spec.bases.extraction import DataShare
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.serving import serve_states
from mcore_spec.cli.main import run_command
from mcore_spec.cli.streaming import Streams
from mcore_spec.data.hidden_states.streamed import RequestQueue, notices_to_extraction
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.parallel.sides import split_ranks
from mcore_spec.training.step import DraftStep
from tests.parallel import training_cases
from tests.parallel.offline_cases import Kept
from tests.parallel.training_cases import CASES

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    """Where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def launcher(*, port: int, directory: Path) -> Iterator[int]:
    """The environment that torchrun gives its processes, in the place of the pool's process group."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    values = (str(rank), str(size), str(rank), "127.0.0.1", str(port))
    os.environ.update(zip(_LAUNCHER, values, strict=True))
    try:
        yield rank
    finally:
        for name in _LAUNCHER:
            del os.environ[name]
    rendezvous = f"file://{directory / f'rendezvous_{port}'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size, timeout=timedelta(seconds=60))


def gradients(
    *, layout: Layout, num_extract: int, directory: Path, names: Sequence[str], port: int, scratch: Path
) -> dict[str, Any]:
    """What `training_cases.gradients` gives on ranks that train; on the others how many batches were computed."""
    with (
        launcher(port=port, directory=scratch),
        split_ranks(layout, num_extract=num_extract, timeout_s=60) as bridge,
    ):
        if bridge.is_training:
            with notices_to_extraction(bridge) as notices:
                reader = Streams(notices, depth=2).open_reader
                return training_cases.gradients(layout=layout, directory=directory, names=names, read_states=reader)
        requests = RequestQueue(bridge)
        with parallel_runtime(Layout()):
            model = training_cases.converted(directory, Layout(), CASES["whole vocabulary"])
            requests.wait_until_ready()
            count = serve_states(
                MegatronBase(model),
                Kept(),
                requests,
                aux_layer_ids=DraftStep(model).task.aux_layer_ids,
                num_kept=6,
                share=DataShare(rank=0, size=1, context_group=None, device=torch.device("cpu")),
            )
        return {"computed": count}


def command(*, words: list[str], port: int, scratch: Path) -> tuple[int, str]:
    """``finetune`` on this rank: its code and what it said."""
    said = StringIO()
    with launcher(port=port, directory=scratch), redirect_stderr(said), redirect_stdout(said):
        code = run_command("finetune", words)
    return code, said.getvalue()

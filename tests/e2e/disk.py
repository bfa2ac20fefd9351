"""Disks that fill up at a chosen file."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch

from mcore_spec.bases.megatron_build import build_gpt_model
from mcore_spec.checkpoint.store import make_record, save_checkpoint
from mcore_spec.config import BaseIdentity
from mcore_spec.conversion import convert
from mcore_spec.errors import CheckpointError
from mcore_spec.parallel.layout import Layout, barrier, is_rank_zero, parallel_runtime
from tests.e2e.conftest import tree
from tests.tiny import base_architecture

PAGE = 4096


class Disk:
    """A tmpfs whose room is set while it is in use."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def used(self, limit: str) -> int:
        """Pages (limit ``size``), or files and directories (``nr_inodes``)."""
        found = os.statvfs(self.directory)
        if limit == "nr_inodes":
            return found.f_files - found.f_ffree
        return (found.f_blocks - found.f_bfree) * found.f_frsize // PAGE

    def set_limit(self, limit: str, number: int) -> None:
        value = number * PAGE if limit == "size" else number
        subprocess.run(["mount", "-o", f"remount,{limit}={value}", str(self.directory)], check=True)


@contextmanager
def mounted_disk(directory: Path) -> Iterator[Disk | None]:
    """A large tmpfs for the time of a block; ``None`` where mounting is not permitted."""
    directory.mkdir()
    # Limits from the start: one that a tmpfs was mounted without cannot be set later.
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=10000", "tmpfs", str(directory)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield Disk(directory)
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def saves_with_growing_room(*, directory: Path, limit: str) -> list[str]:
    """On this rank: save, then again with room for nothing, for a little more, ... until it succeeds.

    Every failure must leave what was there, and the ranks able to go on together.

    Returns:
        What each failure said.
    """
    disk, messages = Disk(directory), []
    identity = BaseIdentity(source="a base", fingerprint="a base")
    with parallel_runtime(Layout(tensor=2)):
        model = build_gpt_model(base_architecture(num_layers=2, dtype="float32"), Layout(tensor=2))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
        convert(model, "medusa")
        record = make_record(model, identity)
        tokenizer_file = directory.parent / "tokenizer.json"
        save_checkpoint(model, directory / "checkpoint", record, tokenizer_files=[tokenizer_file])
        before, used = tree(directory), disk.used(limit)
        for room in count():
            barrier()
            if is_rank_zero():
                disk.set_limit(limit, used + room)
            barrier()
            try:
                save_checkpoint(model, directory / "checkpoint", record, tokenizer_files=[tokenizer_file])
            except (CheckpointError, OSError) as error:
                messages.append(str(error))
            else:
                break
            barrier()
            assert tree(directory) == before, messages[-1]
    return messages

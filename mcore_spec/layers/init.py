"""Initial weights that depend on the seed and the parameter's name, not on the parallel layout.

A rank draws the whole matrix from a generator of its own, seeded by (seed, name), and keeps its
shard: the same draft results from every tensor-parallel size and from every order of construction.
The full matrix exists for one parameter at a time, in host memory.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def full_normal(shape: tuple[int, ...], *, std: float, seed: int, name: str) -> Tensor:
    """A float32 host tensor of normal values with standard deviation `std`, fixed by (seed, name)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32).normal_(std=std, generator=generator)

"""GPUs: what they hold, and how fast they multiply."""

from __future__ import annotations

from typing import NamedTuple

GIB = 2**30


class Gpu(NamedTuple):
    """One GPU.

    Attributes:
        memory_gib: as torch reports it.
        dense_tflops: bfloat16 matrix products without sparsity, by the vendor's data sheet, 1e12 a second.
    """

    memory_gib: float
    dense_tflops: float


GPUS: dict[str, Gpu] = {
    "a100-40gb": Gpu(39.4, 312.0),
    "a100": Gpu(79.1, 312.0),
    "l40s": Gpu(44.4, 362.0),
    "h100": Gpu(79.1, 989.0),
    "h200": Gpu(139.8, 989.0),
    "b200": Gpu(178.3, 2250.0),
}

# What a plan leaves free: the CUDA context and NCCL's buffers (measured by others at 1 to 2 GiB), and a share for
# blocks that the allocator cannot join.
RESERVED_GIB = 2.0
RESERVED_SHARE = 0.06


def usable_bytes(gpu: Gpu) -> int:
    """What a plan may fill."""
    return int((gpu.memory_gib * (1 - RESERVED_SHARE) - RESERVED_GIB) * GIB)

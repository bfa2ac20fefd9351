"""Uniform noise that is a function of a document's key, the row's position and the channel, and of nothing else.

A rank makes the noise of its own rows, on its own device, and every layout comes to the same numbers: no generator has
a state that would depend on what was drawn before. splitmix64 (Steele et al., OOPSLA 2014, "Fast splittable
pseudorandom number generators"), once seeded by the key for the positions and once by each of these for the channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned number: products wrap around alike."""
    return value - (1 << 64) if value >> 63 else value


_STEP, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
# A float32 holds numbers of this many bits, from -2^23 to 2^23, exactly.
_NUM_BITS = 24


def draw_noise_key(generator: np.random.RandomState) -> int:
    """The key of one document."""
    return int(generator.randint(0, 2**63 - 1, dtype=np.int64))


def uniform_noise(keys: Tensor, positions: Tensor, num_channels: int) -> Tensor:
    """Numbers in [-1, 1), float32 [rows, num_channels].

    Args:
        keys: of each row's document, int64 [rows].
        positions: of each row in its document, int64 [rows].
        num_channels: width of a row.
    """
    rows = _mixed(keys + (positions + 1) * _STEP)
    channels = torch.arange(1, num_channels + 1, device=keys.device) * _STEP
    bits = _shifted(_mixed(rows[:, None] + channels), 64 - _NUM_BITS)
    return bits.to(torch.float32).sub_(2 ** (_NUM_BITS - 1)).mul_(2.0 ** (1 - _NUM_BITS))


def _mixed(state: Tensor) -> Tensor:
    """splitmix64's output function."""
    state = (state ^ _shifted(state, 30)) * _FIRST
    state = (state ^ _shifted(state, 27)) * _SECOND
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, num_bits: int) -> Tensor:
    """A shift to the right that brings zeros in, where torch's brings the sign in."""
    return (state >> num_bits) & ((1 << (64 - num_bits)) - 1)

"""Rotary position embedding (Su et al., arXiv 2104.09864) and its scalings, for base and draft alike.

Frequencies and angles are float32, as in transformers, whatever the model's dtype: bases were trained
that way, and engines serve that way. Formulas of the scalings: llama3 (Llama 3.1 model card), YaRN
(Peng et al., arXiv 2309.00071), LongRoPE (Ding et al., arXiv 2402.13753).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mcore_spec.config import RopeConfig


class Frequencies(NamedTuple):
    """Inverse frequencies [head_dim / 2] (float32) and the factor on cos and sin."""

    inv_freq: Tensor
    attention_scaling: float


class RotaryEmbedding(nn.Module):
    """cos and sin of the angles at given positions; chooses LongRoPE's table by the length of the sequence."""

    short: Tensor
    long: Tensor

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        """Compute the tables.

        Args:
            rope: base and scaling.
            head_dim: width of a head; the whole head is rotated.
        """
        super().__init__()
        short = rotary_frequencies(rope, head_dim, beyond_original=False)
        long = rotary_frequencies(rope, head_dim, beyond_original=True)
        self.attention_scaling = short.attention_scaling
        # Longer sequences use the long table; other scalings have one table only.
        self.has_two_tables = rope.rope_type == "longrope"
        self.original_length = rope.scaling.get("original_max_position_embeddings", 0)
        self.register_buffer("short", short.inv_freq, persistent=False)
        self.register_buffer("long", long.inv_freq, persistent=False)

    def angles(self, positions: Tensor, *, sequence_length: int | Tensor) -> Tensor:
        """[...] integer positions -> [..., head_dim] float32 angles, the two halves alike.

        Args:
            positions: inside the sequence.
            sequence_length: of the sequence that the positions are in; a tensor: of each position's, [...].
        """
        inv_freq = self.short
        if self.has_two_tables and isinstance(sequence_length, Tensor):
            inv_freq = torch.where((sequence_length > self.original_length).unsqueeze(-1), self.long, self.short)
        elif self.has_two_tables and sequence_length > self.original_length:
            inv_freq = self.long
        angles = positions.to(torch.float32).unsqueeze(-1) * inv_freq
        return torch.cat((angles, angles), dim=-1)

    def forward(self, positions: Tensor, *, sequence_length: int | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[...] positions -> cos and sin, each [..., head_dim] in `dtype`; lengths as in `angles`."""
        angles = self.angles(positions, sequence_length=sequence_length)
        return (
            (angles.cos() * self.attention_scaling).to(dtype),
            (angles.sin() * self.attention_scaling).to(dtype),
        )


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [s, b, heads, d] by cos and sin [s, 1, 1, d] (the rotate-half convention of Llama)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotary_frequencies(rope: RopeConfig, head_dim: int, *, beyond_original: bool) -> Frequencies:
    """Inverse frequencies of one kind of scaling.

    Args:
        rope: base and scaling.
        head_dim: width of a head.
        beyond_original: LongRoPE: the table for sequences longer than the original context.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (rope.theta**exponents)
    scaling = rope.scaling
    if rope.rope_type == "linear":
        return Frequencies(plain / scaling["factor"], 1.0)
    if rope.rope_type == "llama3":
        return Frequencies(_llama3(plain, rope), 1.0)
    if rope.rope_type == "yarn":
        return _yarn(rope, head_dim)
    if rope.rope_type == "longrope":
        table = scaling["long_factor"] if beyond_original else scaling["short_factor"]
        factors = torch.tensor(table, dtype=torch.float32)
        return Frequencies(1.0 / (factors * rope.theta**exponents), _longrope_scaling(rope))
    return Frequencies(plain, 1.0)


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    factor, original = rope.scaling["factor"], rope.scaling["original_max_position_embeddings"]
    low, high = rope.scaling["low_freq_factor"], rope.scaling["high_freq_factor"]
    wavelength = 2 * math.pi / plain
    slowed = torch.where(wavelength > original / low, plain / factor, plain)
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * slowed / factor + smooth * slowed
    is_between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(is_between, blended, slowed)


def _yarn(rope: RopeConfig, head_dim: int) -> Frequencies:
    scaling = rope.scaling
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def rotations_to_dim(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = rotations_to_dim(scaling.get("beta_fast") or 32)
    high = rotations_to_dim(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    powers = rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    inv_freq = 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep
    return Frequencies(inv_freq, _yarn_scaling(rope))


def _yarn_scaling(rope: RopeConfig) -> float:
    scaling = rope.scaling
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * weight * math.log(scaling["factor"]) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return float(mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"]))
    return mscale(1.0)


def _longrope_scaling(rope: RopeConfig) -> float:
    scaling = rope.scaling
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling["factor"] <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(scaling["factor"]) / math.log(scaling["original_max_position_embeddings"]))

"""Quantisation written down from its definition, without the package and without torch's casts."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def e4m3_values() -> list[float]:
    """The finite non-negative numbers of float8_e4m3fn: 4 exponent bits with bias 7, 3 of mantissa, no infinity."""
    values = []
    for code in range(0x7F):  # 0x7F is NaN
        exponent, mantissa = code >> 3, code & 7
        values.append((mantissa / 8) * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return values


E4M3 = e4m3_values()


def nearest_e4m3(x: float) -> float:
    """Nearest number, a tie to the even mantissa; what is beyond the largest is the largest."""
    size = abs(x)
    if size >= E4M3[-1]:
        return float(np.copysign(E4M3[-1], x))
    above = bisect.bisect_left(E4M3, size)
    if E4M3[above] == size:
        return x
    low, high = E4M3[above - 1], E4M3[above]
    if size - low == high - size:
        chosen = low if (above - 1) % 2 == 0 else high
    else:
        chosen = low if size - low < high - size else high
    return float(np.copysign(chosen, x))


def nearest_whole(x: float, largest: int) -> float:
    """Nearest whole number, a tie to the even one, cut at `largest`."""
    return float(np.clip(np.rint(x), -largest, largest))


def quantize(x: Array, amax: Array, number: str) -> Array:
    """Each value's stand-in; ``amax`` fits `x`. Scales are float32, as files hold them."""
    largest = {"e4m3": 448, "int8": 127, "int4": 7}[number]
    scale = np.where(amax > 0, np.float32(amax) / np.float32(largest), 1.0).astype(np.float64)
    ratio = x / scale
    nearest = nearest_e4m3 if number == "e4m3" else lambda value: nearest_whole(value, largest)
    return np.vectorize(nearest, otypes=[np.float64])(ratio) * scale


def block_amax(weight: Array, blocks: Sequence[int]) -> Array:
    """Largest absolute value of each block of `weight`, on every entry of the block; the last ones may be partial."""
    rows, columns = blocks
    found = np.zeros_like(weight)
    for top in range(0, weight.shape[0], rows):
        for left in range(0, weight.shape[1], columns):
            block = (slice(top, top + rows), slice(left, left + columns))
            found[block] = np.abs(weight[block]).max()
    return found

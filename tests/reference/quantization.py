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


def quantize_rows(x: Array, amax: Array, number: str) -> Array:
    """`quantize` of many values: the nearest numbers are found in the table by bisection of all at once."""
    if number != "e4m3":
        return quantize(x, amax, number)
    scale = np.where(amax > 0, np.float32(amax) / np.float32(448), 1.0).astype(np.float64)
    return nearest_of_many(x / scale) * scale


def nearest_of_many(ratio: Array) -> Array:
    """`nearest_e4m3` of each."""
    table, size = np.array(E4M3), np.minimum(np.abs(ratio), E4M3[-1])
    above = np.searchsorted(table, size)
    below = np.maximum(above - 1, 0)
    to_low, to_high = size - table[below], table[above] - size
    takes_low = (to_low < to_high) | ((to_low == to_high) & (below % 2 == 0))
    return np.copysign(np.where(takes_low & (above > 0), table[below], table[above]), ratio)


def whole_scale(scale: Array, shape: tuple[int, int]) -> Array:
    """A scale of a file, of the tensor, of channels or of blocks of 128 x 128, on every entry of its weight."""
    if scale.size == 1:
        return np.full(shape, float(scale.reshape(-1)[0]))
    if scale.size == shape[0]:
        return np.broadcast_to(scale.reshape(-1, 1).astype(np.float64), shape)
    blocks = scale.reshape(-(-shape[0] // 128), -(-shape[1] // 128)).astype(np.float64)
    return np.kron(blocks, np.ones((128, 128)))[: shape[0], : shape[1]]

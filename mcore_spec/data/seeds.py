"""Random numbers that follow from a seed and from what they are for, and from nothing that ran before."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class RandomUse(IntEnum):
    """What a stream is for: two of one seed differ. The numbers are part of what a resumed run must find again."""

    SPLIT = 0
    EPOCH = 1
    MIXING = 2
    NOISE = 3


def random_state(seed: int, use: RandomUse, *numbers: int) -> np.random.RandomState:
    """numpy's frozen generator: a run that is resumed under another numpy must find the same numbers.

    Args:
        seed: of the run.
        use: what for.
        numbers: which of these (an epoch, a sample), each below 2^32.
    """
    return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, int(use), *numbers])

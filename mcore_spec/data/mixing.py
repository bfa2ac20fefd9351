"""Which rows read the draft's own state instead of the base's, where training mixes them.

The cheap alternative to keys that grow with the TTT steps (`mcore_spec.drafts.mixing`): every step is plain causal
attention, and after step k some rows take the draft's state of the row before them, for the rest of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mcore_spec.data.document import BoolArray, IntArray


def draw_replaced(
    lengths: IntArray, starts: IntArray, *, num_rows: int, num_steps: int, generators: Sequence[np.random.RandomState]
) -> BoolArray:
    """Draw the rows, document by document.

    After step k max(1, n // (2^k + 1)) rows of a document of n tokens are drawn (EAGLE-3 training of NVIDIA ModelOpt),
    each time anew. Its first row has no row before it and is never among them.

    Args:
        lengths: tokens of each document, int64 [documents].
        starts: first row of each, int64 [documents].
        num_rows: rows in all, padding included.
        num_steps: K; nothing is drawn after the last.
        generators: one a document.

    Returns:
        Rows that take the draft's state after step k, bool [K - 1, rows].
    """
    replaced = np.zeros((num_steps - 1, num_rows), dtype=np.bool_)
    for length, start, generator in zip(lengths.tolist(), starts.tolist(), generators, strict=True):
        for step in range(num_steps - 1):
            num_drawn = min(max(1, length // (2**step + 1)), length - 1)
            replaced[step, start + 1 + generator.permutation(length - 1)[:num_drawn]] = True
    return replaced

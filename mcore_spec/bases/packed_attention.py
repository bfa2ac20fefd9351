"""Causal attention of a base's layer over one packed row of documents, windowed or not, whatever the library.

Packed documents do not see each other. Under context parallelism keys and values are joined over the ranks. Through
torch's fused kernels: no scores of size [s, s].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mcore_spec.layers.attention import KeyValue, join_rows
from mcore_spec.layers.flash import attend, from_bhsd, to_bhsd
from mcore_spec.parallel.documents import Documents

# Queries of a windowed layer are taken in blocks of this many rows, so that scores are [block, block +
# window] and not [s, s].
WINDOW_BLOCK = 512


class Window(NamedTuple):
    """What the queries of a layer see.

    Attributes:
        size: tokens, the query's own included; ``None``: all before it.
        scale: on the scores; ``None``: 1 / sqrt(d).
    """

    size: int | None = None
    scale: float | None = None


class _Run(NamedTuple):
    """Queries ``start..stop`` stand at ``key_start`` of the whole row, in a document that begins at `first`."""

    start: int
    stop: int
    key_start: int
    first: int


def packed_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: Window) -> Tensor:
    """Attention of this rank's rows; keys and values cross the ranks in one exchange.

    Args:
        query: [rows, 1, heads, d].
        key: like `query`, with the key/value heads.
        value: like `key`.
        documents: which rows see each other.
        window: how far.

    Returns:
        [rows, 1, heads, d].
    """
    assert query.shape[0] == documents.num_local_rows, "query is this rank's part of the packed row"
    keys, values = join_rows(KeyValue(key, value), documents)
    if window.size is not None and window.size < longest(documents.bounds):
        q, k, v = (to_bhsd(x) for x in (query, keys, values))
        return from_bhsd(_windowed(q, k, v, _runs(documents), window))
    if documents.is_single:
        q, k, v = (to_bhsd(x) for x in (query, keys, values))
        return from_bhsd(_causal(q, k, v, window))
    return attend(query, keys, values, pieces=documents.pieces, scale=window.scale)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, window: Window) -> Tensor:
    """Attention where each of the b columns is one document; [s, b, heads, d] -> the same."""
    q, k, v = (to_bhsd(x) for x in (query, key, value))
    length = q.shape[2]
    if window.size is None or window.size >= length:
        return from_bhsd(_causal(q, k, v, window))
    return from_bhsd(_windowed(q, k, v, [_Run(0, length, 0, 0)], window))


def longest(bounds: Sequence[int]) -> int:
    """Rows of the longest document between these bounds."""
    return max(stop - start for start, stop in pairwise(bounds))


def _causal(q: Tensor, k: Tensor, v: Tensor, window: Window) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=window.scale, enable_gqa=True)


def _windowed(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[_Run], window: Window) -> Tensor:
    """[b, heads, s, d]; the runs cover the queries in their order."""
    blocks = [
        _block(q, k, v, run._replace(start=start, key_start=run.key_start + start - run.start), window)
        for run in runs
        for start in range(run.start, run.stop, WINDOW_BLOCK)
    ]
    return torch.cat(blocks, dim=2)


def _block(q: Tensor, k: Tensor, v: Tensor, run: _Run, window: Window) -> Tensor:
    """At most `WINDOW_BLOCK` queries from the start of the run."""
    assert window.size is not None
    stop = min(run.start + WINDOW_BLOCK, run.stop)
    key_stop = run.key_start + stop - run.start
    first_key = max(run.first, run.key_start - window.size + 1)
    distance = (
        torch.arange(run.key_start, key_stop, device=q.device)[:, None]
        - torch.arange(first_key, key_stop, device=q.device)[None, :]
    )
    visible = (distance >= 0) & (distance < window.size)
    keys, values = k[:, :, first_key:key_stop], v[:, :, first_key:key_stop]
    return F.scaled_dot_product_attention(
        q[:, :, run.start : stop], keys, values, attn_mask=visible, scale=window.scale, enable_gqa=True
    )


def _runs(documents: Documents) -> list[_Run]:
    runs, row = [], 0
    for number, start, stop in documents.chunks:
        runs.append(_Run(row, row + stop - start, start, documents.bounds[number]))
        row += stop - start
    return runs

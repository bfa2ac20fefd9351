"""What the attention of a base is told when its sequences grow row by row, with keys and values kept.

It travels as megatron-core's own description of a packed row. The rotary embedding is applied by our attention and
not by megatron-core's, which cuts the angles over the context-parallel ranks: here every one of them has all rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from mcore_spec.layers.attention import KeyValue
from mcore_spec.layers.cache import KeyValueCache, NewRows
from mcore_spec.layers.rotary import RotaryEmbedding, apply_rotary


@dataclass
class CacheParams(PackedSeqParams):
    """The new rows of a forward pass and where their keys and values go.

    Attributes:
        rows: the new rows.
        cache: of the base's layers on this rank.
        cos: of the rows' angles, [rows, 1, d].
        sin: like `cos`.
    """

    rows: NewRows = field(kw_only=True)
    cache: KeyValueCache = field(kw_only=True)
    cos: Tensor = field(kw_only=True)
    sin: Tensor = field(kw_only=True)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, window: int | None, scale: float | None
    ) -> Tensor:
        """One layer: [rows, heads, d] -> [rows, heads d]; keys and values are kept.

        Args:
            query: not rotated.
            key: not rotated, [rows, kv heads, d].
            value: like `key`.
            layer: number of the layer.
            window: tokens that a row sees, its own included; ``None``: all.
            scale: of the scores; ``None``: 1 / sqrt(d).
        """
        cached = self.cache.write(layer, self.rows, KeyValue(apply_rotary(key, self.cos, self.sin), value))
        query = apply_rotary(query, self.cos, self.sin)
        return self.rows.attend(query, cached, window=window, scale=scale).flatten(1)


def cache_params(rows: NewRows, cache: KeyValueCache, rotary: RotaryEmbedding, *, dtype: torch.dtype) -> CacheParams:
    """The parameters of one forward pass, angles in the model's `dtype`."""
    cos, sin = rotary(rows.places.positions, sequence_length=rows.places.lengths, dtype=dtype)
    return CacheParams(qkv_format="thd", rows=rows, cache=cache, cos=cos[:, None], sin=sin[:, None])

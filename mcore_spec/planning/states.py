"""What a store of hidden states takes on disk."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

StatesDtype = Literal["float64", "float32", "bfloat16", "float8_e4m3fn"]
# By the names of the command line.
StorageName = Literal["bf16", "fp8", "fp32", "fp64"]
STORAGE_DTYPES: Mapping[StorageName, StatesDtype] = MappingProxyType(
    {"bf16": "bfloat16", "fp8": "float8_e4m3fn", "fp32": "float32", "fp64": "float64"}
)
_STATE_BYTES: dict[StatesDtype, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}
# A float32 for each token and layer, where values share a scale.
_SCALE_BYTES = 4
# An int32 and a byte of the loss mask.
_TOKEN_BYTES = 5


class StatesSize(NamedTuple):
    """The size of a token.

    Attributes:
        hidden_size: h.
        num_aux: layers that are kept beside the last one.
        dtype: in which.
    """

    hidden_size: int
    num_aux: int
    dtype: StatesDtype

    @property
    def bytes_per_token(self) -> int:
        """Token id, loss mask, hidden states and their scales; headers of files are not in it."""
        scales = _SCALE_BYTES if self.dtype == "float8_e4m3fn" else 0
        return _TOKEN_BYTES + (self.num_aux + 1) * (self.hidden_size * _STATE_BYTES[self.dtype] + scales)

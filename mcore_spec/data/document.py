"""One tokenised conversation, and whatever holds many of them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class Document(NamedTuple):
    """Tokens that see each other and nothing else.

    Attributes:
        token_ids: int64 [n].
        mask: bool [n], the tokens that the base should produce.
    """

    token_ids: IntArray
    mask: BoolArray


class DocumentSource(Protocol):
    """Documents by number; `mcore_spec.data.store.TokenStore` is one."""

    @property
    def lengths(self) -> IntArray:
        """Tokens of each document, int64 [documents]."""
        ...

    def document(self, index: int) -> Document:
        """Document `index`."""
        ...

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
    """Documents by number."""

    @property
    def lengths(self) -> IntArray:
        """Tokens of each document, int64 [documents]."""
        ...

    def document(self, index: int) -> Document:
        """Document `index`."""
        ...


class ConversationSource(DocumentSource, Protocol):
    """All the documents of a run, which know what they are."""

    @property
    def fingerprint(self) -> str:
        """Of the contents, in hexadecimal."""
        ...

    @property
    def num_masked_tokens(self) -> int:
        """Tokens that the model must produce."""
        ...

    def __len__(self) -> int:
        """Number of documents."""
        ...

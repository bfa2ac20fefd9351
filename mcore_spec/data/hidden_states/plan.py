"""What an extraction is going to write, before anything is computed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mcore_spec.config import BaseArchitecture, BaseIdentity
from mcore_spec.data.document import Document, DocumentSource, IntArray
from mcore_spec.data.hidden_states.description import StoreDescription
from mcore_spec.data.store_files import TokenStore
from mcore_spec.errors import ConfigError
from mcore_spec.planning.states import StatesDtype, StatesSize


def cache_beside(store: Path) -> Path:
    """Where tokenised conversations are kept: the store holds nothing but its own files."""
    return store.with_name(f"{store.name}.data_cache")


class TrimmedDocuments:
    """Documents without what stands behind the last token that the model must produce.

    The loss of row t at step k counts tokens t + 2 + k at most, which is such a token; so no row behind the last one is
    read by a loss. Rows before it cannot be dropped, whatever the mask: the draft attends to all of them. Noise on
    features and mixed states are drawn by a document's length, and LongRoPE's table chosen by it: there a trimmed
    document is another one.
    """

    def __init__(self, source: DocumentSource) -> None:
        """Find the last such token of each document.

        Args:
            source: every document has one.
        """
        self._source = source
        ends = [int(np.flatnonzero(source.document(index).mask)[-1]) + 1 for index in range(len(source.lengths))]
        self.lengths: IntArray = np.array(ends, dtype=np.int64)

    def document(self, index: int) -> Document:
        """Document `index` up to its end."""
        token_ids, mask = self._source.document(index)
        end = self.lengths[index]
        return Document(token_ids[:end], mask[:end])


class ExtractionPlan(NamedTuple):
    """Whose hidden states of what.

    Attributes:
        architecture: of the base.
        identity: of its weights.
        conversations: all that were given.
        tokenizer_fingerprint: of what tokenised them.
        num_documents: the first so many of them.
        aux_layer_ids: 0-based, by output, ascending.
        dtype: of the states on disk.
        documents: the conversations, or without their tails.
    """

    architecture: BaseArchitecture
    identity: BaseIdentity
    conversations: TokenStore
    tokenizer_fingerprint: str
    num_documents: int
    aux_layer_ids: tuple[int, ...]
    dtype: StatesDtype
    documents: DocumentSource

    @property
    def num_tokens(self) -> int:
        """Of all documents."""
        return int(self.documents.lengths[: self.num_documents].sum())

    @property
    def size(self) -> StatesSize:
        """What a token takes."""
        return StatesSize(self.architecture.hidden_size, len(self.aux_layer_ids), self.dtype)

    @property
    def num_bytes(self) -> int:
        """That the store will take, without the headers of its files."""
        return self.num_tokens * self.size.bytes_per_token

    def describe(self, backend: str) -> StoreDescription:
        """What the store will be; the last states are normed."""
        conversations = self.conversations.fingerprint
        if self.num_documents < len(self.conversations):
            conversations = hashlib.sha256(f"{conversations}:{self.num_documents}".encode()).hexdigest()
        return StoreDescription.parse(
            {
                "source": self.identity.source,
                "base_fingerprint": self.identity.fingerprint,
                "backend": backend,
                "tokenizer_fingerprint": self.tokenizer_fingerprint,
                "conversation_fingerprint": conversations,
                "num_documents": self.num_documents,
                "seq_length": self.conversations.seq_length,
                "vocab_size": self.architecture.vocab_size,
                "hidden_size": self.architecture.hidden_size,
                "aux_layer_ids": self.aux_layer_ids,
                "last_is_normed": True,
                "dtype": self.dtype,
                "drops_tail": isinstance(self.documents, TrimmedDocuments),
            }
        )

    def describe_size(self) -> str:
        """``6 conversations, 100 tokens, aux layers 1, 2: 640 bytes a token, 0.00 GiB``."""
        layers = ", ".join(map(str, self.aux_layer_ids)) or "none"
        return (
            f"{self.num_documents:,} conversations, {self.num_tokens:,} tokens, aux layers {layers} (0-based, by "
            f"output), {self.dtype}: {self.size.bytes_per_token:,} bytes a token, {self.num_bytes:,} bytes in all "
            f"({self.num_bytes / 2**30:,.2f} GiB)"
        )

    def check_bytes(self, max_bytes: int | None) -> None:
        """Refuse a store that is larger than it may be.

        Raises:
            ConfigError: with both numbers, and how many conversations fit.
        """
        if max_bytes is None or self.num_bytes <= max_bytes:
            return
        sizes = np.cumsum(self.documents.lengths[: self.num_documents]) * self.size.bytes_per_token
        fitting = int(np.searchsorted(sizes, max_bytes, side="right"))
        remedy = f"--num-samples {fitting} fits" if fitting else "not one conversation fits; lower --seq-length"
        raise ConfigError(
            f"the store would take {self.num_bytes:,} bytes, --max-bytes is {max_bytes:,}: {remedy}; --storage-dtype "
            "fp8 takes half of what bf16 does"
        )

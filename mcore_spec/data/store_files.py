"""The files of a token store: reading and writing them.

    tokens.bin      int32 [tokens], document behind document
    mask.bin        uint8 [tokens], 1 where the model must produce the token
    offsets.bin     int64 [documents + 1], where each document starts; the last one: the end
    manifest.json   what the store was made of, and the counts

Numbers are little-endian.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from mcore_spec.data.document import Document, IntArray
from mcore_spec.errors import ConfigError

# Raised whenever the same conversations would give other tokens or masks, or other files.
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
_TOKENS, _MASK, _OFFSETS = "tokens.bin", "mask.bin", "offsets.bin"
_TOKEN_DTYPE, _OFFSET_DTYPE = np.dtype("<i4"), np.dtype("<i8")
# Tokens that are counted at once; bounds the memory.
_TOKENS_AT_ONCE = 1 << 24


@dataclass(frozen=True, kw_only=True)
class StoreCounts:
    """What went in, and what did not.

    Attributes:
        documents: conversations in the store.
        tokens: of them.
        masked_tokens: those that the model must produce.
        truncated: documents that were cut to the sequence length.
        empty: conversations left out because no token of theirs, or of what the cut left, is the model's to produce.
        skipped: entries left out because they cannot be read or rendered.
        skip_reasons: of the first few, with their places.
    """

    documents: int = 0
    tokens: int = 0
    masked_tokens: int = 0
    truncated: int = 0
    empty: int = 0
    skipped: int = 0
    skip_reasons: tuple[str, ...] = ()

    def describe(self, *, cut_by: str) -> str:
        """One line for a user, who gave the sequence length by the option `cut_by`."""
        return (
            f"{self.documents:,} conversations, {self.tokens:,} tokens, {self.masked_tokens:,} of them the model's; "
            f"{self.truncated:,} truncated at {cut_by}, {self.empty:,} without a token of the model's left out, "
            f"{self.skipped:,} unreadable left out"
        )


class TokenStore:
    """A finished store, memory-mapped; a `ConversationSource`.

    Attributes:
        fingerprint: of its contents, in hexadecimal.
        seq_length: tokens of a document at most.
        counts: what went in.
        num_masked_tokens: those that the model must produce.
        lengths: tokens of each document, int64 [documents].
    """

    def __init__(self, directory: Path) -> None:
        """Open a directory that `build_token_store` made.

        Raises:
            ConfigError: it is not there, or damaged.
        """
        if not directory.is_dir():
            raise ConfigError(
                f"data_cache_path: {directory} is not there on this rank; give a directory on a file system that all "
                "ranks share"
            )
        try:
            manifest = json.loads((directory / MANIFEST).read_text())
            if manifest["format"] != FORMAT_VERSION:
                raise ValueError(f"format {manifest['format']}, not {FORMAT_VERSION}")
            self.fingerprint: str = manifest["fingerprint"]
            self.seq_length: int = manifest["seq_length"]
            counts = manifest["counts"]
            self.counts = StoreCounts(**{**counts, "skip_reasons": tuple(counts["skip_reasons"])})
            self._offsets = np.fromfile(directory / _OFFSETS, dtype=_OFFSET_DTYPE)
            self._tokens = np.memmap(directory / _TOKENS, dtype=_TOKEN_DTYPE, mode="r")
            self._mask = np.memmap(directory / _MASK, dtype=np.uint8, mode="r")
            self._check_sizes()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"data_cache_path: the token store {directory} is damaged ({error}); delete that directory to have it "
                "made again"
            ) from error
        self.lengths: IntArray = np.diff(self._offsets)
        self.num_masked_tokens = self.counts.masked_tokens

    def _check_sizes(self) -> None:
        num_tokens = self.counts.tokens
        found = {_OFFSETS: len(self._offsets) - 1, _TOKENS: len(self._tokens), _MASK: len(self._mask)}
        expected = {_OFFSETS: self.counts.documents, _TOKENS: num_tokens, _MASK: num_tokens}
        for name, number in found.items():
            if number != expected[name]:
                raise ValueError(f"{name} holds {number} entries of {expected[name]}")
        if self._offsets[-1] != num_tokens:
            raise ValueError(f"{_OFFSETS} ends at {self._offsets[-1]} of {num_tokens}")

    def __len__(self) -> int:
        """Number of documents."""
        return self.counts.documents

    def document(self, index: int) -> Document:
        """Document `index`, copied out of the files.

        Raises:
            IndexError: there is none of that number.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        start, stop = self._offsets[index], self._offsets[index + 1]
        return Document(self._tokens[start:stop].astype(np.int64), self._mask[start:stop].astype(np.bool_))

    def count_masked_tokens(self, vocab_size: int) -> IntArray:
        """How often the model is to produce each entry of its vocabulary, int64 [vocab_size]."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, len(self._tokens), _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            wanted = self._tokens[part][self._mask[part].astype(np.bool_)]
            counts += np.bincount(wanted, minlength=vocab_size)
        return counts


class StoreWriter:
    """Writes a store: its arrays inside of a ``with`` block, then the manifest."""

    def __init__(self, directory: Path) -> None:
        """`directory` exists and is empty."""
        self.directory = directory
        self.num_masked = 0
        self.ends = [0]

    @property
    def num_documents(self) -> int:
        """Documents so far."""
        return len(self.ends) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return self.ends[-1]

    def __enter__(self) -> Self:
        """Open the files."""
        with ExitStack() as stack:
            self._tokens = stack.enter_context((self.directory / _TOKENS).open("wb"))
            self._mask = stack.enter_context((self.directory / _MASK).open("wb"))
            self._stack = stack.pop_all()
        return self

    def append(self, token_ids: Sequence[int], loss_mask: Sequence[bool]) -> None:
        """Write one document."""
        mask = np.array(loss_mask, dtype=np.uint8)
        self._tokens.write(np.array(token_ids, dtype=_TOKEN_DTYPE).tobytes())
        self._mask.write(mask.tobytes())
        self.num_masked += int(mask.sum())
        self.ends.append(self.num_tokens + len(mask))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Bring the arrays onto the disk; after an error only close the files."""
        with self._stack:
            if error is not None:
                return
            with (self.directory / _OFFSETS).open("wb") as offsets:
                offsets.write(np.array(self.ends, dtype=_OFFSET_DTYPE).tobytes())
                # A name must not outlive a power cut that the contents do not.
                for file in (self._tokens, self._mask, offsets):
                    file.flush()
                    os.fsync(file.fileno())

    def finish(self, *, fingerprint: str, seq_length: int, sources: Sequence[str], counts: StoreCounts) -> None:
        """Write the manifest, after the block."""
        manifest = {"format": FORMAT_VERSION, "fingerprint": fingerprint, "seq_length": seq_length}
        manifest |= {"sources": list(sources), "counts": asdict(counts)}
        (self.directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

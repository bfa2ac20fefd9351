"""Writing a store of hidden states, with many writers, and with as many attempts as it takes."""

from __future__ import annotations

import hashlib
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors.torch import save
from torch import Tensor

from mcore_spec.data.durable_files import PARTIAL, publish_file, sync
from mcore_spec.data.hidden_states.description import StoreDescription
from mcore_spec.data.hidden_states.files import (
    DESCRIPTION,
    JOURNALS,
    MANIFEST,
    SHARDS,
    Manifest,
    Shard,
    journal_name,
    missing_documents,
    parse_journal,
    present_shards,
    read_description,
    read_journal,
    read_manifest,
    shard_name,
    shard_number,
    shard_pattern,
)
from mcore_spec.data.hidden_states.states import MASK, TOKENS, DocumentStates, encode
from mcore_spec.data.json_lines import GrowingFile
from mcore_spec.errors import CheckpointError

# A shard is held three times while it is written.
DEFAULT_SHARD_BYTES = 512 << 20


class StatesWriter:
    """Writes the share of one rank. What other ranks and earlier attempts wrote is in `done` and not asked for again.

    A shard is buffered on the host and written in one piece, so that of a writer that was killed the documents of its
    last, unwritten shard are lost and extracted again. `close`, or the end of a ``with`` block without an error, writes
    what is buffered; behind it, when every writer is through, one of them calls `finish`.

    Attributes:
        done: numbers of the documents that were there when the writer was made.
    """

    def __init__(
        self,
        directory: Path,
        description: StoreDescription,
        *,
        writer: int = 0,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        """Go on with what is in `directory`, or begin.

        Args:
            directory: of the store; made if need be.
            description: of the whole store.
            writer: number of this writer, another one for each rank.
            max_shard_bytes: of a shard; a longer document has one of its own.

        Raises:
            CheckpointError: the directory holds another store, or a damaged one.
            ConfigError: another process writes with the same number.
            OSError: the directory cannot be written.
        """
        self.directory, self.description, self.writer = directory, description, writer
        self.max_shard_bytes = max_shard_bytes
        begin_store(directory, description)
        self._buffer: dict[int, dict[str, Tensor]] = {}
        self._buffered_bytes = 0
        self._journal = GrowingFile(directory / journal_name(writer), field="the journal of the store")
        try:
            manifest = read_manifest(directory)
            known = [*(() if manifest is None else manifest.shards), *read_journal(self._journal)]
            own = {path for shard in known if fnmatch(path := shard.name, shard_pattern(writer))}
            self._remove_strays(own)
            self.done = frozenset(chain.from_iterable(shard.documents for shard in written_shards(directory)))
        except (CheckpointError, OSError):
            self._journal.close()
            raise
        # Also behind those whose files are gone: a name means one thing.
        self._next_number = max(map(shard_number, own), default=-1) + 1

    def _remove_strays(self, known: set[str]) -> None:
        """What a killed writer of this number had not put into its journal."""
        pattern = shard_pattern(self.writer)
        for path in (*self.directory.glob(pattern), *self.directory.glob(PARTIAL + pattern)):
            if path.name not in known:
                path.unlink()

    def append(self, index: int, states: DocumentStates) -> None:
        """Take a document; it is on the disk when its shard is full, or at the end.

        Args:
            index: its number, from 0.
            states: on any device.

        Raises:
            ConfigError: states that do not fit the description.
            OSError: a shard cannot be written; what was written before stands.
        """
        assert 0 <= index < self.description.num_documents, f"document {index} of {self.description.num_documents}"
        assert index not in self.done, f"document {index} is there already"
        assert index not in self._buffer, f"document {index} is given twice"
        encoded = encode(states, self.description)
        num_bytes = sum(tensor.nbytes for tensor in encoded.values())
        if self._buffer and self._buffered_bytes + num_bytes > self.max_shard_bytes:
            self.flush()
        self._buffer[index] = encoded
        self._buffered_bytes += num_bytes

    def flush(self) -> None:
        """Write what is buffered as one shard.

        Raises:
            OSError: it cannot be written; what was written before stands.
        """
        if not self._buffer:
            return
        name = shard_name(self.writer, self._next_number)
        path, partial = self.directory / name, self.directory / (PARTIAL + name)
        documents = list(self._buffer.values())
        try:
            contents = save({key: torch.cat([each[key] for each in documents]) for key in documents[0]})
            partial.write_bytes(contents)
            sync(partial)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
        sync(self.directory)
        shard = Shard(
            name=name,
            num_bytes=len(contents),
            sha256=hashlib.sha256(contents).hexdigest(),
            documents=tuple(self._buffer),
            lengths=tuple(len(each[TOKENS]) for each in documents),
            num_masked_tokens=sum(int(each[MASK].sum()) for each in documents),
        )
        self._journal.append(shard.model_dump(mode="json"))
        self._next_number += 1
        self._buffer, self._buffered_bytes = {}, 0

    def release(self) -> None:
        """Let go of the journal; what is buffered is lost."""
        self._journal.close()

    def close(self) -> None:
        """Write what is buffered, and let go of the journal."""
        try:
            self.flush()
        finally:
            self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """After an error nothing more is written."""
        if kind is None:
            self.close()
        else:
            self.release()


def finish_store(directory: Path) -> None:
    """Publish the manifest of what all writers wrote; one rank calls it, when the writers are closed.

    Raises:
        CheckpointError: documents are missing, or files damaged.
        OSError: the manifest cannot be written; the store can be finished again.
    """
    description = read_description(directory)
    if description is None:
        manifest = read_manifest(directory)
        assert manifest is not None, "a store that was begun"
        description = manifest.description
    shards = written_shards(directory)
    missing = missing_documents(shards, description.num_documents)
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise CheckpointError(
            f"{directory}: {len(missing):,} of {description.num_documents:,} documents are missing ({shown}); extract "
            "with the same command, which adds them"
        )
    manifest = Manifest(description=description, shards=tuple(shards))
    publish_file(directory / MANIFEST, lambda partial: partial.write_text(manifest.model_dump_json() + "\n"))
    known = {shard.name for shard in shards}
    for pattern in (JOURNALS, DESCRIPTION, PARTIAL + "*", SHARDS):
        for path in directory.glob(pattern):
            if path.name not in known:
                path.unlink()


def written_shards(directory: Path) -> list[Shard]:
    """The whole shards of all writers, by name.

    Raises:
        CheckpointError: a file or a journal is damaged.
    """
    manifest = read_manifest(directory)
    shards = [] if manifest is None else list(manifest.shards)
    for path in sorted(directory.glob(JOURNALS)):
        shards += parse_journal(path)
    return present_shards(directory, shards)


def begin_store(directory: Path, description: StoreDescription) -> None:
    """Say what the store will be, or see that it is the one that was begun.

    Raises:
        CheckpointError: the directory holds another store, or a damaged one.
        OSError: it cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(directory)
    begun = read_description(directory) if manifest is None else manifest.description
    if begun is None:
        # Of writers that begin together each writes the same.
        text = description.model_dump_json(indent=2) + "\n"
        publish_file(directory / DESCRIPTION, lambda partial: partial.write_text(text))
        begun = read_description(directory)
        assert begun is not None, "written above"
    begun.check_same(description, where=str(directory))

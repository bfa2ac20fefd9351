"""Reading a finished store of hidden states."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mcore_spec.data.document import Document, IntArray
from mcore_spec.data.hidden_states.description import StoreDescription
from mcore_spec.data.hidden_states.files import (
    DESCRIPTION,
    MANIFEST,
    check_contents,
    check_size,
    missing_documents,
    read_manifest,
)
from mcore_spec.data.hidden_states.states import AUX, LAST, MASK, SCALE, TOKENS, DocumentStates, decode
from mcore_spec.errors import CheckpointError

# Shards that stay mapped; a system maps some ten thousand files at most.
NUM_OPEN = 256


class Place(NamedTuple):
    """Where a document stands: rows ``start..stop`` of a shard."""

    shard: int
    start: int
    stop: int


class StatesStore:
    """A finished store, memory-mapped; a `ConversationSource`. May be read from several threads.

    Attributes:
        description: of the contents.
        fingerprint: of the contents and of their order on disk, in hexadecimal.
        lengths: tokens of each document, int64 [documents].
        num_masked_tokens: tokens that the model must produce.
        num_bytes: of all shards.
    """

    def __init__(self, directory: Path, *, verify: bool = False) -> None:
        """Open a directory that was extracted to.

        Args:
            directory: with a manifest.
            verify: read every file and compare its checksum; sizes are compared in any case.

        Raises:
            CheckpointError: no store, one that is not finished, missing or damaged files.
        """
        self.directory = directory
        manifest = read_manifest(directory)
        if manifest is None:
            state = "was not finished" if (directory / DESCRIPTION).exists() else f"has no {MANIFEST}"
            raise CheckpointError(f"the store of hidden states {directory} {state}; extract it (mcore-spec extract)")
        self.description: StoreDescription = manifest.description
        self._shards = manifest.shards
        num_documents = self.description.num_documents
        if (
            missing_documents(self._shards, num_documents)
            or sum(len(s.documents) for s in self._shards) != num_documents
        ):
            raise CheckpointError(f"{directory / MANIFEST} does not list each of {num_documents} documents once")
        for shard in self._shards:
            check_size(directory, shard)
            if verify:
                check_contents(directory, shard)
        self._places: dict[int, Place] = {}
        for number, shard in enumerate(self._shards):
            start = 0
            for document, length in zip(shard.documents, shard.lengths, strict=True):
                self._places[document] = Place(number, start, start + length)
                start += length
        spans = [self._places[index].stop - self._places[index].start for index in range(num_documents)]
        self.lengths: IntArray = np.array(spans, dtype=np.int64)
        self.num_masked_tokens = sum(shard.num_masked_tokens for shard in self._shards)
        self.num_bytes = sum(shard.num_bytes for shard in self._shards)
        self.fingerprint = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        """Number of documents."""
        return self.description.num_documents

    def document(self, index: int) -> Document:
        """Token ids and mask of document `index`; its states are not read.

        Raises:
            IndexError: there is none of that number.
            CheckpointError: a damaged shard.
        """
        tensors = self._read(index, (TOKENS, MASK))
        return Document(tensors[TOKENS].numpy().astype(np.int64), tensors[MASK].numpy())

    def states(self, index: int, *, aux_layer_ids: Sequence[int] | None = None) -> DocumentStates:
        """Document `index` with its states: in the store's dtype, or in float32 where that has eight bits.

        Args:
            index: of the document.
            aux_layer_ids: the wanted ones of `description.aux_layer_ids`; ``None``: all.

        Raises:
            IndexError: there is none of that number.
            CheckpointError: a damaged shard.
        """
        scales = (AUX + SCALE, LAST + SCALE) if self.description.dtype == "float8_e4m3fn" else ()
        tensors = self._read(index, (TOKENS, MASK, AUX, LAST, *scales))
        there = self.description.aux_layer_ids
        if aux_layer_ids is not None and tuple(aux_layer_ids) != there:
            places = [there.index(layer) for layer in aux_layer_ids]
            tensors |= {name: tensors[name][:, places] for name in (AUX, AUX + SCALE) if name in tensors}
        return decode(tensors)

    def _read(self, index: int, names: tuple[str, ...]) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        place = self._places[index]
        shard = self._shards[place.shard]
        try:
            file = self._file(place.shard)
            return {name: file.get_slice(name)[place.start : place.stop] for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.directory / shard.name} is damaged ({error}); delete that file and extract with the same "
                "command, which adds what is missing"
            ) from error

    def _file(self, number: int) -> Any:
        """A mapped shard; the one that was not read for the longest time is let go."""
        with self._lock:
            if number not in self._open:
                file = safe_open(self.directory / self._shards[number].name, framework="pt")
                self._check_shapes(number, file)
                self._open[number] = file
            self._open.move_to_end(number)
            if len(self._open) > NUM_OPEN:
                self._open.popitem(last=False)
            return self._open[number]

    def _check_shapes(self, number: int, file: Any) -> None:
        """What the header says is what the manifest says."""
        shard, description = self._shards[number], self.description
        rows = sum(shard.lengths)
        expected = {
            TOKENS: [rows],
            MASK: [rows],
            AUX: [rows, len(description.aux_layer_ids), description.hidden_size],
            LAST: [rows, description.hidden_size],
        }
        for name, shape in expected.items():
            found = file.get_slice(name).get_shape()
            if found != shape:
                raise CheckpointError(f"{self.directory / shard.name}: {name} has shape {found}, the manifest {shape}")

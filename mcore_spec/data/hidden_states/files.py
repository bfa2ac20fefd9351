"""The files of a store of hidden states.

    manifest.json                          a finished store: description and shards
    shard-WRITER-NUMBER.safetensors        documents behind each other (names of tensors: `states`)
    description.json                       while the store is written: what it will be
    journal-WRITER.jsonl                   while it is written: the shards of one writer, one a line

A shard is written under another name, brought onto the disk, renamed, and only then stands in a journal. So a file
that no journal knows holds nothing that is missed, and what a journal knows is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import Field

from mcore_spec.config import StrictConfig
from mcore_spec.data.hidden_states.description import StoreDescription
from mcore_spec.data.json_lines import GrowingFile
from mcore_spec.errors import CheckpointError, ConfigError

MANIFEST, DESCRIPTION = "manifest.json", "description.json"
SHARDS, JOURNALS = "shard-*.safetensors", "journal-*.jsonl"
FORMAT_VERSION: int = StoreDescription.model_fields["format_version"].default


class Shard(StrictConfig):
    """One file of a store."""

    name: str = Field(description="Of the file.")
    num_bytes: int = Field(ge=1, description="Its size.")
    sha256: str = Field(description="Of its contents.")
    documents: tuple[int, ...] = Field(min_length=1, description="Numbers of its documents, in their order.")
    lengths: tuple[int, ...] = Field(min_length=1, description="Tokens of each.")
    num_masked_tokens: int = Field(ge=0, description="Tokens that the model must produce.")


class Manifest(StrictConfig):
    """A finished store."""

    description: StoreDescription
    shards: tuple[Shard, ...]


def shard_name(writer: int, number: int) -> str:
    """File name of a writer's shard."""
    return f"shard-{writer:05d}-{number:07d}.safetensors"


def shard_number(name: str) -> int:
    """The number in a shard's file name."""
    return int(Path(name).stem.split("-")[2])


def shard_pattern(writer: int) -> str:
    """What a writer's shards are called."""
    return f"shard-{writer:05d}-*.safetensors"


def journal_name(writer: int) -> str:
    """File name of a writer's journal."""
    return f"journal-{writer:05d}.jsonl"


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a finished store; ``None``: it is not finished, or there is none.

    Raises:
        CheckpointError: damaged, or of another format.
    """
    values = _read_json(directory / MANIFEST)
    if values is None:
        return None
    given = values.get("description")
    _check_version(given if isinstance(given, dict) else {}, directory / MANIFEST)
    try:
        return Manifest.parse(values, where=str(directory / MANIFEST))
    except ConfigError as error:
        raise CheckpointError(f"{error}; the store is damaged, extract it again") from None


def read_description(directory: Path) -> StoreDescription | None:
    """What a store that is being written will be; ``None``: nothing was begun.

    Raises:
        CheckpointError: damaged, or of another format.
    """
    values = _read_json(directory / DESCRIPTION)
    if values is None:
        return None
    _check_version(values, directory / DESCRIPTION)
    try:
        return StoreDescription.parse(values, where=str(directory / DESCRIPTION))
    except ConfigError as error:
        raise CheckpointError(f"{error}; delete {directory} to begin anew") from None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); the store is damaged, extract it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not an object; extract the store again")
    return values


def _check_version(values: Mapping[str, Any], path: Path) -> None:
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version!r}, this package reads {FORMAT_VERSION}; extract the store again, or "
            "read it with the package that wrote it"
        )


def read_journal(journal: GrowingFile) -> list[Shard]:
    """The shards of one writer; a line that was cut off is taken away.

    Raises:
        CheckpointError: a line that is damaged.
    """
    try:
        return [Shard.parse(line.value, where=line.where) for line in journal.read()]
    except ConfigError as error:
        raise CheckpointError(f"{error}; delete the line, and its documents are extracted again") from None


def parse_journal(path: Path) -> list[Shard]:
    """The same of another writer's journal, which is only read: a last line without its break is not there yet.

    Raises:
        CheckpointError: a line that is damaged.
    """
    shards = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            where = f"{path}:{number}"
            try:
                shards.append(Shard.parse(json.loads(line), where=where))
            except (ValueError, ConfigError) as error:
                raise CheckpointError(
                    f"{where} is damaged ({error}); delete the line, and its documents are extracted again"
                ) from None
    return shards


def present_shards(directory: Path, shards: Iterable[Shard]) -> list[Shard]:
    """Those whose file is there, each once, by name. The documents of the others have to be extracted again.

    Raises:
        CheckpointError: a file of another size, or a document that stands in two of them.
    """
    found: dict[str, Shard] = {}
    for shard in shards:
        if (directory / shard.name).exists():
            check_size(directory, shard)
            found[shard.name] = shard
    owners: dict[int, str] = {}
    for shard in found.values():
        for document in shard.documents:
            if document in owners:
                raise CheckpointError(
                    f"{directory}: document {document} stands in {owners[document]} and in {shard.name}; delete one of "
                    "the two files, and what is missing then is extracted again"
                )
            owners[document] = shard.name
    return [found[name] for name in sorted(found)]


def check_size(directory: Path, shard: Shard) -> None:
    """Refuse a file that was cut off.

    Raises:
        CheckpointError: it is missing, or has another size than when it was written.
    """
    path = directory / shard.name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; extract with the same command, which adds what is not there"
        ) from None
    if size != shard.num_bytes:
        raise CheckpointError(
            f"{path} has {size:,} bytes of {shard.num_bytes:,}; delete that file and extract with the same command, "
            "which adds what is missing"
        )


def check_contents(directory: Path, shard: Shard) -> None:
    """Refuse a file whose contents changed.

    Raises:
        CheckpointError: another checksum than when it was written.
    """
    found = sha256_of(directory / shard.name)
    if found != shard.sha256:
        raise CheckpointError(
            f"{directory / shard.name} is damaged: SHA-256 {found}, written was {shard.sha256}; delete that file and "
            "extract with the same command, which adds what is missing"
        )


def sha256_of(path: Path) -> str:
    """Of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def missing_documents(shards: Iterable[Shard], num_documents: int) -> list[int]:
    """Numbers that no shard has, ascending."""
    there = set(chain.from_iterable(shard.documents for shard in shards))
    return [number for number in range(num_documents) if number not in there]

"""Where conversations come from: files and Hugging Face datasets, as a stream of plain values.

What a value must look like is `conversations`' business; here a line is only decoded.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, Protocol

from mcore_spec.errors import ConfigError

FORMATS = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
TEXT_FORMATS = (".txt", ".txt.gz")
_DATASET_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[^/]+)?")
_BYTES_AT_ONCE = 1 << 20
# A compressed file that is cut off or damaged shows as any of these.
_READ_ERRORS = (OSError, EOFError, zlib.error)


class Record(NamedTuple):
    """One entry of a source.

    Attributes:
        line: its number, from 1: the line of a ``.jsonl`` file, otherwise the entry.
        value: what stands there; ``None`` where it cannot be decoded.
        problem: why it cannot; ``None`` where it can.
    """

    line: int
    value: Any
    problem: str | None = None


class Source(Protocol):
    """A place that holds conversations."""

    @property
    def name(self) -> str:
        """As the user gave it."""
        ...

    def where(self, line: int) -> str:
        """How a message names entry `line`."""
        ...

    def records(self) -> Iterator[Record]:
        """Every entry, in order; blank lines are no entries.

        Raises:
            ConfigError: the source as a whole cannot be read.
        """
        ...

    def digest(self) -> str:
        """SHA-256 over the contents, in hexadecimal; the name does not enter."""
        ...


def open_source(name: str | Path, *, field: str = "data_path", formats: Sequence[str] = FORMATS) -> Source:
    """The source that `name` stands for.

    Args:
        name: a file in one of `formats`, or a dataset ``organisation/name`` with an optional ``:split`` (default:
            train).
        field: what messages call it.
        formats: ends of file names that are read, of `FORMATS` and `TEXT_FORMATS`.

    Raises:
        ConfigError: neither; or a file in another format.
    """
    path, text = Path(name), str(name)
    if path.is_dir():
        raise ConfigError(f"{field} = {text} is a directory; name the files in it")
    lowered = path.name.lower()
    file_format = next((each for each in formats if lowered.endswith(each)), None)
    if not path.exists():
        if file_format is None and _DATASET_NAME.fullmatch(text):
            return HubDataset(text, field=field)
        raise ConfigError(
            f"{field} = {text}: no such file; correct the path, or name a Hugging Face dataset as organisation/name"
        )
    if file_format is None:
        raise ConfigError(f"{field} = {text} is in none of the formats {', '.join(formats)}; convert it to one")
    return _READERS[file_format.removesuffix(".gz")](path, field=field)


class _File:
    """What files have in common."""

    def __init__(self, path: Path, *, field: str = "data_path") -> None:
        self.path, self.field = path, field

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def where(self, line: int) -> str:
        """``file, entry n``."""
        return f"{self.path}, entry {line}"

    def digest(self) -> str:
        """Over the bytes on disk, and the format, which decides how they are read."""
        return _digest_files([self.path], salt=self.path.name.lower().removesuffix(".gz").rpartition(".")[2])

    def _open(self) -> BinaryIO:
        if self.path.suffix.lower() == ".gz":
            return gzip.open(self.path, "rb")  # type: ignore[return-value]  # a BinaryIO in all but its declaration
        return self.path.open("rb")

    def _unreadable(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"{self.field} = {self.path} cannot be read ({_first_line(error)}); give a file that is whole"
        )


class _Lines(_File):
    """Something in each line that is not empty."""

    def where(self, line: int) -> str:
        """``file:line``."""
        return f"{self.path}:{line}"

    def records(self) -> Iterator[Record]:
        """See `Source`."""
        try:
            with self._open() as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield self._record(number, line)
        except _READ_ERRORS as error:
            raise self._unreadable(error) from error

    def _record(self, number: int, line: bytes) -> Record:
        try:
            # Some editors begin a file with a byte order mark, which neither JSON nor a question starts with.
            return self._decode(number, line.rstrip(b"\r\n").decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            return Record(number, None, f"not UTF-8 ({error.reason} at byte {error.start + 1})")

    def _decode(self, number: int, text: str) -> Record:
        raise NotImplementedError


class JsonLines(_Lines):
    """``.jsonl``: one JSON value a line."""

    def _decode(self, number: int, text: str) -> Record:
        try:
            return Record(number, json.loads(text))
        except json.JSONDecodeError as error:
            return Record(number, None, f"not JSON ({error.msg} at column {error.colno})")


class TextLines(_Lines):
    """``.txt``: one text a line."""

    def _decode(self, number: int, text: str) -> Record:
        return Record(number, text.strip())


class JsonList(_File):
    """``.json``: one list of values, read whole."""

    def records(self) -> Iterator[Record]:
        """See `Source`."""
        try:
            with self._open() as file:
                text = file.read().decode("utf-8-sig")
            values = json.loads(text) if text.strip() else []
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{self.path}:{error.lineno}: not JSON ({error.msg}); correct the file, or name it .jsonl if it has "
                "one object a line"
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.path} is not UTF-8 ({error.reason}); save it as UTF-8") from error
        except _READ_ERRORS as error:
            raise self._unreadable(error) from error
        if not isinstance(values, list):
            raise ConfigError(f"{self.path} holds {_kind(values)}; a .json file must hold a list of conversations")
        yield from (Record(number, value) for number, value in enumerate(values, start=1))


class ParquetFile(_File):
    """``.parquet``: one row a conversation."""

    def records(self) -> Iterator[Record]:
        """See `Source`."""
        parquet = require("pyarrow.parquet", package="pyarrow", wanted_by=f"{self.field} = {self.name}")
        number = 0
        try:
            with self.path.open("rb") as file:
                for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
                    for value in batch.to_pylist():
                        number += 1
                        yield Record(number, value)
        except (ValueError, *_READ_ERRORS) as error:  # pyarrow's own errors are ValueErrors and OSErrors
            raise self._unreadable(error) from error


class HubDataset:
    """A dataset by its name on the hub; ``organisation/name:split``."""

    def __init__(self, name: str, *, field: str = "data_path") -> None:
        """Nothing is loaded yet."""
        self.name, self.field = name, field
        self._repository, _, split = name.partition(":")
        self._split = split or "train"

    def where(self, line: int) -> str:
        """``dataset, entry n``."""
        return f"{self.name}, entry {line}"

    def records(self) -> Iterator[Record]:
        """See `Source`."""
        yield from (Record(number, value) for number, value in enumerate(self._dataset, start=1))

    def digest(self) -> str:
        """Over the dataset's files in its local cache; where it is held in memory alone, over its entries."""
        files = sorted(Path(entry["filename"]) for entry in self._dataset.cache_files)
        if files:
            return _digest_files(files, salt=f"dataset:{self._split}")
        digest = hashlib.sha256(b"dataset entries")
        for value in self._dataset:
            digest.update(json.dumps(value, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    @cached_property
    def _dataset(self) -> Any:
        datasets = require("datasets", package="datasets", wanted_by=f"{self.field} = {self.name}")
        try:
            return datasets.load_dataset(self._repository, split=self._split)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.field} = {self.name} is no file, and the dataset {self._repository} (split {self._split}) "
                f"cannot be loaded ({_first_line(error)}); correct the path, check the network, or give the split as "
                f"{self._repository}:SPLIT"
            ) from error


_READERS: dict[str, Callable[..., Source]] = {
    ".jsonl": JsonLines,
    ".json": JsonList,
    ".parquet": ParquetFile,
    ".txt": TextLines,
}


def require(module: str, *, package: str, wanted_by: str, instead: str = "convert the data to .jsonl") -> ModuleType:
    """An optional package.

    Args:
        module: to import.
        package: what pip installs.
        wanted_by: what needs it, for the error.
        instead: what can be done without it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{wanted_by} needs the package {package}: pip install {package}, or {instead}") from error


def _digest_files(paths: Sequence[Path], *, salt: str) -> str:
    digest = hashlib.sha256(salt.encode())
    for path in paths:
        try:
            with path.open("rb") as file:
                while block := file.read(_BYTES_AT_ONCE):
                    digest.update(block)
        except OSError as error:
            raise ConfigError(f"data_path = {path} cannot be read ({_first_line(error)})") from error
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _kind(value: object) -> str:
    """JSON's word for a value."""
    return {dict: "an object", list: "a list", str: "a string", bool: "true or false"}.get(type(value), repr(value))

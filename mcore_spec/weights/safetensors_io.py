"""Reading slices of safetensors files, and writing files one tensor at a time.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then
the data, whose offsets count from the end of the header.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mcore_spec.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# safetensors' names of the dtypes that this package reads and writes.
_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SAMPLE_BYTES = 256
# A draft's tensors, where they lie among those of its base.
BESIDE_BASE_NAME = "draft.safetensors"


class TensorInfo(NamedTuple):
    """One stored tensor: where, of what dtype and shape, at which bytes of the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class WeightDirectory:
    """The tensors of a Hugging Face directory: a single file, or several with an index."""

    def __init__(
        self, directory: Path, *, below: str = "", without: tuple[str, ...] = (), beside: str | None = None
    ) -> None:
        """Read and check every header; no data is read.

        Args:
            directory: holds ``model.safetensors`` or ``model.safetensors.index.json``.
            below: take the tensors whose names begin so alone, under the rest of their names.
            without: beginnings of names that are left out.
            beside: a further file that is read where it is there and no index lists the files.

        Raises:
            CheckpointError: a missing, truncated or damaged file.
        """
        self.directory = directory
        self.tensors: dict[str, TensorInfo] = {}
        self._open: dict[Path, Any] = {}
        self._beside = beside
        for path in self._files():
            self.tensors.update(read_header(path))
        self._below = below
        names = [name for name in self.tensors if name.startswith(below) and not name.startswith(without)]
        self.tensors = {name.removeprefix(below): self.tensors[name] for name in names}

    def _files(self) -> list[Path]:
        index = self.directory / INDEX_NAME
        if not index.exists():
            single = self.directory / SINGLE_NAME
            if not single.exists():
                raise CheckpointError(
                    f"{self.directory} has neither {SINGLE_NAME} nor {INDEX_NAME}; "
                    "save the model with save_pretrained (safetensors)"
                )
            further = [] if self._beside is None else [self.directory / self._beside]
            return [single, *(path for path in further if path.exists())]
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [name for name in names if not (self.directory / name).exists()]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index ({error}); download it again") from error
        if missing:
            raise CheckpointError(
                f"{index} names files that are not there: {', '.join(missing)}; complete the download"
            )
        return [self.directory / name for name in names]

    def close(self) -> None:
        """Unmap the files."""
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, name: str, *, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows (or columns) [start, stop) of one tensor; only these are read.

        Args:
            name: stored name.
            dim: 0 for rows, 1 for columns.
            start: first.
            stop: behind the last; ``None`` for the end.

        Raises:
            CheckpointError: no such tensor, or a file that safetensors refuses.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.directory}: tensor {name} is missing")
        info = self.tensors[name]
        if info.path not in self._open:
            try:
                self._open[info.path] = safe_open(info.path, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{info.path} is damaged ({error}); download it again") from error
        view = self._open[info.path].get_slice(self._below + name)
        return view[start:stop] if dim == 0 else view[:, start:stop]

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and the first bytes of every tensor, whatever the sharding."""
        digest = hashlib.sha256()
        for name, info in sorted(self.tensors.items()):
            digest.update(_describe(name, info.dtype, info.shape))
            with info.path.open("rb") as file:
                file.seek(info.start)
                digest.update(file.read(min(_SAMPLE_BYTES, info.stop - info.start)))
        return digest.hexdigest()


@torch.no_grad()
def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """What `WeightDirectory.fingerprint` would be of a directory with these tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(_describe(name, tensor.dtype, tuple(tensor.shape)))
        sample = tensor.detach().flatten()[: -(-_SAMPLE_BYTES // tensor.dtype.itemsize)]
        digest.update(bytes(sample.cpu().contiguous().view(torch.uint8).numpy().data)[:_SAMPLE_BYTES])
    return digest.hexdigest()


def _describe(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    return f"{name} {_NAMES[dtype]} {shape}\n".encode()


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes, shapes and places of one file's tensors.

    Raises:
        CheckpointError: not a safetensors file, truncated, or of a dtype that is not supported.
    """
    try:
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            if not 0 < header_size <= path.stat().st_size - 8:
                raise CheckpointError(f"{path} is truncated or no safetensors file; download it again")
            header = json.loads(file.read(header_size))
        header.pop("__metadata__", None)
        return {name: _tensor_info(path, name, entry, 8 + header_size) for name, entry in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header is damaged ({error!r}); download the file again") from error


def _tensor_info(path: Path, name: str, entry: dict[str, Any], data_start: int) -> TensorInfo:
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {entry['dtype']}; supported: {', '.join(_DTYPES)}")
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, stop = (data_start + offset for offset in entry["data_offsets"])
    if stop > path.stat().st_size:
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {stop}, the file at {path.stat().st_size}; download it again"
        )
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {stop - start} bytes for {shape} of {dtype}")
    return TensorInfo(path, dtype, shape, start, stop)


class TensorSpec(NamedTuple):
    """A tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes one file, tensor by tensor, in the order announced; holds no more than one."""

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        """Write the header.

        Args:
            path: must not exist.
            specs: all tensors, in the order in which they will come.
        """
        self._specs = list(specs)
        self._next = 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in specs:
            header[spec.name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.num_bytes],
            }
            offset += spec.num_bytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._file = path.open("xb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor; it must be the one announced."""
        spec = self._specs[self._next]
        assert (name, tensor.dtype, tuple(tensor.shape)) == spec, f"{name} {tensor.shape} is not {spec}"
        self._file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self._next += 1

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()

    def check_complete(self) -> None:
        """Every announced tensor must have been written."""
        assert self._next == len(self._specs), f"{len(self._specs) - self._next} tensors were not written"


def write_tensors(path: Path | None, specs: Sequence[TensorSpec], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write one file from tensors that several ranks produce together, one at a time.

    Args:
        path: must not exist; ``None`` on ranks that take part in producing the tensors and write nothing.
        specs: all tensors, in the order in which they come.
        tensors: name and whole tensor; gathered while it is iterated.

    Raises:
        OSError: writing failed. The rest of `tensors` is gathered all the same: the other ranks wait in it.
    """
    remaining = iter(tensors)
    try:
        if path is not None:
            writer = SafetensorsWriter(path, specs)
            try:
                for name, tensor in remaining:
                    writer.write(name, tensor)
                writer.check_complete()
            finally:
                writer.close()
    finally:
        for _ in remaining:
            pass

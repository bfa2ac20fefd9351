"""Writing the base as Hugging Face files, one tensor at a time, each pipeline stage its own files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.megatron_build import DTYPES
from mcore_spec.config import BaseArchitecture
from mcore_spec.parallel.layout import is_rank_zero
from mcore_spec.weights.encoding import Encodings, encoded_specs, encoded_tensors
from mcore_spec.weights.families import Row, base_rows, stored_shapes
from mcore_spec.weights.hf_import import local_rows
from mcore_spec.weights.safetensors_io import INDEX_NAME, SINGLE_NAME, TensorSpec, write_tensors

MAX_FILE_BYTES = 5 * 10**9
Value = TypeVar("Value")


def export_base(base: MegatronBase, directory: Path, *, encodings: Encodings | None = None) -> None:
    """Write every weight of the base; all ranks of the first data-parallel replica take part.

    Args:
        base: this rank's part.
        directory: exists; receives one file or several with an index.
        encodings: of weights that are not written as they are.

    Raises:
        OSError: on the ranks that could not write; the others finish.
    """
    rows, encodings = _rows(base), encodings or {}
    own = [encoded_specs(stored_specs(row, base.architecture), encodings) for row, _ in rows]
    sizes = [sum(spec.num_bytes for spec in specs) for specs in own]
    files = _pack(sizes)
    counts = _of_stages(base, len(files))
    first, total = sum(counts[: base.stage]), sum(counts)
    names = [_file_name(number, total) for number in range(first + 1, first + 1 + len(files))]
    specs = [[spec for index in indices for spec in own[index]] for indices in files]
    weight_map = {spec.name: name for name, held in zip(names, specs, strict=True) for spec in held}
    maps, totals = _of_stages(base, weight_map), _of_stages(base, sum(sizes))
    # What one file lacks in space the next lacks too; every file is gone through for the other ranks' sake.
    failure: OSError | None = None
    for name, held, indices in zip(names, specs, files, strict=True):
        tensors = encoded_tensors((pair for index in indices for pair in _whole(base, *rows[index])), encodings)
        try:
            write_tensors(directory / name if base.tp.rank == 0 else None, held, tensors)
        except OSError as error:
            failure = error
    if failure is not None:
        raise failure
    if total > 1 and is_rank_zero():
        index = {
            "metadata": {"total_size": sum(totals)},
            "weight_map": {name: file for stage in maps for name, file in stage.items()},
        }
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _of_stages(base: MegatronBase, value: Value) -> list[Value]:
    """Every pipeline stage's value, in order."""
    of_stages = [value] * base.num_stages
    dist.all_gather_object(of_stages, value, group=base.pp_group)
    return of_stages


def _file_name(number: int, total: int) -> str:
    return SINGLE_NAME if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def _rows(base: MegatronBase) -> list[tuple[Row, Tensor]]:
    """This stage's rows; a tied head is not written a second time."""
    architecture = base.architecture
    rows = [(row, tensor) for row, name, tensor in local_rows(base.model, architecture)]
    if base.architecture.tie_word_embeddings and not base.is_first_stage:
        embedding = next(iter(base_rows(architecture)))
        rows = [pair for pair in rows if pair[0] != embedding]
    return rows


def stored_specs(row: Row, base: BaseArchitecture) -> list[TensorSpec]:
    """What the row writes; every rank knows it without communication."""
    shapes = stored_shapes(row, base)
    return [TensorSpec(name, DTYPES[base.dtype], shape) for name, shape in zip(row.stored, shapes, strict=True)]


def _pack(sizes: list[int]) -> list[list[int]]:
    """Consecutive rows into files of at most `MAX_FILE_BYTES` (one row may exceed it)."""
    files: list[list[int]] = [[]]
    filled = 0
    for index, size in enumerate(sizes):
        if files[-1] and filled + size > MAX_FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(index)
        filled += size
    return files


@torch.no_grad()
def _whole(base: MegatronBase, row: Row, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The row's stored tensors, gathered over the tensor-parallel group."""
    parts = [tensor.detach()]
    if base.tp.size > 1:
        parts = [torch.empty_like(tensor) for _ in range(base.tp.size)]
        dist.all_gather(parts, tensor.detach().contiguous(), group=base.tp.group)
    whole = row.cut.join(parts, len(row.stored), base.architecture)
    yield from zip(row.stored, whole, strict=True)

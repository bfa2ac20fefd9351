"""Tensors that are written as several: a quantised weight is its numbers and its scales."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

from torch import Tensor

from mcore_spec.weights.safetensors_io import TensorSpec


class Encoding(Protocol):
    """How one tensor is written."""

    def specs(self, spec: TensorSpec) -> list[TensorSpec]:
        """What is written for the tensor that `spec` describes; every rank can tell without communication."""
        ...

    def tensors(self, name: str, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The same tensors; all of the tensor-parallel group must iterate."""
        ...


# By the names of the tensors in the files; others are written as they are.
Encodings: TypeAlias = Mapping[str, Encoding]


def encoded_specs(specs: Sequence[TensorSpec], encodings: Encodings) -> list[TensorSpec]:
    """What is written for some tensors."""
    written: list[TensorSpec] = []
    for spec in specs:
        written += encodings[spec.name].specs(spec) if spec.name in encodings else [spec]
    return written


def encoded_tensors(tensors: Iterable[tuple[str, Tensor]], encodings: Encodings) -> Iterator[tuple[str, Tensor]]:
    """The same in the same order, one by one."""
    for name, whole in tensors:
        if name in encodings:
            yield from encodings[name].tensors(name, whole)
        else:
            yield name, whole

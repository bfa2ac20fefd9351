"""What the forms of other tools have in common: what they leave open, what a reader says, what a writer takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from mcore_spec.data.hidden_states import DocumentStates
from mcore_spec.errors import ConfigError

Convention = Literal["boundary", "output"]
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class LeftOpen(NamedTuple):
    """What the files of a form do not say, as their owner says it; ``None``: not said.

    Attributes:
        aux_layer_ids: layers by output, 0-based, ascending; the last layer's state is not among them.
        convention: how the files number layers: by boundary (0 is the embedding, layer i ends at i + 1) or by output.
        last_is_normed: whether the last state went through the final norm.
        counts_all_tokens: files without a loss mask count every token.
    """

    aux_layer_ids: tuple[int, ...] | None = None
    convention: Convention | None = None
    last_is_normed: bool | None = None
    counts_all_tokens: bool = False


class Facts(NamedTuple):
    """What all documents of a directory share.

    Attributes:
        source: the base, as the files name it; empty where they do not.
        aux_layer_ids: layers by output, 0-based, ascending.
        last_is_normed: whether the last state went through the final norm.
        hidden_size: h.
        num_documents: conversations.
        seq_length: tokens of a conversation at most; 0 where that is known only after reading all.
        last_layer_id: layer, by output, that the files name for the last state; ``None`` where they name none.
    """

    source: str
    aux_layer_ids: tuple[int, ...]
    last_is_normed: bool
    hidden_size: int
    num_documents: int
    seq_length: int = 0
    last_layer_id: int | None = None


class Reader(Protocol):
    """Documents of a directory by number."""

    @property
    def facts(self) -> Facts:
        """What they share."""
        ...

    def states(self, index: int) -> DocumentStates:
        """Document `index`, checked; mapped where the form allows it.

        Raises:
            ConfigError: a file that is damaged, or does not fit the others.
        """
        ...


class Writer(Protocol):
    """Takes the documents of a directory in any order."""

    def append(self, index: int, states: DocumentStates) -> None:
        """Write document `index`.

        Raises:
            OSError: it cannot be written.
        """
        ...

    def finish(self) -> None:
        """Write what stands beside the documents, after the last one."""
        ...


class Form(NamedTuple):
    """How a tool keeps hidden states.

    Attributes:
        open: directory and what its owner says of it -> a reader.
        create: directory, facts and layers of the base -> a writer. The directory exists and is empty.
        wants_normed: what the tool makes of the last state: it needs it normed, not normed, or says which (``None``).
    """

    open: Callable[[Path, LeftOpen], Reader]
    create: Callable[[Path, Facts, int], Writer]
    wants_normed: bool | None


def to_output_ids(ids: Sequence[int], convention: Convention) -> tuple[int, ...]:
    """Layer ids of a file in our convention."""
    return tuple(layer - (convention == "boundary") for layer in ids)


def to_boundary_ids(ids: Sequence[int]) -> tuple[int, ...]:
    """Our layer ids as vLLM and speculators count them."""
    return tuple(layer + 1 for layer in ids)


def asked(value: object, *, where: Path, what: str, flag: str) -> None:
    """Refuse a directory that leaves something open.

    Raises:
        ConfigError: its owner did not say it either.
    """
    if value is None:
        raise ConfigError(f"{where} does not say {what}; give {flag}")


def numbered_files(directory: Path, pattern: str) -> list[Path]:
    """Files of a pattern, by the numbers in their names.

    Raises:
        ConfigError: there is none.
    """
    paths = sorted(directory.glob(pattern), key=lambda path: _by_number(path.name))
    if not paths:
        raise ConfigError(f"{directory} has no file {pattern}; give the directory that holds them")
    return paths


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def take_tensor(values: object, name: str, *, where: Path, ndim: int, kinds: Sequence[torch.dtype]) -> Tensor:
    """An entry of a file.

    Raises:
        ConfigError: no dictionary, no such entry, no tensor, another rank or dtype.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where} holds a {type(values).__name__}, not a dictionary of tensors; write it again")
    if name not in values:
        raise ConfigError(f"{where} has no {name!r}, only {', '.join(map(str, values)) or 'nothing'}; write it again")
    return check_tensor(values[name], name, where=where, ndim=ndim, kinds=kinds)


def check_tensor(value: object, name: str, *, where: Path, ndim: int, kinds: Sequence[torch.dtype]) -> Tensor:
    """`value`, if it is such a tensor.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, Tensor) or value.ndim != ndim or value.dtype not in kinds:
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        wanted = "integers" if torch.int64 in kinds else "floating numbers"
        raise ConfigError(f"{where}: {name} is {found}, it must be a tensor of {wanted} of rank {ndim}; write it again")
    return value


def check_rows(states: DocumentStates, facts: Facts, *, where: Path) -> DocumentStates:
    """`states`, if rows, layers and width are those of the directory.

    Raises:
        ConfigError: they are not.
    """
    rows, layers = len(states.token_ids), len(facts.aux_layer_ids)
    expected = {
        "loss_mask": (rows,),
        "aux": (rows, layers, facts.hidden_size),
        "last": (rows, facts.hidden_size),
    }
    for name, shape in expected.items():
        found = tuple(states._asdict()[name].shape)
        if found != shape or rows == 0:
            raise ConfigError(
                f"{where}: {name} has shape {list(found)}, for {rows} tokens, {layers} aux layers and hidden size "
                f"{facts.hidden_size} it must be {list(shape)}; write it again, or correct --aux-layer-ids"
            )
    return states

"""Hidden states of conversations, computed by an engine, into a store: resumable, a batch at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mcore_spec.data.document import DocumentSource
from mcore_spec.data.hidden_states import DocumentStates, StatesWriter, StoreDescription
from mcore_spec.data.hidden_states.writer import DEFAULT_SHARD_BYTES, finish_store


class Captured(NamedTuple):
    """Of one conversation.

    Attributes:
        aux: outputs of the aux layers in layer order, [n, aux layers, h].
        last: output of the last layer, [n, h].
    """

    aux: Tensor
    last: Tensor


@dataclass(frozen=True, kw_only=True)
class EngineSetting:
    """How an engine that writes hidden states to files is set up.

    Attributes:
        base: Hugging Face directory.
        aux_layer_ids: 0-based, by output, ascending.
        scratch: directory for what is captured, until it is read.
        max_tokens: of a prompt.
        dtype: of the base and of its states: float32, bfloat16, float16, or auto.
        tensor_parallel_size: GPUs.
    """

    base: Path
    aux_layer_ids: tuple[int, ...]
    scratch: Path
    max_tokens: int
    dtype: str
    tensor_parallel_size: int = 1

    def empty_scratch(self) -> None:
        """Make the directory, without what an earlier attempt left there."""
        self.remove_scratch()
        self.scratch.mkdir(parents=True)

    def remove_scratch(self) -> None:
        """Behind the last conversation."""
        shutil.rmtree(self.scratch, ignore_errors=True)


class Engine(Protocol):
    """Runs the base over conversations that are there already.

    Attributes:
        last_is_normed: whether its last states went through the final norm.
    """

    last_is_normed: bool

    def capture(self, conversations: Sequence[list[int]]) -> Iterator[Captured]:
        """Hidden states of a batch, in its order.

        Args:
            conversations: token ids of each.

        Raises:
            ConfigError: the engine did not return what it was asked for.
        """
        ...

    def close(self) -> None:
        """Let go of what is held."""
        ...


def extract(
    description: StoreDescription,
    documents: DocumentSource,
    engine: Engine,
    directory: Path,
    *,
    batch_size: int,
    norm: NormFunction | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> int:
    """Compute what is missing in the store, and finish it.

    Args:
        description: of the store.
        documents: its first `description.num_documents` are extracted.
        engine: what runs the base.
        directory: of the store.
        batch_size: conversations that are given to it at once.
        norm: what last states are sent through, where they were not.
        max_shard_bytes: of a file of the store.

    Returns:
        The conversations that were computed; an earlier attempt may have left some.

    Raises:
        CheckpointError: the directory holds another store, or a damaged one.
        ConfigError: states that do not fit.
        OSError: the store cannot be written.
    """
    assert description.last_is_normed == (engine.last_is_normed or norm is not None), "as the states are"
    with StatesWriter(directory, description, max_shard_bytes=max_shard_bytes) as writer:
        missing = [index for index in range(description.num_documents) if index not in writer.done]
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            given = [documents.document(index) for index in batch]
            captured = engine.capture([document.token_ids.tolist() for document in given])
            for index, document, states in zip(batch, given, captured, strict=True):
                last = states.last if norm is None else norm(states.last)
                token_ids, mask = torch.from_numpy(document.token_ids), torch.from_numpy(document.mask)
                writer.append(index, DocumentStates(token_ids, mask, states.aux, last))
    finish_store(directory)
    return len(missing)


class NormFunction(Protocol):
    """The final norm of a base: `FinalNorm`."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        ...

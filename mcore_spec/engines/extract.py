"""Hidden states of conversations, computed by an engine, into a store: resumable, a batch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_spec.data.hidden_states import DocumentStates, StatesWriter, StoreDescription
from mcore_spec.data.hidden_states.writer import DEFAULT_SHARD_BYTES, finish_store
from mcore_spec.data.store_files import TokenStore
from mcore_spec.errors import ConfigError
from mcore_spec.parallel.layout import barrier, run_on_rank_zero
from mcore_spec.planning.states import StatesDtype, StatesSize
from mcore_spec.weights.base_directory import BaseDirectory


class Captured(NamedTuple):
    """Of one conversation.

    Attributes:
        aux: outputs of the aux layers in layer order, [n, aux layers, h].
        last: output of the last layer, [n, h].
    """

    aux: Tensor
    last: Tensor


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


class Plan(NamedTuple):
    """What is extracted.

    Attributes:
        base: that runs.
        store: the conversations.
        tokenizer_fingerprint: of what tokenised them.
        num_documents: the first so many of them.
        aux_layer_ids: 0-based, by output, ascending.
        dtype: of the states on disk.
        output: directory of the result.
    """

    base: BaseDirectory
    store: TokenStore
    tokenizer_fingerprint: str
    num_documents: int
    aux_layer_ids: tuple[int, ...]
    dtype: StatesDtype
    output: Path

    @property
    def num_tokens(self) -> int:
        """Of all its conversations."""
        return int(self.store.lengths[: self.num_documents].sum())

    @property
    def num_bytes(self) -> int:
        """That the store will take, without the headers of its files."""
        size = StatesSize(self.base.architecture.hidden_size, len(self.aux_layer_ids), self.dtype)
        return self.num_tokens * size.bytes_per_token

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation."""
        return int(self.store.lengths[: self.num_documents].max())

    def describe(self, backend: str, *, last_is_normed: bool) -> StoreDescription:
        """What the store will be."""
        conversations = self.store.fingerprint
        if self.num_documents < len(self.store):
            conversations = hashlib.sha256(f"{conversations}:{self.num_documents}".encode()).hexdigest()
        return StoreDescription.parse(
            {
                "source": self.base.identity.source,
                "base_fingerprint": self.base.identity.fingerprint,
                "backend": backend,
                "tokenizer_fingerprint": self.tokenizer_fingerprint,
                "conversation_fingerprint": conversations,
                "num_documents": self.num_documents,
                "seq_length": self.store.seq_length,
                "vocab_size": self.base.architecture.vocab_size,
                "hidden_size": self.base.architecture.hidden_size,
                "aux_layer_ids": self.aux_layer_ids,
                "last_is_normed": last_is_normed,
                "dtype": self.dtype,
            }
        )


def check_bytes(plan: Plan, *, max_bytes: int | None) -> None:
    """Refuse a store that is larger than it may be, before anything is computed.

    Raises:
        ConfigError: with both numbers.
    """
    if max_bytes is not None and plan.num_bytes > max_bytes:
        raise ConfigError(
            f"the store would take {plan.num_bytes:,} bytes, --max-bytes allows {max_bytes:,}; lower --num-samples or "
            "--seq-length, or choose --storage-dtype fp8"
        )


def extract(
    plan: Plan,
    engine: Engine,
    *,
    backend: str,
    batch_size: int,
    norm: NormFunction | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> int:
    """Compute what is missing in the store, and finish it. Several ranks share the conversations; all take part.

    Args:
        plan: what is extracted.
        engine: what runs the base.
        backend: its name in the description.
        batch_size: conversations that are given to it at once.
        norm: what last states are sent through, where they were not.
        max_shard_bytes: of a file of the store.

    Returns:
        The conversations that this rank computed; an earlier attempt may have left some.

    Raises:
        CheckpointError: the directory holds another store, or a damaged one.
        ConfigError: states that do not fit.
        OSError: the store cannot be written.
    """
    description = plan.describe(backend, last_is_normed=engine.last_is_normed or norm is not None)
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with StatesWriter(plan.output, description, writer=rank, max_shard_bytes=max_shard_bytes) as writer:
        missing = [index for index in range(rank, plan.num_documents, num_ranks) if index not in writer.done]
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            documents = [plan.store.document(index) for index in batch]
            captured = engine.capture([document.token_ids.tolist() for document in documents])
            for index, document, states in zip(batch, documents, captured, strict=True):
                last = states.last if norm is None else norm(states.last)
                token_ids, mask = torch.from_numpy(document.token_ids), torch.from_numpy(document.mask)
                writer.append(index, DocumentStates(token_ids, mask, states.aux, last))
    barrier()
    run_on_rank_zero(lambda: finish_store(plan.output))
    return len(missing)


class NormFunction(Protocol):
    """The final norm of a base: `FinalNorm`."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        ...

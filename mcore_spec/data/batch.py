"""Micro-batches: documents laid behind each other in one row of tokens, with every shift already made.

What row t reads and predicts at TTT step k, and whether it counts, is decided here on whole documents, before
any rank takes its rows (`mcore_spec.parallel.documents.Documents`): nobody after this shifts anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from mcore_spec.data.document import BoolArray, Document, IntArray
from mcore_spec.data.mixing import draw_replaced
from mcore_spec.data.noise import draw_noise_key
from mcore_spec.data.packing import SampleStream
from mcore_spec.data.seeds import RandomUse, random_state
from mcore_spec.errors import ConfigError

__all__ = ["Batch", "Batches", "DataParallelBatches", "Document", "make_batch"]

Values = TypeVar("Values", IntArray, BoolArray)


class BatchStates(NamedTuple):
    """The base's hidden states of a batch's rows, read from a store, on the host; zero in padding.

    Attributes:
        aux: outputs of the wanted layers in layer order, joined, [rows, n h]; ``None`` where none are wanted.
        last: output of the last layer, [rows, h].
    """

    aux: Tensor | None
    last: Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of K steps.

    Attributes:
        token_ids: int64 [rows]; 0 in padding.
        step_token_ids: int64 [K, rows], the token x[t+1+k] that row t reads at step k; 0 outside of its document.
        counted: bool [K, rows], whether row t is in the loss at step k: m[t+1], m[t+2+k], and t+2+k in the document.
        produced: bool [rows], whether the token behind row t is one that the base should produce: m[t+1].
        labels: int64 [K, rows], the token x[t+2+k] that row t predicts at step k; 0 outside of its document.
        replaced: rows that read the draft's own state after each step but the last, bool [K - 1, rows]; ``None``
            without mixing.
        noise_keys: what the noise on each row's features is made from, int64 [rows], one number a document;
            ``None`` without noise.
        bounds: 0, the end of each document's rows; every row belongs to a document.
        lengths: tokens of each document, padding left out.
        num_samples: samples in it.
        num_tokens: tokens in it, padding left out.
        numbers: of the documents in their source; empty where they come from none.
        states: of the base, where they are read and not computed. They stay on the host: a rank takes its rows alone.
    """

    token_ids: Tensor
    step_token_ids: Tensor
    counted: Tensor
    produced: Tensor
    labels: Tensor
    replaced: Tensor | None
    bounds: tuple[int, ...]
    lengths: tuple[int, ...]
    num_samples: int
    num_tokens: int
    noise_keys: Tensor | None = None
    numbers: tuple[int, ...] = ()
    states: BatchStates | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            step_token_ids=self.step_token_ids.to(device),
            counted=self.counted.to(device),
            produced=self.produced.to(device),
            labels=self.labels.to(device),
            replaced=None if self.replaced is None else self.replaced.to(device),
            noise_keys=None if self.noise_keys is None else self.noise_keys.to(device),
        )


def make_batch(
    documents: Sequence[Document],
    *,
    num_steps: int,
    document_multiple: int = 1,
    row_multiple: int = 1,
    num_samples: int,
    pad_to: int | None = None,
    mixing: Sequence[np.random.RandomState] | None = None,
    noise_keys: Sequence[int] | None = None,
    numbers: Sequence[int] = (),
) -> Batch:
    """Lay documents behind each other.

    Args:
        documents: at least one, none empty.
        num_steps: K.
        document_multiple: what each document's rows are padded to a multiple of, at its end (twice the context-parallel
            size).
        row_multiple: what the number of all rows is padded to a multiple of, behind the last document's tokens.
        num_samples: samples that the documents are of.
        pad_to: rows of each document; ``None``: as many as it needs.
        mixing: draw `Batch.replaced` with these generators, one a document.
        noise_keys: of `Batch.noise_keys`, one a document.
        numbers: of `Batch.numbers`.

    Raises:
        ConfigError: no documents, an empty one, one longer than `pad_to`, or a `pad_to` that is no multiple.
    """
    lengths = np.array([len(document.token_ids) for document in documents], dtype=np.int64)
    if len(lengths) == 0 or lengths.min() == 0:
        raise ConfigError(f"documents of {lengths.tolist()} tokens; a batch needs at least one, and each needs tokens")
    spans = _spans(lengths, document_multiple=document_multiple, row_multiple=row_multiple, pad_to=pad_to)
    bounds = np.concatenate(([0], np.cumsum(spans)))
    num_rows, num_tokens = int(bounds[-1]), int(lengths.sum())
    # Where each token stands: the rows of its document begin where they do, not behind the tokens before.
    token_rows = np.arange(num_tokens) + np.repeat(bounds[:-1] - (np.cumsum(lengths) - lengths), lengths)
    token_ids, mask = np.zeros(num_rows, dtype=np.int64), np.zeros(num_rows, dtype=np.bool_)
    token_ids[token_rows] = np.concatenate([document.token_ids for document in documents])
    mask[token_rows] = np.concatenate([document.mask for document in documents])
    # Rows that follow row t in its document. Padding, which is among them, has no tokens and no mask.
    num_following = np.repeat(bounds[1:], spans) - 1 - np.arange(num_rows)
    # ahead[j] = x[t+1+j]: what step j reads, and what step j - 1 predicts.
    ahead = np.stack([_shifted(token_ids, 1 + j, num_following) for j in range(num_steps + 1)])
    produced = np.stack([_shifted(mask, 1 + j, num_following) for j in range(num_steps + 1)])
    tokens = torch.from_numpy(ahead)
    replaced = None
    if mixing is not None:
        rows = draw_replaced(lengths, bounds[:-1], num_rows=num_rows, num_steps=num_steps, generators=mixing)
        replaced = torch.from_numpy(rows)
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        step_token_ids=tokens[:-1],
        counted=torch.from_numpy(produced[:1] & produced[1:]),
        produced=torch.from_numpy(produced[0]),
        labels=tokens[1:],
        replaced=replaced,
        bounds=tuple(bounds.tolist()),
        lengths=tuple(lengths.tolist()),
        num_samples=num_samples,
        num_tokens=num_tokens,
        noise_keys=None if noise_keys is None else torch.tensor(noise_keys).repeat_interleave(torch.from_numpy(spans)),
        numbers=tuple(numbers),
    )


class Batches(Protocol):
    """Training or validation data of this rank, by number of the global batch."""

    def micro_batches(self, index: int) -> Iterator[Batch]:
        """This rank's micro-batches of global batch `index`."""
        ...


class DataParallelBatches:
    """The micro-batches of one data-parallel rank, by number of the global batch.

    Global batch g holds samples g B to (g + 1) B - 1 of the stream, whatever the number of ranks D: micro-batch m of
    rank d starts at sample g B + (m D + d) b, with b samples a micro-batch. Of a stream that ends, the last batch may
    be short; a rank may then have fewer micro-batches than another, or none.
    """

    def __init__(
        self,
        stream: SampleStream,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        num_steps: int,
        row_multiple: int = 1,
        mixing_seed: int | None = None,
        noise_seed: int | None = None,
    ) -> None:
        """Take the share of one rank.

        Args:
            stream: samples, the same on every rank.
            global_batch_size: B, samples in an optimizer step.
            micro_batch_size: b, samples in a forward pass of one rank.
            data_rank: d, of this rank among the data-parallel ones.
            data_size: D, how many there are.
            num_steps: TTT steps.
            row_multiple: see `make_batch`.
            mixing_seed: mix states; the rows depend on it, the sample and the document's place in the sample.
            noise_seed: put noise on the features, which depends on the same.

        Raises:
            ConfigError: micro-batches of the ranks that do not make up a global batch.
        """
        if global_batch_size % (micro_batch_size * data_size):
            raise ConfigError(
                f"global_batch_size = {global_batch_size} is not divisible by micro_batch_size = {micro_batch_size} x "
                f"{data_size} data-parallel ranks; give a multiple of {micro_batch_size * data_size}"
            )
        assert 0 <= data_rank < data_size, "a rank of the data-parallel group"
        self.stream, self.num_steps, self.row_multiple = stream, num_steps, row_multiple
        self.mixing_seed, self.noise_seed = mixing_seed, noise_seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.data_rank, self.data_size = data_rank, data_size

    @property
    def num_batches(self) -> int | None:
        """Global batches, a short last one included; ``None``: without end."""
        num_samples = self.stream.num_samples
        return None if num_samples is None else -(-num_samples // self.global_batch_size)

    def micro_batches(self, index: int) -> Iterator[Batch]:
        """This rank's micro-batches of global batch `index`, from 0."""
        stride = self.micro_batch_size * self.data_size
        first = index * self.global_batch_size + self.data_rank * self.micro_batch_size
        num_samples = self.stream.num_samples
        for start in range(first, first + self.global_batch_size, stride):
            stop = start + self.micro_batch_size
            if num_samples is not None:
                stop = min(stop, num_samples)
            if start < stop:
                yield self._batch(range(start, stop))

    def _batch(self, samples: range) -> Batch:
        stream, seed, noise_seed = self.stream, self.mixing_seed, self.noise_seed
        numbers, documents, mixing, noise_keys = [], [], [], []
        for sample in samples:
            for place, number in enumerate(stream.sample(sample)):
                numbers.append(number)
                documents.append(stream.source.document(number))
                if seed is not None:
                    mixing.append(random_state(seed, RandomUse.MIXING, sample, place))
                if noise_seed is not None:
                    noise_keys.append(draw_noise_key(random_state(noise_seed, RandomUse.NOISE, sample, place)))
        return make_batch(
            documents,
            num_steps=self.num_steps,
            document_multiple=stream.document_multiple,
            row_multiple=self.row_multiple,
            num_samples=len(samples),
            pad_to=None if stream.packing else stream.seq_length,
            mixing=None if seed is None else mixing,
            noise_keys=None if noise_seed is None else noise_keys,
            numbers=numbers,
        )


def _spans(lengths: IntArray, *, document_multiple: int, row_multiple: int, pad_to: int | None) -> IntArray:
    """Rows of each document, int64 [documents]."""
    if pad_to is not None and (pad_to % document_multiple or pad_to < lengths.max()):
        raise ConfigError(
            f"pad_to = {pad_to} for documents of up to {lengths.max()} tokens; it must be a multiple of "
            f"{document_multiple} and no less than that"
        )
    spans = -(-lengths // document_multiple) * document_multiple if pad_to is None else np.full_like(lengths, pad_to)
    multiple = lcm(document_multiple, row_multiple)
    spans[-1] += -int(spans.sum()) % multiple
    return spans


def _shifted(values: Values, distance: int, num_following: IntArray) -> Values:
    """``values[t + distance]`` where row t's document reaches that far, 0 elsewhere."""
    moved = np.zeros_like(values)
    moved[:-distance] = values[distance:]
    moved[num_following < distance] = 0
    return moved

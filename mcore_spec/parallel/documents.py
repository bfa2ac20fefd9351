"""The documents of one packed row, and which of its rows a context-parallel rank holds.

Several documents lie behind each other in one row of tokens and never see each other: positions restart,
attention and shifts stay inside. With context parallelism each document is cut into 2c chunks over c ranks, and
rank r holds chunks r and 2c - 1 - r (the order of megatron-core and Transformer Engine), so that every rank
has the same share of the causal triangle.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mcore_spec.parallel.collectives import Group, gather, gather_without_grad, group_rank, group_size
from mcore_spec.parallel.tensor_parallel import SEQUENCE_DIM, TensorParallel

ROW_DIM = 0


class Piece(NamedTuple):
    """Queries ``start..stop`` of this rank see keys ``key_start..key_stop`` of the whole row.

    Where `is_causal`, both ranges are the same rows and query i sees keys up to its own; otherwise every query
    sees every key of the piece.
    """

    start: int
    stop: int
    key_start: int
    key_stop: int
    is_causal: bool


class Chunk(NamedTuple):
    """Rows ``start..stop`` of the whole row, of one document, that a rank holds behind each other."""

    document: int
    start: int
    stop: int


class LocalRows(NamedTuple):
    """What a layer asks about this rank's rows; each int64 [local rows].

    Attributes:
        rows: where they are in the whole row.
        positions: inside the document.
        lengths: of the document, padding left out.
    """

    rows: Tensor
    positions: Tensor
    lengths: Tensor


def document_multiple(context_group: Group) -> int:
    """What the span of each document must be a multiple of."""
    size = group_size(context_group)
    return 1 if size == 1 else 2 * size


def row_multiple(context_group: Group, tp: TensorParallel) -> int:
    """What the number of rows must be a multiple of: under sequence parallelism they are shared out too."""
    return group_size(context_group) * (tp.size if tp.sequence_parallel else 1)


class Documents:
    """Bounds of the documents in one packed row, seen from one context-parallel rank.

    Host-side integers; two ranks of a group must be given the same bounds.
    """

    def __init__(self, bounds: Sequence[int], *, lengths: Sequence[int] | None = None, group: Group = None) -> None:
        """Take the bounds.

        Args:
            bounds: 0, the end of the first document, ..., the number of rows. Every row belongs to a document.
            lengths: tokens of each document without the padding at its end; ``None``: there is none.
            group: the context-parallel ranks; each document's span must be a multiple of twice their number.
        """
        self.bounds, self.group = tuple(bounds), group
        spans = [stop - start for start, stop in pairwise(self.bounds)]
        self.lengths = tuple(spans) if lengths is None else tuple(lengths)
        assert self.bounds[0] == 0, "the first document starts at row 0"
        assert all(span > 0 for span in spans), "every document has rows"
        assert len(self.lengths) == len(spans), "one length a document"
        assert all(0 <= length <= span for length, span in zip(self.lengths, spans, strict=True)), (
            "a document's tokens lie inside its rows"
        )
        multiple = document_multiple(group)
        assert all(span % multiple == 0 for span in spans), f"spans are multiples of {multiple}"
        self._local_rows: dict[torch.device, LocalRows] = {}
        self._orders: dict[torch.device, Tensor] = {}

    @property
    def is_single(self) -> bool:
        """Whether this rank holds the one document there is, whole."""
        return len(self.lengths) == 1 and group_size(self.group) == 1

    @property
    def num_rows(self) -> int:
        """Rows of the whole packed row."""
        return self.bounds[-1]

    @property
    def num_local_rows(self) -> int:
        """Rows that this rank holds."""
        return self.num_rows // group_size(self.group)

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """What this rank holds, in its order."""
        return self._chunks_of(group_rank(self.group))

    def _chunks_of(self, rank: int) -> tuple[Chunk, ...]:
        size, chunks = group_size(self.group), []
        for number, (start, stop) in enumerate(pairwise(self.bounds)):
            if size == 1:
                chunks.append(Chunk(number, start, stop))
                continue
            width = (stop - start) // (2 * size)
            for index in (rank, 2 * size - 1 - rank):
                chunks.append(Chunk(number, start + index * width, start + (index + 1) * width))
        return tuple(chunks)

    @cached_property
    def row_index(self) -> Tensor:
        """Whole-row index of each local row, int64 [local rows]."""
        return torch.cat([torch.arange(start, stop) for _, start, stop in self.chunks])

    @cached_property
    def positions(self) -> Tensor:
        """Position of each row of the whole row inside its document, int64 [rows]."""
        return torch.cat([torch.arange(stop - start) for start, stop in pairwise(self.bounds)])

    @cached_property
    def row_lengths(self) -> Tensor:
        """Length of the document (padding left out) that each row of the whole row belongs to, int64 [rows]."""
        spans = torch.tensor([stop - start for start, stop in pairwise(self.bounds)])
        return torch.tensor(self.lengths).repeat_interleave(spans)

    def neighbours(self, distance: int) -> Tensor:
        """Whole-row index of row r + `distance`, or of the nearest row of r's document, int64 [rows]."""
        parts = [
            (torch.arange(start, stop) + distance).clamp_(start, stop - 1) for start, stop in pairwise(self.bounds)
        ]
        return torch.cat(parts)

    def local_rows(self, device: torch.device) -> LocalRows:
        """This rank's rows, on `device`; copied there once."""
        if device not in self._local_rows:
            index = self.row_index
            rows = LocalRows(index, self.positions[index], self.row_lengths[index])
            self._local_rows[device] = LocalRows(*(values.to(device) for values in rows))
        return self._local_rows[device]

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Causal attention inside documents as rectangles and triangles; local queries, whole-row keys.

        The pieces of one chunk of queries follow each other, the triangle first.
        """
        pieces, row = [], 0
        for number, start, stop in self.chunks:
            local_stop = row + stop - start
            pieces.append(Piece(row, local_stop, start, stop, True))
            if start > self.bounds[number]:
                pieces.append(Piece(row, local_stop, self.bounds[number], start, False))
            row = local_stop
        return tuple(pieces)

    def take(self, tensor: Tensor, dim: int = ROW_DIM) -> Tensor:
        """This rank's rows of a tensor over the whole row."""
        if group_size(self.group) == 1:
            return tensor
        return tensor.index_select(dim, self.local_rows(tensor.device).rows)

    def join(self, tensor: Tensor, *, with_grad: bool) -> Tensor:
        """Local rows [local rows, ...] of every rank -> the whole row [rows, ...], in its order.

        Args:
            tensor: this rank's rows.
            with_grad: gradients of the result, one term a rank, are summed and cut into the ranks' rows;
                otherwise the result takes none.
        """
        if group_size(self.group) == 1:
            return tensor if with_grad else tensor.detach()
        if with_grad:
            joined = gather(tensor, ROW_DIM, self.group, grad_is_partial=True)
        else:
            joined = gather_without_grad(tensor, ROW_DIM, self.group)
        return joined.index_select(ROW_DIM, self._order(tensor.device))

    def _order(self, device: torch.device) -> Tensor:
        """Index into the ranks' rows, one rank after the other, of each row of the whole row."""
        if device not in self._orders:
            ranks = range(group_size(self.group))
            rows = torch.cat([torch.arange(start, stop) for rank in ranks for _, start, stop in self._chunks_of(rank)])
            self._orders[device] = rows.argsort().to(device)
        return self._orders[device]


def whole_rows(hidden: Tensor, documents: Documents, tp: TensorParallel) -> Tensor:
    """This rank's [s or s/tp, 1, n] -> the whole row [rows, n] on every rank, without gradient."""
    if tp.sequence_parallel:
        hidden = gather_without_grad(hidden, SEQUENCE_DIM, tp.group)
    return documents.join(hidden, with_grad=False)[:, 0]

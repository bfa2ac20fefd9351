"""Which rows a context-parallel rank holds, which keys they see, and putting the rows back together."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank
from torch import Tensor

from mcore_spec.parallel.documents import Documents
from tests.pool import RankPool
from tests.unit.document_cases import documents_of_ranks

SIZES = [1, 2, 3, 4]


def bounds_for(size: int) -> list[int]:
    """Documents of one chunk row, of three and of two; without context parallelism of 1, 3, 2 and 5 rows."""
    spans = [1, 3, 2, 5] if size == 1 else [2 * size, 6 * size, 4 * size]
    return [sum(spans[:index]) for index in range(len(spans) + 1)]


def numbers(bounds: list[int]) -> Tensor:
    """Which document each row is in."""
    return torch.tensor([n for n, (start, stop) in enumerate(pairwise(bounds)) for _ in range(start, stop)])


@pytest.mark.parametrize("size", SIZES)
def test_every_row_is_on_one_rank_in_the_order_of_megatron_core(size: int) -> None:
    bounds = bounds_for(size)
    ranks = documents_of_ranks(bounds, size)
    rows = torch.arange(bounds[-1])
    for rank, documents in enumerate(ranks):
        expected = [
            _get_thd_freqs_on_this_cp_rank(rank, size, rows[start : start + (stop - start) // size], rows, start)
            for start, stop in pairwise(bounds)
        ]
        assert torch.equal(documents.row_index, torch.cat(expected))
        assert documents.num_local_rows == len(documents.row_index) == bounds[-1] // size
        assert torch.equal(documents.take(rows), documents.row_index)
    together = torch.cat([documents.row_index for documents in ranks])
    assert torch.equal(together.sort().values, rows)


@pytest.mark.parametrize("size", SIZES)
def test_pieces_are_the_keys_that_a_row_sees_each_once(size: int) -> None:
    bounds = bounds_for(size)
    number, rows = numbers(bounds), torch.arange(bounds[-1])
    areas = []
    for documents in documents_of_ranks(bounds, size):
        seen = torch.zeros(documents.num_local_rows, bounds[-1], dtype=torch.int64)
        for piece in documents.pieces:
            part = seen[piece.start : piece.stop, piece.key_start : piece.key_stop]
            part += torch.ones_like(part).tril() if piece.is_causal else 1
            if piece.is_causal:
                own = documents.row_index[piece.start : piece.stop]
                assert torch.equal(own, rows[piece.key_start : piece.key_stop])
        own = documents.row_index
        visible = (rows <= own[:, None]) & (number == number[own][:, None])
        assert torch.equal(seen, visible.long())
        areas.append(int(seen.sum()))
    assert len(set(areas)) == 1, "every rank has the same share of the triangle"


def test_pieces_of_a_chunk_follow_each_other() -> None:
    """What merges them relies on it: groups of neighbours, the triangle first."""
    first, second = documents_of_ranks([0, 8, 12], 2)
    assert [tuple(piece) for piece in first.pieces] == [
        (0, 2, 0, 2, True),
        (2, 4, 6, 8, True),
        (2, 4, 0, 6, False),
        (4, 5, 8, 9, True),
        (5, 6, 11, 12, True),
        (5, 6, 8, 11, False),
    ]
    assert [tuple(chunk) for chunk in second.chunks] == [(0, 2, 4), (0, 4, 6), (1, 9, 10), (1, 10, 11)]


@pytest.mark.parametrize("size", [1, 2])
def test_positions_and_lengths_restart(size: int) -> None:
    for documents in documents_of_ranks([0, 4, 12, 16], size, lengths=[3, 8, 0]):
        assert documents.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
        assert documents.row_lengths.tolist() == [3] * 4 + [8] * 8 + [0] * 4
        local = documents.local_rows(torch.device("cpu"))
        assert torch.equal(local.rows, documents.row_index)
        assert torch.equal(local.positions, documents.positions[documents.row_index])
        assert torch.equal(local.lengths, documents.row_lengths[documents.row_index])
        assert documents.local_rows(torch.device("cpu")).positions is local.positions, "they are moved once"
    assert Documents([0, 4, 6]).lengths == (4, 2)


@pytest.mark.parametrize("size", [1, 2])
def test_neighbours_stay_inside_of_the_document(size: int) -> None:
    documents = documents_of_ranks([0, 4, 12], size)[0]
    assert documents.neighbours(-1).tolist() == [0, 0, 1, 2, 4, 4, 5, 6, 7, 8, 9, 10]
    assert documents.neighbours(2).tolist() == [2, 3, 3, 3, 6, 7, 8, 9, 10, 11, 11, 11]


def test_one_whole_document_is_told_from_the_rest() -> None:
    assert Documents([0, 5]).is_single
    assert not Documents([0, 2, 5]).is_single
    assert not documents_of_ranks([0, 8], 2)[0].is_single


def test_rows_are_taken_along_any_dimension() -> None:
    documents = documents_of_ranks([0, 4, 8], 2)[1]
    whole = torch.arange(24).view(3, 8)
    assert torch.equal(documents.take(whole, 1), whole[:, [1, 2, 5, 6]])


@pytest.mark.parametrize(
    ("bounds", "size", "lengths"),
    [
        ([1, 4], 1, None),
        ([0, 4, 4], 1, None),
        ([0, 4, 2], 1, None),
        ([0, 4, 10], 2, None),
        ([0, 4], 1, [2, 2]),
        ([0, 4], 1, [5]),
        ([0, 4], 1, [-1]),
    ],
    ids=["no start", "empty", "backwards", "not a multiple of 2c", "two lengths", "too long", "negative"],
)
def test_bounds_that_cannot_be_are_refused(bounds: list[int], size: int, lengths: list[int] | None) -> None:
    with pytest.raises(AssertionError):
        documents_of_ranks(bounds, size, lengths)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_joining_takes_rows_back_and_sums_gradients(size: int, rank_pool: RankPool) -> None:
    bounds = [0, 8, 24, 32]
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(32, 2, 3, generator=generator, dtype=torch.float64)
    weights = torch.randn(size, 32, 2, 3, generator=generator, dtype=torch.float64)
    found: list[dict[str, Any]] = rank_pool.run(
        "tests.unit.document_cases:join", world_size=size, bounds=bounds, whole=whole, weights=weights
    )
    for rank in found:
        assert torch.equal(rank["joined"], whole)
        # Four numbers near one, added in whatever order.
        assert (rank["gradient"] - weights.sum(0)[rank["rows"]]).abs().max() < 1e-14

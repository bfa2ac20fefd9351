"""Batches against a plain loop over documents, and the share of each data-parallel rank."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from mcore_spec.data.batch import Batch, DataParallelBatches, Document, make_batch
from mcore_spec.data.document import IntArray
from mcore_spec.data.packing import SampleStream
from mcore_spec.errors import ConfigError
from mcore_spec.parallel.documents import Documents

LENGTHS = (9, 2, 14, 1, 7, 12, 5, 3)


def documents(lengths: tuple[int, ...] = LENGTHS) -> list[Document]:
    """Tokens from 1, so that padding is told from them; masks that are mixed, all set, or empty."""
    random = np.random.default_rng(4)
    made = []
    for number, length in enumerate(lengths):
        mask = random.random(length) < (0.6, 1.0, 0.0)[number % 3]
        made.append(Document(random.integers(1, 100, length), mask))
    return made


def plain(made: list[Document], spans: list[int], num_steps: int) -> dict[str, Any]:
    """The tensors of a batch, row by row, from algorithms' own sentence."""
    rows: dict[str, Any] = {"token_ids": [], "step_token_ids": [], "counted": [], "labels": []}
    for step in range(num_steps):
        for name in ("step_token_ids", "counted", "labels"):
            rows[name].append([])
        for document, span in zip(made, spans, strict=True):
            x, m, n = document.token_ids.tolist(), document.mask.tolist(), len(document.token_ids)
            for t in range(span):
                rows["step_token_ids"][step].append(x[t + 1 + step] if t + 1 + step < n else 0)
                rows["labels"][step].append(x[t + 2 + step] if t + 2 + step < n else 0)
                rows["counted"][step].append(t + 2 + step < n and m[t + 1] and m[t + 2 + step])
    for document, span in zip(made, spans, strict=True):
        rows["token_ids"] += document.token_ids.tolist() + [0] * (span - len(document.token_ids))
    return rows


def assert_is(batch: Batch, made: list[Document], spans: list[int], *, num_steps: int) -> None:
    expected = plain(made, spans, num_steps)
    for name, dtype in (("token_ids", torch.int64), ("step_token_ids", torch.int64), ("labels", torch.int64)):
        assert getattr(batch, name).dtype == dtype
        assert getattr(batch, name).tolist() == expected[name], name
    assert batch.counted.dtype == torch.bool
    assert batch.counted.tolist() == expected["counted"]
    assert [stop - start for start, stop in pairwise(batch.bounds)] == spans
    assert batch.lengths == tuple(len(each.token_ids) for each in made)
    assert batch.num_tokens == sum(batch.lengths)
    Documents(batch.bounds, lengths=batch.lengths)  # accepts them


@pytest.mark.parametrize("num_steps", [1, 3, 20])
@pytest.mark.parametrize(
    ("document_multiple", "row_multiple", "pad_to", "spans"),
    [
        (1, 1, None, list(LENGTHS)),
        (1, 8, None, [*LENGTHS[:-1], 6]),  # 53 rows are made 56
        (4, 1, None, [12, 4, 16, 4, 8, 12, 8, 4]),
        (4, 6, None, [12, 4, 16, 4, 8, 12, 8, 8]),  # 68 rows are made 72, a multiple of 4 and 6
        (2, 1, 14, [14] * 8),
        (4, 3, 16, [16] * 7 + [20]),  # 128 rows are made 132, a multiple of 12
    ],
)
def test_shifts_stay_inside_of_documents(
    num_steps: int, document_multiple: int, row_multiple: int, pad_to: int | None, spans: list[int]
) -> None:
    made = documents()
    batch = make_batch(
        made,
        num_steps=num_steps,
        document_multiple=document_multiple,
        row_multiple=row_multiple,
        num_samples=3,
        pad_to=pad_to,
    )
    assert_is(batch, made, spans, num_steps=num_steps)
    assert batch.num_samples == 3
    assert num_steps == 20 or int(batch.counted.sum()) > 0


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_smallest_documents(length: int) -> None:
    made = documents((length,))
    assert_is(make_batch(made, num_steps=3, num_samples=1), made, [length], num_steps=3)


def test_the_first_answer_token_is_read_by_a_row_that_counts() -> None:
    # Two tokens of the prompt, then three of the answer: the last row of the prompt drafts.
    batch = make_batch(
        [Document(np.array([11, 12, 21, 22, 23]), np.array([False, False, True, True, True]))],
        num_steps=2,
        num_samples=1,
    )
    assert batch.step_token_ids.tolist() == [[12, 21, 22, 23, 0], [21, 22, 23, 0, 0]]
    assert batch.labels.tolist() == [[21, 22, 23, 0, 0], [22, 23, 0, 0, 0]]
    assert batch.counted.tolist() == [[False, True, True, False, False], [False, True, False, False, False]]


def test_a_batch_moves_whole() -> None:
    mixing = [np.random.RandomState(number) for number in range(len(LENGTHS))]
    batch = make_batch(documents(), num_steps=2, num_samples=5, mixing=mixing)
    moved = batch.to(torch.device("meta"))
    for name in ("token_ids", "step_token_ids", "counted", "labels", "replaced"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(batch, name).shape
    assert (moved.bounds, moved.lengths, moved.num_samples, moved.num_tokens) == (batch.bounds, LENGTHS, 5, 53)


def test_as_many_rows_are_mixed_as_modelopt_mixes() -> None:
    mixing = [np.random.RandomState(number) for number in range(len(LENGTHS))]
    batch = make_batch(documents(), num_steps=4, document_multiple=4, num_samples=1, mixing=mixing)
    assert batch.replaced is not None
    assert batch.replaced.shape == (3, batch.bounds[-1])
    for start, stop, length in zip(batch.bounds, batch.bounds[1:], LENGTHS, strict=False):
        rows = batch.replaced[:, start:stop]
        # Of a single token there is no row before; of two, one row has one.
        wanted = [0] * 3 if length == 1 else [max(1, length // divisor) for divisor in (2, 3, 5)]
        assert rows.sum(1).tolist() == wanted
        assert not rows[:, 0].any(), "the first row has none before it"
        assert not rows[:, length:].any(), "padding is not among them"
    assert make_batch(documents(), num_steps=4, num_samples=1).replaced is None


def test_mixed_rows_are_drawn_evenly_and_anew_at_each_step() -> None:
    made = [Document(np.ones(9, np.int64), np.ones(9, np.bool_))]
    drawn = np.zeros((2, 9))
    num_alike = 0
    for number in range(4000):
        batch = make_batch(made, num_steps=3, num_samples=1, mixing=[np.random.RandomState(number)])
        assert batch.replaced is not None
        drawn += batch.replaced.numpy()
        num_alike += int((batch.replaced[0] & batch.replaced[1]).sum())
    # 4 of 8 rows and 3 of 8: five standard deviations of 4,000 draws are 0.04.
    assert np.abs(drawn[:, 1:] / 4000 - [[4 / 8], [3 / 8]]).max() < 0.04
    assert abs(num_alike / 4000 - 8 * (4 / 8) * (3 / 8)) < 0.1


@pytest.mark.parametrize(
    ("lengths", "options", "said"),
    [
        ((), {}, r"documents of \[\] tokens; a batch needs at least one"),
        ((3, 0), {}, r"documents of \[3, 0\] tokens; a batch needs at least one, and each needs tokens"),
        ((3, 5), {"pad_to": 4}, r"pad_to = 4 for documents of up to 5 tokens; it must be a multiple of 1 and no less"),
        ((3, 5), {"pad_to": 6, "document_multiple": 4}, r"pad_to = 6 .* it must be a multiple of 4"),
    ],
)
def test_batches_that_cannot_be(lengths: tuple[int, ...], options: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_batch(documents(lengths), num_steps=1, num_samples=1, **options)


class Memory:
    """Documents in memory; the first token of each is its number."""

    def __init__(self, count: int, *, longest: int) -> None:
        random = np.random.default_rng(8)
        self.lengths: IntArray = random.integers(1, longest + 1, count)
        self.documents = [Document(np.full(n, number), np.ones(n, np.bool_)) for number, n in enumerate(self.lengths)]

    def document(self, index: int) -> Document:
        return self.documents[index]


def stream(**options: Any) -> SampleStream:
    return SampleStream(Memory(90, longest=16), np.arange(90), **{"seq_length": 32, "seed": 2, **options})


def share(
    samples: SampleStream,
    *,
    rank: int = 0,
    size: int = 1,
    micro: int = 2,
    whole: int = 8,
    mixing_seed: int | None = None,
) -> DataParallelBatches:
    return DataParallelBatches(
        samples,
        global_batch_size=whole,
        micro_batch_size=micro,
        data_rank=rank,
        data_size=size,
        num_steps=2,
        mixing_seed=mixing_seed,
    )


def numbers(batch: Batch) -> tuple[int, ...]:
    """The documents in a batch."""
    return tuple(int(batch.token_ids[start]) for start in batch.bounds[:-1])


@pytest.mark.parametrize("packing", [True, False])
def test_batches_do_not_depend_on_the_number_of_ranks(*, packing: bool) -> None:
    samples = stream(packing=packing)
    num_batches = 2 * samples.samples_per_epoch(0) // 8 + 1  # across the end of an epoch
    for index in range(num_batches):
        expected = [samples.sample(index * 8 + each) for each in range(8)]
        for size in (1, 2, 4):
            shares = [
                list(share(stream(packing=packing), rank=rank, size=size).micro_batches(index)) for rank in range(size)
            ]
            in_turn = [batch for turn in zip(*shares, strict=True) for batch in turn]
            assert len(in_turn) == 4
            assert {batch.num_samples for batch in in_turn} == {2}
            pairs = [expected[each] + expected[each + 1] for each in (0, 2, 4, 6)]
            assert [numbers(batch) for batch in in_turn] == pairs
            if not packing:
                assert {batch.bounds for batch in in_turn} == {(0, 32, 64)}


def mixed_rows(samples: SampleStream, **options: Any) -> list[list[bool]]:
    """Of every document of global batches 0, 1 and 2 in the stream's order, padding left out."""
    shares = [share(samples, rank=rank, **options) for rank in range(options.get("size", 1))]
    found = []
    for index in range(3):
        for turn in zip(*(each.micro_batches(index) for each in shares), strict=True):
            for batch in turn:
                assert batch.replaced is not None
                for start, length in zip(batch.bounds, batch.lengths, strict=False):
                    found.append(batch.replaced[0, start : start + length].tolist())
    return found


def test_mixed_rows_depend_on_seed_and_sample_alone() -> None:
    expected = mixed_rows(stream(), mixing_seed=3)
    assert mixed_rows(stream(), mixing_seed=3, micro=4) == expected
    assert mixed_rows(stream(), mixing_seed=3, micro=1, size=4) == expected
    assert mixed_rows(stream(), mixing_seed=4) != expected
    # A document that comes again in the next epoch is mixed in another way.
    again = SampleStream(Memory(1, longest=16), np.arange(1), seq_length=16, seed=2)
    assert len({tuple(rows) for rows in mixed_rows(again, mixing_seed=3)}) > 1
    assert next(share(stream()).micro_batches(0)).replaced is None


def test_a_rank_takes_the_micro_batches_of_its_number() -> None:
    samples = stream()
    found = [numbers(batch) for batch in share(samples, rank=1, size=2).micro_batches(3)]
    assert found == [samples.sample(26) + samples.sample(27), samples.sample(30) + samples.sample(31)]


def test_a_run_goes_on_where_it_stopped() -> None:
    whole = share(stream())
    expected = [[numbers(batch) for batch in whole.micro_batches(index)] for index in range(12)]
    for start in (1, 5, 11):
        resumed = share(stream())
        found = [[numbers(batch) for batch in resumed.micro_batches(index)] for index in range(start, 12)]
        assert found == expected[start:]


def test_the_last_batch_may_be_short() -> None:
    samples = stream(num_epochs=1, packing=False)
    assert samples.num_samples == 90
    assert share(stream()).num_batches is None
    shares = [share(samples, rank=rank, size=2, micro=4, whole=16) for rank in range(2)]
    assert shares[0].num_batches == 6
    # Samples 80 to 89: four and two for rank 0, four for rank 1.
    last = [[batch.num_samples for batch in each.micro_batches(5)] for each in shares]
    assert last == [[4, 2], [4]]
    seen = [
        number
        for each in shares
        for index in range(6)
        for batch in each.micro_batches(index)
        for number in numbers(batch)
    ]
    assert sorted(seen) == list(range(90))
    assert list(shares[0].micro_batches(6)) == []


def test_documents_and_rows_are_padded_to_the_layout() -> None:
    batches = DataParallelBatches(
        stream(document_multiple=4),
        global_batch_size=4,
        micro_batch_size=2,
        data_rank=0,
        data_size=2,
        num_steps=3,
        row_multiple=6,
    )
    for index in range(5):
        (batch,) = batches.micro_batches(index)
        spans = [stop - start for start, stop in pairwise(batch.bounds)]
        assert all(span % 4 == 0 for span in spans)
        assert batch.bounds[-1] % 12 == 0
        assert all(span - length < 4 for span, length in zip(spans[:-1], batch.lengths[:-1], strict=True))
        assert spans[-1] - batch.lengths[-1] < 12
        assert batch.step_token_ids.shape == (3, batch.bounds[-1])


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(ConfigError) as caught:
        share(stream(), size=3)
    assert str(caught.value) == (
        "global_batch_size = 8 is not divisible by micro_batch_size = 2 x 3 data-parallel ranks; give a multiple of 6"
    )

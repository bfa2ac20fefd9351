"""Splits, bins and the order of samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mcore_spec.data.document import Document, IntArray
from mcore_spec.data.packing import SampleStream, pack, split_documents
from mcore_spec.errors import ConfigError


class Lengths:
    """A `DocumentSource` of which only the lengths matter."""

    def __init__(self, lengths: list[int] | IntArray) -> None:
        self.lengths = np.array(lengths, dtype=np.int64)

    def document(self, index: int) -> Document:
        raise AssertionError("nobody reads documents here")


def some_lengths(count: int, *, longest: int, seed: int = 0) -> IntArray:
    return np.minimum(np.random.default_rng(seed).lognormal(3.0, 0.8, count).astype(np.int64) + 1, longest)


def stream(count: int = 200, **options: Any) -> SampleStream:
    settings: dict[str, Any] = {"seq_length": 64, "seed": 5} | options
    source = Lengths(some_lengths(count, longest=settings["seq_length"]))
    return SampleStream(source, np.arange(count), **settings)


def epoch_of(samples: SampleStream, epoch: int) -> list[tuple[int, ...]]:
    first = sum(samples.samples_per_epoch(each) for each in range(epoch))
    return [samples.sample(first + index) for index in range(samples.samples_per_epoch(epoch))]


# weights, documents, sizes
SPLITS = [
    ((98, 2, 0), 100, (98, 2, 0)),
    ((98, 2, 0), 10, (9, 1, 0)),
    ((98, 2, 0), 2, (1, 1, 0)),
    ((1, 1, 1), 10, (4, 3, 3)),
    ((52, 48, 0), 10, (5, 5, 0)),
    ((1, 0, 0), 7, (7, 0, 0)),
    ((0, 0, 1), 7, (0, 0, 7)),
    ((1000, 1, 1), 3, (1, 1, 1)),
    ((1, 1000, 1), 50, (1, 48, 1)),
    ((0, 1, 999), 2, (0, 1, 1)),
]


@pytest.mark.parametrize(("weights", "count", "sizes"), SPLITS)
def test_a_split_is_disjoint_and_covers_all(
    weights: tuple[int, int, int], count: int, sizes: tuple[int, int, int]
) -> None:
    split = split_documents(count, weights=weights, seed=3)
    assert tuple(len(part) for part in split) == sizes
    assert sorted(np.concatenate(split).tolist()) == list(range(count))
    assert all(part.tolist() == sorted(part.tolist()) and part.dtype == np.int64 for part in split)


def test_a_split_depends_on_the_seed_only() -> None:
    assert [part.tolist() for part in split_documents(8, weights=(4, 2, 2), seed=1)] == FROZEN_SPLIT
    different = {tuple(split_documents(100, weights=(1, 1, 0), seed=seed).train.tolist()) for seed in range(10)}
    assert len(different) == 10
    large = split_documents(100, weights=(1, 1, 0), seed=1 + (1 << 40)).train
    assert large.tolist() != split_documents(100, weights=(1, 1, 0), seed=1).train.tolist()


# Written down once: a run that is resumed under another numpy must find the same documents.
FROZEN_SPLIT = [[1, 2, 5, 6], [0, 4], [3, 7]]
FROZEN_EPOCHS = [[(5,), (0,), (1, 4, 2), (3,)], [(4, 2, 1), (5,), (0,), (3,)]]


@pytest.mark.parametrize(
    ("weights", "count", "said"),
    [
        ((98, 2, 1), 2, r"split = 98,2,1 shares documents out to 3 uses, but there are 2; give more data, or a weight"),
        ((0, 0, 0), 2, r"split = 0,0,0; it must be three numbers such as 98,2,0, not negative and not all 0"),
        ((1, -1, 0), 2, r"split = 1,-1,0; it must be"),
        ((1, 1), 2, r"split = 1,1; it must be three numbers"),
    ],
)
def test_a_split_that_cannot_be(weights: tuple[int, ...], count: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        split_documents(count, weights=weights, seed=1)


def best_fit(spans: list[int], capacity: int, num_open: int) -> list[list[int]]:
    """The rule of `pack`, written plainly."""
    bins: list[list[int]] = []
    is_open: list[bool] = []

    def room(number: int) -> int:
        return capacity - sum(spans[position] for position in bins[number])

    for position, span in enumerate(spans):
        fitting = [number for number in range(len(bins)) if is_open[number] and room(number) >= span]
        if not fitting:
            opened = [number for number in range(len(bins)) if is_open[number]]
            if len(opened) == num_open:
                is_open[min(opened, key=lambda number: (room(number), number))] = False
            bins.append([])
            is_open.append(True)
            fitting = [len(bins) - 1]
        number = min(fitting, key=lambda number: (room(number), number))
        bins[number].append(position)
        is_open[number] = room(number) > 0
    return bins


@pytest.mark.parametrize("num_open", [1, 2, 5, 64])
@pytest.mark.parametrize("capacity", [40, 100, 1000])
def test_bins_are_filled_by_the_rule(num_open: int, capacity: int) -> None:
    for seed in range(3):
        spans = some_lengths(150, longest=capacity, seed=seed)
        bins = pack(spans, capacity=capacity, num_open=num_open)
        found = [bins.bin(number).tolist() for number in range(bins.num_bins)]
        assert found == best_fit(spans.tolist(), capacity, num_open)
        assert max(spans[content].sum() for content in found) <= capacity


def test_bins_are_well_filled() -> None:
    spans = some_lengths(5000, longest=128, seed=1)
    assert spans.sum() / pack(spans, capacity=128, num_open=1).num_bins / 128 < 0.87
    assert spans.sum() / pack(spans, capacity=128).num_bins / 128 > 0.99


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_has_each_document_once(*, packing: bool) -> None:
    source = Lengths(some_lengths(300, longest=64))
    indices = np.arange(1, 300, 2)
    samples = SampleStream(source, indices, seq_length=64, seed=5, packing=packing)
    orders = []
    for epoch in range(3):
        bins = epoch_of(samples, epoch)
        orders.append([number for content in bins for number in content])
        assert sorted(orders[-1]) == indices.tolist()
        assert all(source.lengths[list(content)].sum() <= 64 for content in bins)
        if packing:
            assert len(bins) < 0.8 * len(indices)
        else:
            assert {len(content) for content in bins} == {1}
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    first = [stream().sample(index) for index in range(5)]
    assert first == [stream(seed=5).sample(index) for index in range(5)]
    assert first != [stream(seed=6).sample(index) for index in range(5)]
    small = SampleStream(Lengths([30, 20, 10, 25, 15, 40]), np.arange(6), seq_length=48, seed=1)
    assert [epoch_of(small, epoch) for epoch in range(2)] == FROZEN_EPOCHS


def test_a_sample_does_not_depend_on_what_was_asked_before() -> None:
    source = Lengths(np.random.RandomState(0).randint(1, 41, 60))

    def fresh() -> SampleStream:
        return SampleStream(source, np.arange(60), seq_length=40, seed=5)

    sizes = [fresh().samples_per_epoch(epoch) for epoch in range(4)]
    assert sizes == [33, 33, 31, 33]  # with packing epochs differ in length
    count, forward, backward = sum(sizes), fresh(), fresh()
    expected = [forward.sample(index) for index in range(count)]
    assert [backward.sample(index) for index in reversed(range(count))] == expected[::-1]
    for start in (1, 32, 33, 66, 98, count - 1):
        resumed = fresh()
        assert [resumed.sample(index) for index in range(start, count)] == expected[start:]


def test_poorly_filled_bins_are_spread_over_the_epoch() -> None:
    samples = stream(2000)
    rows = np.array([samples.source.lengths[list(content)].sum() for content in epoch_of(samples, 0)])
    worst = np.argsort(rows)[:10]
    assert worst.min() < len(rows) / 2 < worst.max()


def test_a_sample_is_the_same_in_every_layout() -> None:
    padded = SampleStream(Lengths([5, 5, 5, 5]), np.arange(4), seq_length=16, seed=0, document_multiple=8)
    plain = SampleStream(Lengths([5, 5, 5, 5]), np.arange(4), seq_length=16, seed=0)
    assert sorted(len(content) for content in epoch_of(plain, 0)) == [1, 3]
    assert epoch_of(padded, 0) == epoch_of(plain, 0)


def test_a_stream_that_ends() -> None:
    endless, ending = stream(), stream(num_epochs=2)
    assert endless.num_samples is None
    count = endless.samples_per_epoch(0) + endless.samples_per_epoch(1)
    assert ending.num_samples == count
    assert [ending.sample(index) for index in range(count)] == [endless.sample(index) for index in range(count)]
    for index in (count, count + 1000, -1):
        with pytest.raises(IndexError, match=f"sample {index} of {count}"):
            ending.sample(index)
    with pytest.raises(IndexError):
        endless.sample(-1)


def test_streams_that_cannot_be() -> None:
    source = Lengths([4, 9])
    with pytest.raises(ConfigError, match=r"seq_length = 8, but there are documents of 9 tokens; build the"):
        SampleStream(source, np.arange(2), seq_length=8, seed=0)
    assert SampleStream(source, np.arange(1), seq_length=8, seed=0).samples_per_epoch(0) == 1
    with pytest.raises(ConfigError, match=r"seq_length = 10 must be a multiple of 4 \(twice context.*; give 12"):
        SampleStream(source, np.arange(2), seq_length=10, seed=0, document_multiple=4)
    with pytest.raises(ConfigError, match=r"split leaves no documents here; give the use a weight, or more data"):
        SampleStream(source, np.arange(0), seq_length=16, seed=0)

"""Noise on features: the numbers themselves, what they depend on, and how batches carry their keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mcore_spec.config import EagleConfig, eagle_preset
from mcore_spec.data.batch import DataParallelBatches, make_batch
from mcore_spec.data.noise import draw_noise_key, uniform_noise
from mcore_spec.data.packing import SampleStream
from mcore_spec.data.seeds import RandomUse, random_state
from mcore_spec.errors import ConfigError
from tests.parallel.trainer_cases import Corpus

MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """The output function for a state, in whole numbers without bounds."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def expected(key: int, position: int, channel: int) -> float:
    step = 0x9E3779B97F4A7C15
    row = splitmix64((key + (position + 1) * step) & MASK)
    return (splitmix64((row + (channel + 1) * step) & MASK) >> 40) / 2**23 - 1


def test_the_numbers_are_splitmix64s() -> None:
    # The generator's published first outputs for the seed 1234567.
    states = [(1234567 + n * 0x9E3779B97F4A7C15) & MASK for n in (1, 2)]
    assert [splitmix64(state) for state in states] == [6457827717110365317, 3203168211198807973]
    keys = torch.tensor([5, 5, 2**62 + 3, 7])
    positions = torch.tensor([0, 1, 1000, 0])
    noise = uniform_noise(keys, positions, 6)
    wanted = [[expected(int(k), int(p), c) for c in range(6)] for k, p in zip(keys, positions, strict=True)]
    assert noise.dtype == torch.float32
    assert noise.tolist() == wanted


def test_they_are_uniform_and_independent() -> None:
    noise = uniform_noise(torch.full((512,), 3), torch.arange(512), 256).double()
    assert noise.min() >= -1
    assert noise.max() < 1
    num = noise.numel()
    assert abs(float(noise.mean())) < 5 * (1 / 3 / num) ** 0.5
    assert float(noise.square().mean()) == pytest.approx(1 / 3, rel=0.01)
    # Neighbours in both directions, and another document.
    other = uniform_noise(torch.full((512,), 4), torch.arange(512), 256).double()
    for first, second in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise, other)):
        assert abs(float((first * second).mean())) < 5 / 3 / first.numel() ** 0.5


def test_batches_carry_one_key_a_document_in_any_layout() -> None:
    corpus = Corpus((5, 9, 3, 8, 4, 7))

    def keys(*, micro: int, size: int, seed: int | None) -> dict[int, list[int]]:
        stream = SampleStream(corpus, np.arange(6), seq_length=12, seed=1, num_epochs=None)
        found: dict[int, list[int]] = {}
        for rank in range(size):
            batches = DataParallelBatches(
                stream,
                global_batch_size=4,
                micro_batch_size=micro,
                data_rank=rank,
                data_size=size,
                num_steps=2,
                noise_seed=seed,
            )
            for number, batch in enumerate(batches.micro_batches(0)):
                assert (batch.noise_keys is None) == (seed is None)
                if batch.noise_keys is not None:
                    assert batch.noise_keys.shape == batch.token_ids.shape
                    starts = torch.tensor(batch.bounds[:-1])
                    found[number * size + rank] = batch.noise_keys[starts].tolist()
        return found

    whole = [key for _, each in sorted(keys(micro=4, size=1, seed=3).items()) for key in each]
    assert len(set(whole)) == len(whole) > 4
    assert [key for _, each in sorted(keys(micro=1, size=2, seed=3).items()) for key in each] == whole
    assert [key for _, each in sorted(keys(micro=1, size=1, seed=4).items()) for key in each] != whole
    assert keys(micro=2, size=1, seed=None) == {}
    assert draw_noise_key(random_state(3, RandomUse.NOISE, 0, 0)) == whole[0]


def test_padding_rows_have_the_key_of_their_document() -> None:
    corpus = Corpus((3, 2))
    batch = make_batch(
        [corpus.document(0), corpus.document(1)], num_steps=1, document_multiple=4, num_samples=1, noise_keys=[8, 9]
    )
    assert batch.noise_keys is not None
    assert batch.noise_keys.tolist() == [8] * 4 + [9] * 4


@pytest.mark.parametrize("member", ["eagle3", "eagle-mtp"])
def test_noise_is_refused_where_it_would_be_ignored(member: str) -> None:
    config = eagle_preset(member)["config"]  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"eagle_feature_noise = 0.1 is for eagle1, and this draft is {member}"):
        EagleConfig.parse({**config, "eagle_feature_noise": 0.1})

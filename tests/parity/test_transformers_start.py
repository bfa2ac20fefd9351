"""A draft's start from data on a transformers model: the weights that the Megatron host solves from the same data."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mcore_spec import fit_start
from mcore_spec.bases.transformers import TransformersBase
from tests.parity.hf_models import TinyModel
from tests.parity.host_cases import HostCase
from tests.parity.test_transformers_host import MODES, documents, drafted, packed, padded
from tests.pool import RankPool
from tests.tiny import draft_to_target

FITTED = ("eagle3", "eagle3, reduced vocabulary", "eagle1", "eagle-mtp")
SEED = 7
# Solutions of nearly singular systems: what two hosts round differently is multiplied by the condition.
TOLERANCE = 1e-10


@pytest.mark.parametrize("family", ["llama31", "phi3", "qwen3"])
def test_the_start_is_the_megatron_hosts(family: str, tiny_models: dict[str, TinyModel], rank_pool: RankPool) -> None:
    tiny = tiny_models[family]
    learned = documents(tiny.model.config.vocab_size)
    cases = {
        name: HostCase(tiny.directory, MODES[name], draft_to_target() if "reduced" in name else None, {}, learned)
        for name in FITTED
    }
    (starts,) = rank_pool.run("tests.parity.host_cases:megatron_starts", world_size=1, cases=cases, seed=SEED)
    for name in FITTED:
        for form in (padded, packed):
            model = drafted(tiny, cases[name].mode, cases[name].d2t)
            draft: Any = TransformersBase(model).draft()
            before = {key: value.clone() for key, value in draft.state_dict().items()}
            start = fit_start(model, [form(learned)], seed=SEED)
            assert start is not None and start.num_rows > 10
            assert start.rates == pytest.approx(starts[name].rates, rel=1e-9)
            assert any(not torch.equal(before[key], value) for key, value in draft.state_dict().items())
            for key, value in starts[name].weights.items():
                found = draft.state_dict()[key]
                largest = max(1.0, float(value.abs().max()))
                assert float((found - value).abs().max()) <= TOLERANCE * largest, (name, form.__name__, key)

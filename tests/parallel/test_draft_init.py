"""What a draft starts as: near log(vocabulary) from random weights, or as the base without some layers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mcore_spec.parallel.layout import Layout
from tests.pool import RankPool
from tests.tiny import VOCAB_SIZE, write_hf_model

CASE = "tests.parallel.init_cases:started"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("base"), "llama", tied=False)


@pytest.mark.parametrize("draft_init", ["random", "base"])
def test_the_layout_does_not_change_the_start(draft_init: str, rank_pool: RankPool, directory: Path) -> None:
    (one,) = rank_pool.run(CASE, world_size=1, layout=Layout(), directory=directory, draft_init=draft_init)
    for layout in (Layout(tensor=2), Layout(pipeline=2)):
        results = rank_pool.run(CASE, world_size=2, layout=layout, directory=directory, draft_init=draft_init)
        found = [result for result in results if result is not None]
        assert found
        for result in found:
            assert result["weights"].keys() == one["weights"].keys()
            assert all(torch.equal(result["weights"][name], tensor) for name, tensor in one["weights"].items())


def test_a_warm_start_is_the_base_without_the_layers_between(rank_pool: RankPool, directory: Path) -> None:
    """With the last aux layer right before the base's last layer there is none between: the draft is the base."""
    (result,) = rank_pool.run(CASE, world_size=1, layout=Layout(), directory=directory, draft_init="base")
    torch.testing.assert_close(result["draft"], result["base"], rtol=1e-12, atol=1e-13)


def test_a_random_start_knows_nothing_and_says_so(rank_pool: RankPool, directory: Path) -> None:
    (result,) = rank_pool.run(CASE, world_size=1, layout=Layout(), directory=directory, draft_init="random")
    entropy = -result["logits"][..., :VOCAB_SIZE].log_softmax(-1).mean()
    # Logits of standard deviation one (a power of two near it) add half a nat.
    assert math.log(VOCAB_SIZE) < float(entropy) < math.log(VOCAB_SIZE) + 1.0


def test_a_draft_starts_as_the_base_where_it_can(rank_pool: RankPool, directory: Path) -> None:
    (found,) = rank_pool.run("tests.parallel.init_cases:chosen", world_size=1, directory=directory)
    refusal = found.pop("refusal")
    assert [name for name, is_chosen in found.items() if is_chosen] == ["the base's sizes", "two layers"]
    assert len(found) == 6
    assert "draft_init = base: mlp.gate_proj.weight of the draft is [48, 16], of the base's layer [24, 16]" in refusal


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_biases_and_norms_of_heads_are_no_part_of_a_draft(family: str, rank_pool: RankPool, tmp_path: Path) -> None:
    base = write_hf_model(tmp_path / family, family, tied=False)
    assert rank_pool.run("tests.parallel.init_cases:chosen_for", world_size=1, directory=base) == [False]

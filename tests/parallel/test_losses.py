"""The fused loss with a sharded vocabulary equals the reference in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mcore_spec.losses.reference import distillation_loss_reference
from tests.parallel.loss_cases import NUM_ROWS, NUM_STEPS, evaluate, make_case
from tests.pool import RankPool
from tests.unit.test_losses import KINDS, assert_same

pytestmark = pytest.mark.parallel
CASES = "tests.parallel.loss_cases"


def assert_ranks_agree(rank_pool: RankPool, *, world_size: int, **options: Any) -> None:
    own = ("sequence_parallel", "teacher_multiple", "max_logits")
    case = make_case(**{name: value for name, value in options.items() if name not in own})
    expected = evaluate(case, distillation_loss_reference)
    for share in rank_pool.run(f"{CASES}:sharded_loss", world_size=world_size, **options):
        assert_same(share.result, expected)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("max_logits", [None, 3 * 52])
def test_two_ranks_equal_one(name: str, max_logits: int | None, rank_pool: RankPool) -> None:
    """103 and 61 entries: the last rank's slice of either is padded."""
    assert_ranks_agree(rank_pool, world_size=2, max_logits=max_logits, **KINDS[name])


@pytest.mark.parametrize("name", ["shared head", "reduced"])
def test_sequence_parallel_rows(name: str, rank_pool: RankPool) -> None:
    """The terms of a row's gradient are summed by the region that the caller entered, and nowhere else."""
    assert_ranks_agree(rank_pool, world_size=2, sequence_parallel=True, **KINDS[name])


def test_heads_that_are_padded_differently(rank_pool: RankPool) -> None:
    assert_ranks_agree(rank_pool, world_size=2, own_head=True, teacher_multiple=64)


@pytest.mark.parametrize("name", KINDS)
def test_a_rank_with_padding_only(name: str, rank_pool: RankPool) -> None:
    """9 and 5 entries on 4 ranks: 3, 3, 3, 0 and 2, 2, 1, 0."""
    assert_ranks_agree(rank_pool, world_size=4, vocab_size=9, draft_size=5, **KINDS[name])


def test_the_teachers_rows_are_asked_for(rank_pool: RankPool) -> None:
    for reduced, padded_otherwise, same in rank_pool.run(f"{CASES}:errors_without_teacher_rows", world_size=2):
        assert "teacher_rows = None on 2 ranks" in reduced
        assert "teacher_rows = None on 2 ranks" in padded_otherwise
        assert same == ""


def test_ties_between_ranks_go_to_the_lowest_id(rank_pool: RankPool) -> None:
    assert_ranks_agree(rank_pool, world_size=2, reduced=True, ties=True)


@pytest.mark.parametrize("name", ["own head", "reduced"])
def test_logits_stay_on_their_rank(name: str, rank_pool: RankPool) -> None:
    for share in rank_pool.run(f"{CASES}:sharded_loss", world_size=2, **KINDS[name]):
        vectors = [shape for shape in share.reduced_shapes if len(shape) == 1]
        matrices = [shape for shape in share.reduced_shapes if len(shape) != 1]
        assert vectors and all(shape[0] <= NUM_ROWS * NUM_STEPS for shape in vectors)
        assert matrices == [(NUM_STEPS, NUM_ROWS)], "the argmax of every row"
        assert not share.result.output.loss.isnan()
        assert torch.is_tensor(share.result.gradients.head)

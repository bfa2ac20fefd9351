"""The rank pool: results by rank, failures with their rank, and a working pool afterwards."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.pool import MAX_WORLD_SIZE, RankError, RankPool

HERE = "tests.unit.test_pool"
pytestmark = pytest.mark.parallel


# --- what the ranks run ---------------------------------------------------------------------------


def sum_over_ranks(values: torch.Tensor) -> dict[str, object]:
    """Each rank weighs `values` by rank + 1; all see the sum."""
    mine = values * (dist.get_rank() + 1)
    dist.all_reduce(mine)
    return {"rank": dist.get_rank(), "sum": mine, "pid": os.getpid(), "threads": torch.get_num_threads()}


def tensor_parallel_rank() -> tuple[int, int]:
    """megatron-core's groups at TP = world size; left initialised, for the pool to clean up."""
    from megatron.core import parallel_state

    assert not parallel_state.is_initialized()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_world_size()


def fail_on(rank: int) -> None:
    """One rank raises; the others wait for it in a collective."""
    if dist.get_rank() == rank:
        raise ValueError(f"seven is wrong on rank {rank}")
    dist.all_reduce(torch.zeros(1))


def die_on(rank: int) -> None:
    """One process ends without a word."""
    if dist.get_rank() == rank:
        os._exit(7)
    dist.all_reduce(torch.zeros(1))


def sleep_on(rank: int) -> None:
    """One rank never comes back in time."""
    if dist.get_rank() == rank:
        time.sleep(60)


# --- the tests ------------------------------------------------------------------------------------


def test_results_come_by_rank_and_workers_stay(rank_pool: RankPool) -> None:
    values = torch.tensor([1.0, 10.0], dtype=torch.float64)
    first = rank_pool.run(f"{HERE}:sum_over_ranks", world_size=2, values=values)
    assert [reply["rank"] for reply in first] == [0, 1]
    assert [reply["threads"] for reply in first] == [1, 1]
    for reply in first:
        assert reply["sum"].dtype == torch.float64
        assert reply["sum"].tolist() == [3.0, 30.0]
    again = rank_pool.run(f"{HERE}:sum_over_ranks", world_size=1, values=values)
    assert [reply["sum"].tolist() for reply in again] == [[1.0, 10.0]]
    assert again[0]["pid"] == first[0]["pid"] == rank_pool.process_ids[0]
    assert os.getpid() not in {reply["pid"] for reply in first}


def test_megatron_groups_are_gone_after_a_job(rank_pool: RankPool) -> None:
    assert rank_pool.run(f"{HERE}:tensor_parallel_rank", world_size=2) == [(0, 1), (1, 1)]
    assert rank_pool.run(f"{HERE}:tensor_parallel_rank", world_size=1) == [(0, 1)]


def test_a_failure_names_its_rank_and_the_pool_recovers(rank_pool: RankPool) -> None:
    with pytest.raises(RankError, match="rank 1 of 2 failed in .*:fail_on") as caught:
        rank_pool.run(f"{HERE}:fail_on", world_size=2, rank=1)
    assert caught.value.rank == 1
    assert "ValueError: seven is wrong on rank 1" in caught.value.detail
    assert "in fail_on" in caught.value.detail  # its own traceback
    assert not {0, 1} & set(rank_pool.process_ids)

    with pytest.raises(RankError, match="exit code 7") as caught:
        rank_pool.run(f"{HERE}:die_on", world_size=2, rank=1)
    assert caught.value.rank == 1

    replies = rank_pool.run(f"{HERE}:sum_over_ranks", world_size=2, values=torch.ones(1))
    assert [reply["sum"].item() for reply in replies] == [3.0, 3.0]
    assert [reply["pid"] for reply in replies] == [rank_pool.process_ids[rank] for rank in (0, 1)]


def test_a_hanging_rank_is_ended(rank_pool: RankPool) -> None:
    rank_pool.run(f"{HERE}:sum_over_ranks", world_size=1, values=torch.ones(1))  # worker 0 is warm
    process_id = rank_pool.process_ids[0]
    assert process_id is not None
    start = time.monotonic()
    with pytest.raises(RankError, match="no result after 1 s from rank.s. .0."):
        rank_pool.run(f"{HERE}:sleep_on", world_size=1, rank=0, timeout=1.0)
    assert time.monotonic() - start < 15
    assert 0 not in rank_pool.process_ids
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)


def test_a_wrong_world_size_is_refused(rank_pool: RankPool) -> None:
    too_many = MAX_WORLD_SIZE + 1
    with pytest.raises(ValueError, match=f"world_size = {too_many}; the pool has 1 to {MAX_WORLD_SIZE} ranks"):
        rank_pool.run(f"{HERE}:sum_over_ranks", world_size=too_many, values=torch.ones(1))


def test_workers_start_when_a_job_needs_them(rank_pool: RankPool) -> None:
    before = set(rank_pool.process_ids)
    rank_pool.run(f"{HERE}:sum_over_ranks", world_size=2, values=torch.ones(1))
    assert set(rank_pool.process_ids) == before | {0, 1}
    with RankPool() as unused:
        assert unused.process_ids == {}

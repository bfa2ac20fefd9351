"""Training on hidden states that other ranks compute meanwhile: the same gradients as beside the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mcore_spec.parallel.layout import Layout
from tests.parallel.checks import check_same_steps
from tests.parallel.stream_cases import free_port
from tests.pool import RankPool
from tests.tiny import write_hf_model

# Ranks that train, and those that run the base.
SIDES = {
    "1+2": (Layout(), 1, 2),
    "TP2+SP+1": (Layout(tensor=2, sequence_parallel=True), 2, 1),
    "CP2+1": (Layout(context=2), 2, 1),
    "DP2+1": (Layout(), 2, 1),
    "PP2+1": (Layout(pipeline=2), 2, 1),
    "TP2 DP2+3": (Layout(tensor=2), 4, 3),
}
# Packed, with states mixed, padded, and more micro-batches than are asked for ahead.
NAMES = ("whole vocabulary", "mixed", "padded", "one document each")
# float64 sums in another order: a streamed state is the state, but documents stand in other rows.
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("base"), "llama", tied=False)


@pytest.fixture(scope="module")
def expected(rank_pool: RankPool, directory: Path) -> dict[str, dict[str, Any]]:
    """Of the base that runs beside the draft, in one process."""
    case = "tests.parallel.training_cases:gradients"
    found: dict[str, dict[str, Any]] = rank_pool.run(
        case, world_size=1, layout=Layout(), directory=directory, names=NAMES
    )[0]
    return found


@pytest.mark.parametrize("name", SIDES)
def test_gradients_are_those_of_the_base_beside_the_draft(
    name: str, rank_pool: RankPool, directory: Path, expected: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    layout, num_train, num_extract = SIDES[name]
    results = rank_pool.run(
        "tests.parallel.stream_cases:gradients",
        world_size=num_train + num_extract,
        layout=layout,
        num_extract=num_extract,
        directory=directory,
        names=NAMES,
        port=free_port(),
        scratch=tmp_path,
    )
    # No extraction rank is idle.
    assert all(result["computed"] > 0 for result in results[num_train:])
    check_same_steps(results[:num_train], expected, tolerance=TOLERANCE)

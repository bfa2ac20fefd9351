"""Hidden states that every layout extracts, and training from them in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_spec.data.hidden_states import StatesStore
from mcore_spec.parallel.layout import Layout
from tests.parallel.checks import EACH_AXIS, check_same_steps
from tests.parallel.offline_cases import AUX_LAYERS
from tests.parallel.training_cases import CASES, LENGTHS
from tests.pool import RankPool
from tests.tiny import write_hf_model

LAYOUTS = {
    **EACH_AXIS,
    "TP2 CP2+SP": (Layout(tensor=2, context=2, sequence_parallel=True), 4),
    "PP2 DP2": (Layout(pipeline=2), 4),
}
NAMES = tuple(CASES)
# float64 sums in another order: a stored state is the state, but documents stand in other rows.
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("base"), "llama", tied=False)


def extract(rank_pool: RankPool, name: str, directory: Path, store: Path) -> StatesStore:
    layout, world_size = LAYOUTS[name]
    case = "tests.parallel.offline_cases:extract"
    added = rank_pool.run(case, world_size=world_size, layout=layout, directory=directory, store=store)
    assert added == [len(LENGTHS)] * world_size
    return StatesStore(store, verify=True)


@pytest.fixture(scope="module")
def store(rank_pool: RankPool, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> StatesStore:
    """Extracted by one process."""
    return extract(rank_pool, "one", directory, tmp_path_factory.mktemp("states") / "one")


@pytest.fixture(scope="module")
def expected(rank_pool: RankPool, directory: Path) -> dict[str, dict[str, Any]]:
    """Of the base that runs beside the draft, in one process."""
    return gradients(rank_pool, "one", directory, store=None)[0]


def gradients(rank_pool: RankPool, name: str, directory: Path, *, store: Path | None) -> list[dict[str, Any]]:
    layout, world_size = LAYOUTS[name]
    case = "tests.parallel.training_cases:gradients"
    return rank_pool.run(case, world_size=world_size, layout=layout, directory=directory, names=NAMES, store=store)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_every_layout_extracts_the_same(
    name: str, rank_pool: RankPool, directory: Path, store: StatesStore, tmp_path: Path
) -> None:
    found = extract(rank_pool, name, directory, tmp_path / "states")
    assert found.description == store.description
    assert found.lengths.tolist() == list(LENGTHS)
    for index in range(len(LENGTHS)):
        for ours, theirs in zip(found.states(index), store.states(index), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("world_size", [1, 2])
def test_transformers_extracts_the_same(
    world_size: int, rank_pool: RankPool, directory: Path, store: StatesStore, tmp_path: Path
) -> None:
    case = "tests.parallel.offline_cases:extract_with_transformers"
    rank_pool.run(case, world_size=world_size, directory=directory, store=tmp_path / "states")
    found = StatesStore(tmp_path / "states", verify=True)
    same = {"backend": "transformers"}
    assert found.description == store.description.model_copy(update=same)
    for index in range(len(LENGTHS)):
        for ours, theirs in zip(found.states(index), store.states(index), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_states_are_those_of_each_document_alone(rank_pool: RankPool, directory: Path, store: StatesStore) -> None:
    (inputs,) = rank_pool.run("tests.parallel.training_cases:reference_inputs", world_size=1, directory=directory)
    layers = [AUX_LAYERS.index(layer) for layer in (1, 2)]
    for index, (read, last) in enumerate(inputs["states"]):
        states = store.states(index)
        assert states.aux.shape == (LENGTHS[index], len(AUX_LAYERS), 16)
        torch.testing.assert_close(states.aux[:, layers].flatten(1), read, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(states.last, last, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_the_base_beside_the_draft(
    name: str, rank_pool: RankPool, directory: Path, store: StatesStore, expected: dict[str, dict[str, Any]]
) -> None:
    results = gradients(rank_pool, name, directory, store=store.directory)
    check_same_steps(results, expected, tolerance=TOLERANCE)

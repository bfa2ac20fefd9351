"""Loss and gradients of Medusa's heads, in every layout, against a reference that loops over rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_spec.parallel.layout import Layout
from tests.parallel.checks import EACH_AXIS, TOLERANCE, check_gradients
from tests.parallel.medusa_cases import CASES, DECAY, documents, drawn_weights
from tests.pool import RankPool
from tests.reference.medusa import Document, Objective, medusa_objective
from tests.tiny import write_hf_model

pytestmark = pytest.mark.parallel
RANKS = "tests.parallel.medusa_cases"
LAYOUTS = {
    **EACH_AXIS,
    "TP2 PP2+SP": (Layout(tensor=2, pipeline=2, sequence_parallel=True), 4),
    "TP2 CP2": (Layout(tensor=2, context=2), 4),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("base"), "llama", tied=False)


class Expected:
    """What the oracle says about one case."""

    def __init__(self, name: str, inputs: dict[str, Any]) -> None:
        case = CASES[name]
        self.num_heads, self.knows_all = case.num_heads, case.draft_ids is None
        self.weights = drawn_weights(inputs["shapes"][name], case)
        every = [
            Document(document.token_ids.tolist(), document.mask.tolist(), last)
            for document, last in zip(documents(), inputs["states"], strict=True)
        ]
        self.objective: Objective = medusa_objective(
            [every[index] for cut in case.cut for index in cut],
            self.weights,
            head=inputs["head"],
            num_heads=case.num_heads,
            num_layers=case.num_layers,
            decay=DECAY,
            soft_labels=case.soft_labels,
            draft_ids=case.draft_ids,
        )
        self.objective.loss.backward()


@pytest.fixture(scope="module")
def expected(rank_pool: RankPool, directory: Path) -> dict[str, Expected]:
    (inputs,) = rank_pool.run(f"{RANKS}:reference_inputs", world_size=1, directory=directory)
    return {name: Expected(name, inputs) for name in CASES}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_the_reference(
    name: str, rank_pool: RankPool, directory: Path, expected: dict[str, Expected]
) -> None:
    layout, world_size = LAYOUTS[name]
    results = rank_pool.run(f"{RANKS}:gradients", world_size=world_size, layout=layout, directory=directory)
    assert any(result["hard labels"]["gradients"] for result in results)
    for rank, result in enumerate(results):
        for case, wanted in expected.items():
            _check(f"rank {rank}, {case}", result[case], wanted)


def _check(where: str, found: dict[str, Any], wanted: Expected) -> None:
    objective, heads, sums = wanted.objective, wanted.num_heads, found["totals"]
    assert sums[heads : 2 * heads].tolist() == objective.rows, where
    assert sums[2 * heads : 3 * heads].tolist() == objective.judged, where
    assert sums[3 * heads : 4 * heads].tolist() == objective.correct, where
    assert sums[4 * heads + 1] == objective.accepted, where
    assert 0 < sum(objective.correct) < sum(objective.judged), f"{where}: some are right, some wrong"
    assert (objective.rows == objective.judged) is wanted.knows_all, f"{where}: some tokens it does not know"
    torch.testing.assert_close(sums[4 * heads] / sums[2 * heads], objective.loss.detach(), rtol=TOLERANCE, atol=0)
    check_gradients(where, found["gradients"], wanted.weights)

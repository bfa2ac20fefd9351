"""What the tests of several drafts ask of a training step and of an interrupted run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mcore_spec.parallel.layout import Layout
from tests.parallel.trainer_cases import Run
from tests.pool import RankPool
from tests.reference.training import Objective

# float64 sums in another order; hidden states are of order one, losses of order log(vocabulary).
TOLERANCE = 1e-9
# Every axis by itself, and how many ranks that is.
EACH_AXIS = {
    "one": (Layout(), 1),
    "TP2": (Layout(tensor=2), 2),
    "TP2+SP": (Layout(tensor=2, sequence_parallel=True), 2),
    "PP2": (Layout(pipeline=2), 2),
    "CP2": (Layout(context=2), 2),
    "DP2": (Layout(), 2),
}


def check_step(where: str, found: Mapping[str, Any], objective: Objective, weights: Mapping[str, Tensor]) -> None:
    """Totals and gradients of one rank are the reference's, which has run backward."""
    sums, steps = found["totals"], len(objective.rows)
    assert sums[steps : 2 * steps].tolist() == objective.rows, where
    assert sums[2 * steps : 3 * steps].tolist() == objective.judged, where
    assert sums[3 * steps : 4 * steps].tolist() == objective.correct, where
    assert sums[4 * steps + 1] == objective.accepted, where
    torch.testing.assert_close(sums[4 * steps] / sums[2 * steps], objective.loss.detach(), rtol=TOLERANCE, atol=0)
    regression = sums[4 * steps + 3 :].tolist()
    assert regression == pytest.approx(objective.regression if any(objective.regression) else [], rel=TOLERANCE), where
    check_gradients(where, found["gradients"], weights)


def check_same_steps(
    results: Sequence[Mapping[str, Any]], expected: Mapping[str, Mapping[str, Any]], *, tolerance: float
) -> None:
    """Totals and gradients of every case are those of another run, on every rank that has them; and some rank has."""
    assert any(result[case]["gradients"] for result in results for case in expected)
    for result in results:
        for case, wanted in expected.items():
            found = result[case]
            torch.testing.assert_close(found["totals"], wanted["totals"], rtol=tolerance, atol=tolerance)
            if found["gradients"] is None:
                continue
            assert found["gradients"].keys() == wanted["gradients"].keys()
            for key, gradient in found["gradients"].items():
                reference = wanted["gradients"][key]
                largest = float(reference.abs().max())
                assert largest > 0
                torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=tolerance * largest)


def check_gradients(where: str, found: Mapping[str, Tensor] | None, weights: Mapping[str, Tensor]) -> None:
    """Every whole gradient is that of the reference's weight, and none is zero; a rank without the draft has none."""
    if found is None:
        return
    assert found.keys() == weights.keys(), where
    for key, gradient in found.items():
        reference = weights[key].grad
        assert reference is not None
        largest = float(reference.abs().max())
        assert largest > 0, f"{where}: {key} has no gradient"
        torch.testing.assert_close(
            gradient,
            reference,
            rtol=TOLERANCE,
            atol=TOLERANCE * largest,
            msg=lambda text, key=key: f"{where}: {key}: {text}",
        )


def check_resumed(
    rank_pool: RankPool, run: Run, *, world_size: int, directory: Path, save: Path, copies: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Interrupted and resumed, a run is the run that never stopped, bit for bit, and moves what it trains alone.

    `copies` of what it trains may move with it.

    Returns:
        What each rank saw, of `trainer_cases.interrupted_and_not`; rank 0 has both logs, which are the same.
    """
    case = "tests.parallel.trainer_cases:interrupted_and_not"
    results = rank_pool.run(case, world_size=world_size, run=run, directory=directory, save=save)
    for result in results:
        assert (result["differing"], result["unmoved"]) == ([], [])
        assert set(result["moved base"]) <= set(copies)
    whole, parts = results[0]["logs"]
    assert parts == whole
    return list(results)

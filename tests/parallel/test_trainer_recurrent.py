"""EAGLE-1 and EAGLE-MTP in whole runs: resumed bit for bit, overfitting, the optimizer's rates, what the log says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_spec.config import EagleAlgorithm, eagle_preset
from mcore_spec.parallel.layout import Layout
from tests.parallel.checks import check_resumed
from tests.parallel.trainer_cases import Run
from tests.pool import RankPool
from tests.tiny import write_hf_model

CASES = "tests.parallel.trainer_cases"


def draft(member: EagleAlgorithm, architecture: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    flags = eagle_preset(member)["config"]["eagle_architecture_config"]
    return {**fields, "eagle_architecture_config": {**flags, **(architecture or {})}}


NOISY = draft("eagle1", eagle_feature_noise=0.001)
RUNS = {
    "eagle1, noise": (Run(Layout(), has_d2t=False, draft=NOISY), 1),
    "eagle1, noise, TP2 CP2+SP": (
        Run(Layout(tensor=2, context=2, sequence_parallel=True), has_d2t=False, draft=NOISY),
        4,
    ),
    "mtp, two tokens a step, TP2": (
        Run(Layout(tensor=2), has_d2t=False, draft=draft("eagle-mtp", {"parallel_draft_step": 2})),
        2,
    ),
    "mtp, PP2, bf16": (
        Run(
            Layout(pipeline=2),
            dtype="bfloat16",
            has_d2t=False,
            draft=draft("eagle-mtp", eagle_reuse_base_decoder=True),
            options={"bf16": True},
        ),
        2,
    ),
    "mtp, DP2, distributed optimizer": (
        Run(Layout(), has_d2t=False, draft=draft("eagle-mtp"), options={"use_distributed_optimizer": True}),
        2,
    ),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("base"), "llama", tied=False)


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_run_that_never_stopped(
    name: str, rank_pool: RankPool, directory: Path, tmp_path: Path
) -> None:
    run, world_size = RUNS[name]
    results = check_resumed(rank_pool, run, world_size=world_size, directory=directory, save=tmp_path)
    whole, _ = results[0]["logs"]
    is_eagle1 = name.startswith("eagle1")
    for line in whole:
        prefix = "" if "loss" in line else "validation_"
        assert (f"{prefix}regression_by_step" in line) == is_eagle1
    if is_eagle1:
        distances = [line["regression_by_step"] for line in whole if "loss" in line]
        assert len(distances[0]) == 3
        assert sum(distances[-1]) < sum(distances[0])


@pytest.mark.parametrize("member", ["eagle1", "eagle-mtp"])
def test_a_trained_draft_goes_on_in_any_other_layout(
    member: EagleAlgorithm, rank_pool: RankPool, directory: Path, tmp_path: Path
) -> None:
    given = NOISY if member == "eagle1" else draft(member, {"parallel_draft_step": 2})

    def run(layout: Layout) -> Run:
        return Run(layout, dtype="float64", has_d2t=False, draft=given)

    first = run(Layout(tensor=2, pipeline=2, sequence_parallel=True))
    results = rank_pool.run(f"{CASES}:train_and_save", world_size=4, run=first, directory=directory, save=tmp_path)
    (expected, *_) = [result for result in results if result["saved"] is not None]
    for layout, world_size in ((Layout(), 1), (Layout(context=2), 2), (Layout(tensor=2), 2)):
        for found in rank_pool.run(f"{CASES}:load_and_train", world_size=world_size, run=run(layout), save=tmp_path):
            assert found["saved"].keys() == expected["saved"].keys()
            for name, weight in expected["saved"].items():
                assert torch.equal(found["saved"][name], weight), f"{layout}: {name}"
                # Sums in another order, behind Adam's division by a root.
                torch.testing.assert_close(found["next"][name], expected["next"][name], rtol=1e-7, atol=1e-9)
                assert not torch.equal(found["next"][name], weight), f"{layout}: {name} did not move"


def test_noise_is_in_training_alone_and_follows_the_seed(rank_pool: RankPool, directory: Path, tmp_path: Path) -> None:
    (result,) = rank_pool.run(f"{CASES}:noisy_losses", world_size=1, directory=directory, draft=NOISY)
    assert "the batch has no keys for it; give make_batch noise_keys" in result["error"]
    assert result["trained"][0] == result["trained"][1]
    assert len(set(result["trained"])) == 2
    assert result["validated"] == result["plain"]
    assert result["plain"] not in result["trained"]


@pytest.mark.parametrize(("member", "num_iterations", "least"), [("eagle-mtp", 400, 0.95), ("eagle1", 800, 0.95)])
def test_a_few_conversations_are_learnt_by_heart(
    member: EagleAlgorithm,
    num_iterations: int,
    least: float,
    rank_pool: RankPool,
    directory: Path,
    tmp_path: Path,
) -> None:
    ((_, accuracy),) = rank_pool.run(
        f"{CASES}:overfit",
        world_size=1,
        directory=directory,
        save=tmp_path,
        draft=draft(member, {"intermediate_size": 128}),
        num_iterations=num_iterations,
    )
    assert min(accuracy) > least, accuracy


@pytest.mark.parametrize("member", ["eagle1", "eagle-mtp"])
def test_matrices_learn_at_the_rate_of_their_width(
    member: EagleAlgorithm, rank_pool: RankPool, directory: Path
) -> None:
    options = {"lr": 3e-4, "min_lr": 1e-5, "lr_scaling": "width"}
    (found,) = rank_pool.run(
        f"{CASES}:learning_rates",
        world_size=1,
        directory=directory,
        options=options,
        draft=draft(member),
        has_d2t=False,
    )
    assert len(found["rates"]) > 7
    for name, rates in found["rates"].items():
        scale = 1 if "norm" in name else 4096 / 16
        assert rates == pytest.approx([3e-4 * scale, 1e-5 * scale]), name

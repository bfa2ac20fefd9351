"""Medusa in whole runs: resumed bit for bit, resharded, overfitting, the optimizer's rates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mcore_spec.parallel.layout import Layout
from tests.parallel.checks import check_resumed
from tests.parallel.trainer_cases import Run
from tests.pool import RankPool
from tests.tiny import write_hf_model

CASES = "tests.parallel.trainer_cases"
HEADS = {"medusa_num_heads": 3, "medusa_num_layers": 2}
RUNS = {
    "one": (Run(Layout(), has_d2t=False, draft=HEADS), 1),
    "TP2+SP, soft labels, bf16": (
        Run(
            Layout(tensor=2, sequence_parallel=True),
            dtype="bfloat16",
            has_d2t=False,
            draft={**HEADS, "medusa_self_logit_distillation": True},
            options={"bf16": True},
        ),
        2,
    ),
    "PP2, distributed optimizer, recompute": (
        Run(
            Layout(pipeline=2),
            has_d2t=False,
            draft=HEADS,
            options={"use_distributed_optimizer": True, "recompute_granularity": "draft"},
        ),
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
    losses = [line["loss_by_step"] for line in whole if "loss" in line]
    # One figure a head, in every entry.
    assert all(len(line["accuracy"]) == 3 for line in whole if "loss" in line)
    assert all(last < first for first, last in zip(losses[0], losses[-1], strict=True))


def test_trained_heads_go_on_in_any_other_layout(rank_pool: RankPool, directory: Path, tmp_path: Path) -> None:
    def run(layout: Layout) -> Run:
        return Run(layout, dtype="float64", has_d2t=False, draft=HEADS)

    first = run(Layout(tensor=2, sequence_parallel=True))
    (expected, _) = rank_pool.run(
        f"{CASES}:train_and_save", world_size=2, run=first, directory=directory, save=tmp_path
    )
    for layout, world_size in ((Layout(), 1), (Layout(pipeline=2), 2), (Layout(context=2), 2)):
        results = rank_pool.run(f"{CASES}:load_and_train", world_size=world_size, run=run(layout), save=tmp_path)
        for found in (result for result in results if result["saved"] is not None):
            assert found["saved"].keys() == expected["saved"].keys()
            for name, weight in expected["saved"].items():
                assert torch.equal(found["saved"][name], weight), f"{layout}: {name}"
                # Sums in another order, behind Adam's division by a root.
                torch.testing.assert_close(found["next"][name], expected["next"][name], rtol=1e-7, atol=1e-9)
                assert not torch.equal(found["next"][name], weight), f"{layout}: {name} did not move"


@pytest.mark.parametrize(("soft_labels", "num_iterations"), [(True, 500), (False, 250)])
def test_a_few_conversations_are_learnt_by_heart(
    soft_labels: bool, num_iterations: int, rank_pool: RankPool, directory: Path, tmp_path: Path
) -> None:
    """Of the base's distribution its best token, which accuracy is measured by; of the data every next token."""
    (means,) = rank_pool.run(
        "tests.parallel.medusa_cases:overfit",
        world_size=1,
        directory=directory,
        save=tmp_path,
        draft={"medusa_num_heads": 3, "medusa_self_logit_distillation": soft_labels},
        num_iterations=num_iterations,
    )
    assert len(means.accuracy) == len(means.loss_by_step) == 3
    if soft_labels:
        assert min(means.accuracy) > 0.95, means
    else:
        assert max(means.loss_by_step) < 0.05, means


def test_blocks_learn_at_the_rate_of_their_width(rank_pool: RankPool, directory: Path) -> None:
    """Heads start as the base's rows and learn, like biases, at --lr."""
    options = {"lr": 3e-4, "min_lr": 1e-5, "lr_scaling": "width"}
    (found,) = rank_pool.run(
        f"{CASES}:learning_rates",
        world_size=1,
        directory=directory,
        options=options,
        draft=HEADS,
        has_d2t=False,
    )
    assert len(found["rates"]) == 3 * (2 * 2 + 1)
    for name, rates in found["rates"].items():
        scale = 4096 / 16 if name.endswith("linear.weight") else 1
        assert rates == pytest.approx([3e-4 * scale, 1e-5 * scale]), name

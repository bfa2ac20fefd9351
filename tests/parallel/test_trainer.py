"""Whole runs: interrupted and resumed bit for bit, gradients without numbers, overfitting, megatron-core's schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mcore_spec.parallel.layout import Layout
from tests.parallel.checks import check_resumed
from tests.parallel.trainer_cases import GLOBAL_BATCH_SIZE, Run
from tests.pool import RankPool
from tests.tiny import write_hf_model

CASES = "tests.parallel.trainer_cases"
RUNS = {
    "one": (Run(Layout()), 1),
    "one, validated where it stops, fitted": (
        Run(Layout(), options={"eval_interval": 3, "fit_start": 2, "lr_scaling": "auto"}),
        1,
    ),
    "PP2, fitted": (
        Run(
            Layout(pipeline=2),
            dtype="bfloat16",
            options={"bf16": True, "fit_start": 1, "lr": 1e-3, "lr_scaling": "auto"},
        ),
        2,
    ),
    "bf16": (Run(Layout(), dtype="bfloat16", options={"bf16": True}), 1),
    "TP2 PP2+SP": (Run(Layout(tensor=2, pipeline=2, sequence_parallel=True)), 4),
    "CP2 DP2": (Run(Layout(context=2), has_d2t=False), 4),
    "TP2 CP2+SP, mixed": (
        Run(Layout(tensor=2, context=2, sequence_parallel=True), draft={"eagle_mix_hidden_states": True}),
        4,
    ),
    "DP2, distributed optimizer": (Run(Layout(), options={"use_distributed_optimizer": True}), 2),
    "TP2 DP2, bf16, distributed optimizer": (
        Run(Layout(tensor=2), dtype="bfloat16", options={"use_distributed_optimizer": True, "bf16": True}),
        4,
    ),
    "quantised": (Run(Layout(), recipe="fp8", options={"teacher": "unquantized"}), 1),
    "TP2+SP, quantised, bf16": (
        Run(
            Layout(tensor=2, sequence_parallel=True),
            dtype="bfloat16",
            recipe="int8_per_channel",
            options={"bf16": True},
        ),
        2,
    ),
    "PP2 DP2, distributed optimizer": (
        Run(Layout(pipeline=2), options={"use_distributed_optimizer": True, "lr_scaling": "width", "lr": 1e-4}),
        4,
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
    for result in results:
        progress = result["progress"]
        assert (progress["iteration"], progress["num_updates"], progress["num_skipped"]) == (6, 6, 0)
        assert progress["consumed_samples"] == 6 * GLOBAL_BATCH_SIZE
    whole, _ = results[0]["logs"]
    validated = [3, 6] if "eval_interval" in run.options else [6]
    assert [line["iteration"] for line in whole] == sorted([2, 4, 6, *validated])
    assert whole[0]["learning_rate"] == pytest.approx(run.options.get("lr", 1e-2))
    assert len(whole[0]["accuracy"]) == 3
    losses = [line["loss"] for line in whole if "loss" in line]
    assert losses[2] < losses[0]


def test_states_are_mixed_in_training_alone(rank_pool: RankPool, directory: Path) -> None:
    (result,) = rank_pool.run(f"{CASES}:unmixed_batches", world_size=1, directory=directory)
    assert "the batch does not say which rows are mixed; give make_batch mixing" in result["error"]
    mixed, plain = result["losses"]
    assert mixed == plain > 0


def test_a_step_without_finite_gradients_changes_nothing(rank_pool: RankPool, directory: Path, tmp_path: Path) -> None:
    (result,) = rank_pool.run(f"{CASES}:non_finite", world_size=1, directory=directory, save=tmp_path, bad=(2, 3))
    # Weights behind steps 1..6: steps 2 and 3 (from 0) left them as they were.
    assert result["same"] == [False, True, True, False, False]
    assert result["error"] is None
    assert result["progress"]["num_skipped"] == 2
    assert result["progress"]["num_updates"] == 4
    assert result["progress"]["num_skipped_in_a_row"] == 0


def test_a_run_can_be_stopped_while_its_first_weights_are_made(
    rank_pool: RankPool, directory: Path, tmp_path: Path
) -> None:
    case = f"{CASES}:stopped_while_fitting"
    for result in rank_pool.run(case, world_size=2, directory=directory, save=tmp_path / "save"):
        assert result == {"stopped": 1, "changed": [], "handler is back": True}
    assert not (tmp_path / "save").exists()


def test_three_such_steps_in_a_row_end_the_run(rank_pool: RankPool, directory: Path, tmp_path: Path) -> None:
    (result,) = rank_pool.run(f"{CASES}:non_finite", world_size=1, directory=directory, save=tmp_path, bad=(2, 3, 4))
    assert result["error"] is not None
    assert "3 steps in a row" in result["error"]
    assert "iteration 4 is intact" in result["error"]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "4"


@pytest.mark.parametrize("scaling", ["width", "none"])
def test_matrices_learn_at_the_rate_of_their_width(scaling: str, rank_pool: RankPool, directory: Path) -> None:
    options = {"lr": 3e-4, "min_lr": 1e-5, "lr_scaling": scaling}
    (found,) = rank_pool.run(f"{CASES}:learning_rates", world_size=1, directory=directory, options=options)
    # The tiny base is 16 wide; norms, and a head that starts as the base's rows, learn at --lr.
    factor = 4096 / 16 if scaling == "width" else 1
    assert len(found["rates"]) > 8
    for name, rates in found["rates"].items():
        scale = 1 if "norm" in name or name == "lm_head.weight" else factor
        assert rates == pytest.approx([3e-4 * scale, 1e-5 * scale]), name
    assert found["reported"] == pytest.approx(3e-4)


def test_behind_a_least_squares_start_each_matrix_has_its_rate(rank_pool: RankPool, directory: Path) -> None:
    options = {"lr": 3e-4, "min_lr": 1e-5, "lr_scaling": "auto"}
    case = f"{CASES}:learning_rates"
    factors = {"fc.weight": 0.08, "layers.0.self_attn.q_proj.weight": 1.5, "layers.0.mlp.up_proj.weight": 1.5}
    (fitted,) = rank_pool.run(case, world_size=1, directory=directory, options=options, rates=factors)
    for name, rates in fitted["rates"].items():
        scale = factors.get(name, 1)
        assert rates == pytest.approx([3e-4 * scale, 1e-5 * scale]), name
    (width,) = rank_pool.run(
        case, world_size=1, directory=directory, options={**options, "lr_scaling": "width"}, rates=factors
    )
    (auto,) = rank_pool.run(case, world_size=1, directory=directory, options=options)
    assert width["rates"] == auto["rates"]


def test_a_few_conversations_are_learnt_by_heart(rank_pool: RankPool, directory: Path, tmp_path: Path) -> None:
    ((progress, accuracy),) = rank_pool.run(f"{CASES}:overfit", world_size=1, directory=directory, save=tmp_path)
    assert progress.num_updates == 400
    assert min(accuracy) > 0.95, accuracy


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        (Layout(), 1),
        (Layout(), 2),
        (Layout(tensor=2, sequence_parallel=True), 2),
        (Layout(context=2), 2),
    ],
)
def test_the_schedule_of_megatron_core_gives_the_same_gradients(
    layout: Layout, world_size: int, rank_pool: RankPool, directory: Path, tmp_path: Path
) -> None:
    results = rank_pool.run(
        f"{CASES}:schedule_of_megatron", world_size=world_size, layout=layout, directory=directory, save=tmp_path
    )
    for result in results:
        assert result["megatron"].keys() == result["trainer"].keys()
        for name, gradient in result["trainer"].items():
            # megatron-core divides by the number of tokens in float32.
            torch.testing.assert_close(result["megatron"][name], gradient, rtol=2e-7, atol=0)
    reports = [report for result in results for report in result["report"]]
    num_context = layout.context * layout.tensor
    sums = results[0]["sums"]
    loss = sum(float(report["draft loss"][0]) for report in reports) / (num_context if layout.tensor > 1 else 1)
    rows = sum(float(report["draft loss"][1]) for report in reports) / (num_context if layout.tensor > 1 else 1)
    assert rows == float(sums[3])
    assert loss == pytest.approx(float(sums[12]), rel=1e-12)

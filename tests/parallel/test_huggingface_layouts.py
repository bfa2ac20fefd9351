"""A drafted transformers model on two ranks equals one: DDP, FSDP2 as accelerate shards, and context parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_spec.config import eagle_preset
from mcore_spec.conversion import Mode
from tests.pool import RankPool
from tests.tiny import joint_mode, write_hf_model

pytestmark = pytest.mark.parallel

# float64; sums in another order.
TOLERANCE = 1e-10
CASES: dict[str, tuple[Mode, str, bool]] = {
    "eagle3, reduced vocabulary": (eagle_preset("eagle3"), "llama", True),
    "eagle3, whole vocabulary, tied head": (eagle_preset("eagle3"), "llama tied", False),
    "eagle1": (eagle_preset("eagle1"), "qwen3", False),
    "eagle-mtp": (eagle_preset("eagle-mtp"), "llama", False),
    "medusa": ("medusa", "llama", False),
    "eagle3, base too, tied head": (joint_mode("eagle3"), "llama tied", False),
    "eagle1, base too, through features": (joint_mode("eagle1", eagle_train_through_features=True), "qwen3", False),
}
JOINT = [name for name in CASES if "base too" in name]
FROZEN = [name for name in CASES if name not in JOINT]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        name: write_hf_model(root / name.replace(" ", "_"), name.split()[0], tied="tied" in name)
        for name in ("llama", "llama tied", "qwen3")
    }


def run(rank_pool: RankPool, directories: dict[str, Path], case: str, layout: str, world_size: int) -> list[Any]:
    mode, base, has_d2t = CASES[case]
    return rank_pool.run(
        "tests.parallel.hf_cases:train",
        world_size=world_size,
        directory=directories[base],
        mode=mode,
        layout=layout,
        has_d2t=has_d2t,
    )


@pytest.fixture(scope="module", params=FROZEN)
def case(request: pytest.FixtureRequest, rank_pool: RankPool, directories: dict[str, Path]) -> tuple[str, Any]:
    (single,) = run(rank_pool, directories, request.param, "single", 1)
    return request.param, single


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "cp"])
def test_two_ranks_equal_one(
    layout: str, case: tuple[str, Any], rank_pool: RankPool, directories: dict[str, Path]
) -> None:
    check_layout(rank_pool, directories, case[0], layout, case[1])


def check_layout(rank_pool: RankPool, directories: dict[str, Path], name: str, layout: str, single: Any) -> None:
    """Losses and weights on two ranks are those of one."""
    assert single["losses"][1] < single["losses"][0]
    for found in run(rank_pool, directories, name, layout, 2):
        assert found["losses"] == pytest.approx(single["losses"], abs=TOLERANCE)
        if layout == "cp":
            # Elsewhere a rank has documents of its own.
            assert found["lm_losses"] == pytest.approx(single["lm_losses"], abs=TOLERANCE)
        assert found["state"].keys() == single["state"].keys()
        for key, value in single["state"].items():
            difference = float((found["state"][key] - value).abs().max())
            assert difference <= TOLERANCE, f"{key} differs by {difference:.1e}"


@pytest.mark.parametrize("case", JOINT, indirect=True)
def test_base_and_draft_on_two_ranks_equal_one(
    case: tuple[str, Any], rank_pool: RankPool, directories: dict[str, Path]
) -> None:
    name, single = case
    assert any(key.startswith("model.layers.") for key in single["state"])
    check_layout(rank_pool, directories, name, "ddp", single)


@pytest.mark.parametrize("layout", ["fsdp2", "cp"])
def test_layouts_that_cut_a_trained_base_are_refused(
    layout: str, rank_pool: RankPool, directories: dict[str, Path]
) -> None:
    mode, base, _ = CASES[JOINT[0]]
    found = rank_pool.run(
        "tests.parallel.hf_cases:joint_refused", world_size=2, directory=directories[base], mode=mode, layout=layout
    )
    for message in found:
        assert message.startswith("eagle_freeze_base_model = false under FSDP or context parallelism")


def test_a_start_from_data_is_one_over_ranks(rank_pool: RankPool, directories: dict[str, Path]) -> None:
    (single,) = rank_pool.run("tests.parallel.hf_cases:start", world_size=1, directory=directories["llama"])
    both = rank_pool.run("tests.parallel.hf_cases:start", world_size=2, directory=directories["llama"])
    for found in both:
        assert found["made"].num_rows == single["made"].num_rows > 10
        assert found["made"].rates == pytest.approx(single["made"].rates, rel=1e-9)
        for key, value in single["state"].items():
            assert torch.equal(found["state"][key], both[0]["state"][key]), key
            difference = float((found["state"][key] - value).abs().max())
            assert difference <= TOLERANCE * max(1.0, float(value.abs().max())), f"{key} differs by {difference:.1e}"


def test_a_start_that_one_rank_refuses_ends_on_all(rank_pool: RankPool, directories: dict[str, Path]) -> None:
    for found in rank_pool.run("tests.parallel.hf_cases:start_refused", world_size=2, directory=directories["llama"]):
        assert found[0].startswith("labels[0, ") and "not shifted" in found[0]
        assert found[1].startswith("fit_start under FSDP")

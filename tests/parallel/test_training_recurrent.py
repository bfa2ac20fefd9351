"""EAGLE-1 and EAGLE-MTP: loss and gradients of a training step, in every layout, against a loop over rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mcore_spec.data.noise import uniform_noise
from mcore_spec.parallel.layout import Layout
from tests.parallel.checks import EACH_AXIS, check_step
from tests.parallel.training_cases import (
    DECAY,
    NUM_STEPS,
    Case,
    documents,
    drawn_weights,
    noise_key,
    replaced_rows,
)
from tests.pool import RankPool
from tests.reference.drafts import Shape, StepOutput, Weights, eagle1, eagle_mtp, mixed, parallel_heads
from tests.reference.training import Document, Objective, objective
from tests.tiny import write_hf_model

TRAINING_CASES = "tests.parallel.training_cases"
LAYOUTS = {
    **EACH_AXIS,
    "TP2 CP2+SP": (Layout(tensor=2, context=2, sequence_parallel=True), 4),
    "TP2 PP2+SP": (Layout(tensor=2, pipeline=2, sequence_parallel=True), 4),
}
# By family of the base, whose layer EAGLE-MTP repeats.
CASES: dict[str, dict[str, Case]] = {
    "llama": {
        "eagle1": Case({}, member="eagle1"),
        "eagle1, two layers, noise, recompute": Case(
            {"num_hidden_layers": 2}, member="eagle1", noise=0.002, recompute=True
        ),
        "eagle1, hard labels, one row": Case(
            {}, member="eagle1", hard_labels=True, cut=((0, 1, 2, 3, 4, 5, 6), ()), noise=0.001
        ),
        "eagle1, parallel heads": Case({"parallel_draft_step": 2}, member="eagle1", recompute=True),
        "mtp": Case({}, member="eagle-mtp"),
        "mtp, parallel heads": Case({"parallel_draft_step": 2}, member="eagle-mtp", hard_labels=True),
        "mtp, hard labels, recompute": Case({}, member="eagle-mtp", hard_labels=True, recompute=True),
        "mtp, mixed": Case({"num_hidden_layers": 2}, member="eagle-mtp", mixes_states=True),
    },
    # Read before the final norm, and without the token at position 0.
    "qwen2": {
        "mimo": Case({}, member="eagle-mtp"),
        "mimo, padded": Case({}, member="eagle-mtp", cut=((0, 6), (1, 2), (3, 4), (5,)), pad_to=16),
    },
    "qwen3": {"mtp with q/k norms": Case({}, member="eagle-mtp")},
}
MIMO_FAMILIES = ("qwen2",)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_hf_model(tmp_path_factory.mktemp(family), family, tied=family == "qwen3") for family in CASES}


class Expected:
    """What the oracle says about one case."""

    def __init__(self, family: str, case: Case, inputs: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
        self.weights = drawn_weights(shapes)
        rotary = LlamaRotaryEmbedding(
            LlamaConfig(
                hidden_size=16,
                num_attention_heads=4,
                head_dim=8,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            )
        )
        shape = Shape(
            num_heads=4, num_kv_heads=2, head_dim=8, eps=1e-5, hidden_act="silu", inv_freq=rotary.inv_freq,
            num_layers=case.architecture.get("num_hidden_layers", 1),
        )  # fmt: skip
        cut = [index for part in case.cut for index in part]
        made = []
        for index, each in enumerate(documents()):
            if index in cut:
                read, last = inputs["states"][index]
                read = read + _noise(case, index, read.shape)
                made.append(Document(each.token_ids.tolist(), each.mask.tolist(), read, last, replaced_rows(index)))
        is_eagle1 = case.member == "eagle1"
        self.objective: Objective = objective(
            made,
            _runner(case, family, self.weights, shape, inputs["head"]),
            embedding=inputs["embedding"],
            head=inputs["head"],
            num_steps=NUM_STEPS,
            decay=DECAY,
            hard_labels=case.hard_labels,
            mixes_states=case.mixes_states,
            entropy_factor=0.1 if is_eagle1 else 1.0,
            regression_factor=1.0 if is_eagle1 else 0.0,
            further=partial(parallel_heads, self.weights),
        )
        self.objective.loss.backward()


def _noise(case: Case, index: int, shape: torch.Size) -> Tensor:
    """Uniform, of half-width `noise` at 512 tokens."""
    length, width = shape
    noise = uniform_noise(torch.full((length,), noise_key(index)), torch.arange(length), width)
    return case.noise * 512 / length * noise.double()


def _runner(
    case: Case, family: str, weights: Weights, shape: Shape, head: Tensor
) -> Callable[[Document, list[Tensor]], list[StepOutput]]:
    draft: Callable[..., list[StepOutput]] = eagle1
    if case.member == "eagle-mtp":
        draft = partial(eagle_mtp, is_mimo=family in MIMO_FAMILIES)

    def run(document: Document, embeddings: list[Tensor]) -> list[StepOutput]:
        features = document.aux[:, None]
        if case.mixes_states:
            return mixed(
                lambda states: draft(weights, shape, states, embeddings[:1], head)[0], features, document.replaced
            )
        return draft(weights, shape, features, embeddings, head)

    return run


@pytest.fixture(scope="module")
def expected(rank_pool: RankPool, directories: dict[str, Path]) -> dict[str, dict[str, Expected]]:
    found: dict[str, dict[str, Expected]] = {}
    for family, cases in CASES.items():
        here = {"world_size": 1, "directory": directories[family]}
        (shapes,) = rank_pool.run(f"{TRAINING_CASES}:weight_shapes", cases=cases, **here)
        first = next(iter(cases.values()))
        (inputs,) = rank_pool.run(f"{TRAINING_CASES}:reference_inputs", case=first, **here)
        found[family] = {name: Expected(family, case, inputs, shapes[name]) for name, case in cases.items()}
        for name, case in cases.items():
            assert case.hard_labels or found[family][name].objective.loss.item() > 0
    return found


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_the_reference(
    name: str,
    family: str,
    rank_pool: RankPool,
    directories: dict[str, Path],
    expected: dict[str, dict[str, Expected]],
) -> None:
    layout, world_size = LAYOUTS[name]
    cases = CASES[family]
    results = rank_pool.run(
        f"{TRAINING_CASES}:gradients",
        world_size=world_size,
        layout=layout,
        directory=directories[family],
        names=tuple(cases),
        cases=cases,
    )
    for rank, result in enumerate(results):
        for case in cases:
            wanted = expected[family][case]
            check_step(f"rank {rank}, {case}", result[case], wanted.objective, wanted.weights)
    for case in cases:
        assert any(result[case]["gradients"] for result in results)

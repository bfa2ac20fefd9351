"""Loss and gradients of a training step, in every layout, against a reference that loops over rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mcore_spec.parallel.layout import Layout
from tests.parallel.checks import EACH_AXIS, check_step
from tests.parallel.training_cases import CASES, DECAY, LENGTHS, NUM_STEPS, documents, drawn_weights, replaced_rows
from tests.pool import RankPool
from tests.reference.drafts import Shape
from tests.reference.training import Document, Objective, eagle3_objective
from tests.tiny import draft_to_target, write_hf_model

LAYOUTS = {
    **EACH_AXIS,
    "uneven PP2": (Layout(pipeline=2, last_stage_layers=1), 2),
    "TP2 PP2": (Layout(tensor=2, pipeline=2), 4),
    "TP2 PP2+SP": (Layout(tensor=2, pipeline=2, sequence_parallel=True), 4),
    "TP2 CP2+SP": (Layout(tensor=2, context=2, sequence_parallel=True), 4),
    "PP2 CP2": (Layout(pipeline=2, context=2), 4),
    "PP2 DP2": (Layout(pipeline=2), 4),
    "CP2 DP2": (Layout(context=2), 4),
    "TP2 DP2": (Layout(tensor=2), 4),
    "TP2 PP2 CP2+SP": (Layout(tensor=2, pipeline=2, context=2, sequence_parallel=True), 8),
    "TP2 PP2 DP2": (Layout(tensor=2, pipeline=2), 8),
}
# With the start of eight workers on cores that others use too.
TIMEOUT_S = 600.0
# Those that differ most, because eight ranks share few cores: soft labels through the base's head over the whole
# vocabulary; a head of the draft's own over a part of it, behind two layers; mixed states, one rank with nothing.
CASES_ON_EIGHT_RANKS = ("whole vocabulary", "reduced vocabulary", "mixed, one row, recompute")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("base"), "llama", tied=False)


class Expected:
    """What the oracle says about one case."""

    def __init__(self, name: str, inputs: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
        case = CASES[name]
        self.weights = drawn_weights(shapes)
        rotary = LlamaRotaryEmbedding(
            LlamaConfig(
                hidden_size=16,
                num_attention_heads=4,
                head_dim=8,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            )  # fmt: skip
        )
        shape = Shape(
            num_heads=4, num_kv_heads=2, head_dim=8, eps=1e-5, hidden_act="silu", inv_freq=rotary.inv_freq,
            num_layers=case.architecture.get("num_hidden_layers", 1),
        )  # fmt: skip
        cut = [index for part in case.cut for index in part]
        made = [
            Document(each.token_ids.tolist(), each.mask.tolist(), *inputs["states"][index], replaced_rows(index))
            for index, each in enumerate(documents())
            if index in cut
        ]
        d2t = draft_to_target()
        self.objective: Objective = eagle3_objective(
            made,
            self.weights,
            shape,
            embedding=inputs["embedding"],
            head=inputs["head"],
            num_steps=NUM_STEPS,
            decay=DECAY,
            target_ids=(d2t + torch.arange(d2t.shape[0])).tolist() if case.has_d2t else None,
            hard_labels=case.hard_labels,
            keep_out_of_vocabulary=case.keeps_all,
            mixes_states=case.mixes_states,
            detaches=case.detaches,
        )
        self.objective.loss.backward()


@pytest.fixture(scope="module")
def expected(rank_pool: RankPool, directory: Path) -> dict[str, Expected]:
    (inputs,) = rank_pool.run("tests.parallel.training_cases:reference_inputs", world_size=1, directory=directory)
    (shapes,) = rank_pool.run("tests.parallel.training_cases:weight_shapes", world_size=1, directory=directory)
    return {name: Expected(name, inputs, shapes[name]) for name in CASES}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_the_reference(
    name: str, rank_pool: RankPool, directory: Path, expected: dict[str, Expected]
) -> None:
    layout, world_size = LAYOUTS[name]
    names = CASES_ON_EIGHT_RANKS if world_size == 8 else tuple(CASES)
    results = rank_pool.run(
        "tests.parallel.training_cases:gradients",
        world_size=world_size,
        layout=layout,
        directory=directory,
        names=names,
        timeout=TIMEOUT_S,
    )
    assert any(result["whole vocabulary"]["gradients"] for result in results)
    for rank, result in enumerate(results):
        assert result.keys() == set(names)
        for case in names:
            wanted = expected[case]
            check_step(f"rank {rank}, {case}", result[case], wanted.objective, wanted.weights)


def test_the_documents_hold_what_the_cases_need() -> None:
    """A document of one token, one whose mask is empty, one whose mask is full."""
    made = documents()
    assert tuple(len(each.token_ids) for each in made) == LENGTHS
    assert [bool(each.mask.any()) for each in made].count(False) >= 1
    assert any(bool(each.mask.all()) and len(each.mask) > 4 for each in made)

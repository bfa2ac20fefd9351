"""Base and draft trained together: loss and every gradient of both, in every layout, against transformers' autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mcore_spec.config import eagle_preset
from mcore_spec.parallel.layout import Layout
from mcore_spec.weights.safetensors_io import WeightDirectory
from tests.parallel.checks import EACH_AXIS, TOLERANCE, check_gradients, check_resumed
from tests.parallel.trainer_cases import Run
from tests.parallel.training_cases import DECAY, FAVOURITE, NUM_STEPS, Case, documents, drawn_weights
from tests.parity.hf_models import norm_in_float64
from tests.pool import RankPool
from tests.reference.drafts import Shape, StepOutput, eagle1, eagle3
from tests.reference.training import Document, Objective, objective
from tests.tiny import draft_to_target, write_hf_model

JOINT_CASES, TRAINING_CASES = "tests.parallel.joint_cases", "tests.parallel.training_cases"
CASES = {
    "eagle3": Case({}, trains_base=True),
    "eagle3, reduced, through features": Case({}, has_d2t=True, trains_base=True, through_features=True),
    "eagle1, through features, recompute": Case(
        {}, member="eagle1", trains_base=True, through_features=True, recompute=True
    ),
}
# What both stages hold of a tied base is one weight.
TIED = {"eagle3, tied": Case({}, trains_base=True)}
LAYOUTS = {
    **EACH_AXIS,
    "TP2 PP2+SP": (Layout(tensor=2, pipeline=2, sequence_parallel=True), 4),
    "PP2 CP2": (Layout(pipeline=2, context=2), 4),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("base"), "llama", tied=False)


@pytest.fixture(scope="module")
def tied_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("tied"), "qwen3", tied=True)


class Expected(NamedTuple):
    """One step by autograd through transformers' model and the reference of the draft."""

    loss: float
    lm_loss: float
    draft: Objective
    weights: dict[str, Tensor]
    base: dict[str, Tensor]


def expect(directory: Path, case: Case, shapes: dict[str, tuple[int, ...]], *, favours: bool) -> Expected:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    norm_in_float64(model)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if favours:
        with torch.no_grad():
            head[FAVOURITE] *= 8
    weights = drawn_weights(shapes)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=16, num_attention_heads=4, head_dim=8, rope_parameters=rope))
    shape = Shape(
        num_heads=4, num_kv_heads=2, head_dim=8, eps=model.config.rms_norm_eps, hidden_act="silu",
        inv_freq=rotary.inv_freq,
    )  # fmt: skip
    is_eagle1, made, own, num_tokens = case.member == "eagle1", [], head.new_zeros(()), 0
    for document in documents():
        tokens = torch.from_numpy(document.token_ids)
        output = model(input_ids=tokens[None], output_hidden_states=True, use_cache=False)
        for t in range(len(tokens) - 1):
            if document.mask[t + 1]:
                own = own - F.linear(output.hidden_states[-1][0, t], head).log_softmax(0)[tokens[t + 1]]
                num_tokens += 1
        # Behind the embedding; the last one is normed.
        layers = output.hidden_states[1:]
        read = layers[-1] if is_eagle1 else torch.cat([layers[layer] for layer in (1, 2)], dim=-1)
        read = read if case.through_features else read.detach()
        made.append(Document(tokens.tolist(), document.mask.tolist(), read[0], layers[-1][0].detach(), []))
    frozen_head = head.detach()

    def run(document: Document, embeddings: list[Tensor]) -> list[StepOutput]:
        if is_eagle1:
            return eagle1(weights, shape, document.aux[:, None], embeddings, frozen_head)
        return eagle3(weights, shape, document.aux[:, None], embeddings, None if case.has_d2t else frozen_head)

    d2t = draft_to_target()
    draft = objective(
        made,
        run,
        embedding=embedding.detach(),
        head=frozen_head,
        num_steps=NUM_STEPS,
        decay=DECAY,
        target_ids=(d2t + torch.arange(d2t.shape[0])).tolist() if case.has_d2t else None,
        entropy_factor=0.1 if is_eagle1 else 1.0,
        regression_factor=1.0 if is_eagle1 else 0.0,
    )
    loss = draft.loss + own / draft.judged[0]
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return Expected(loss.item(), own.item() / num_tokens, draft, weights, gradients)


def check(
    rank_pool: RankPool,
    name: str,
    cases: dict[str, Case],
    expected: dict[str, Expected],
    *,
    directory: Path,
    save: Path,
    favours: bool,
) -> None:
    layout, world_size = LAYOUTS[name]
    results = rank_pool.run(
        f"{JOINT_CASES}:gradients_of_both",
        world_size=world_size,
        layout=layout,
        directory=directory,
        save=save,
        cases=cases,
        favours=favours,
    )
    for case, wanted in expected.items():
        for rank, result in enumerate(results):
            means = result[case]["means"]
            assert means.loss == pytest.approx(wanted.loss, rel=TOLERANCE), case
            assert means.lm_loss == pytest.approx(wanted.lm_loss, rel=TOLERANCE), case
            check_gradients(f"rank {rank}, {case}", result[case]["gradients"], wanted.weights)
        assert any(result[case]["gradients"] for result in results)
        with WeightDirectory(save / case) as stored:
            assert stored.tensors.keys() == wanted.base.keys()
            for key, gradient in wanted.base.items():
                largest = float(gradient.abs().max())
                assert largest > 0, key
                torch.testing.assert_close(
                    stored.read(key),
                    gradient,
                    rtol=TOLERANCE,
                    atol=TOLERANCE * largest,
                    msg=lambda text, key=key, case=case: f"{name}, {case}: {key}: {text}",
                )


def expect_all(rank_pool: RankPool, directory: Path, cases: dict[str, Case], *, favours: bool) -> dict[str, Expected]:
    (shapes,) = rank_pool.run(f"{TRAINING_CASES}:weight_shapes", world_size=1, directory=directory, cases=cases)
    return {name: expect(directory, case, shapes[name], favours=favours) for name, case in cases.items()}


@pytest.fixture(scope="module")
def expected(rank_pool: RankPool, directory: Path) -> dict[str, Expected]:
    return expect_all(rank_pool, directory, CASES, favours=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_of_both_equal_the_reference(
    name: str, rank_pool: RankPool, directory: Path, tmp_path: Path, expected: dict[str, Expected]
) -> None:
    check(rank_pool, name, CASES, expected, directory=directory, save=tmp_path, favours=True)


# Qwen3: each tensor-parallel rank sees its own heads, whose norms are one weight.
@pytest.mark.parametrize("name", ["one", "TP2", "TP2+SP", "PP2"])
def test_a_tied_weight_gets_the_gradients_of_both_its_uses(
    name: str, rank_pool: RankPool, tied_directory: Path, tmp_path: Path
) -> None:
    expected = expect_all(rank_pool, tied_directory, TIED, favours=False)
    check(rank_pool, name, TIED, expected, directory=tied_directory, save=tmp_path, favours=False)


def joint(**options: Any) -> dict[str, Any]:
    return {**eagle_preset("eagle3")["config"], "eagle_freeze_base_model": False, **options}


RUNS = {
    "one": (Run(Layout(), draft=joint(eagle_train_through_features=True)), 1),
    "PP2, bf16": (Run(Layout(pipeline=2), dtype="bfloat16", draft=joint(), options={"bf16": True}), 2),
    "TP2 PP2+SP": (Run(Layout(tensor=2, pipeline=2, sequence_parallel=True), draft=joint()), 4),
    "DP2, distributed optimizer": (Run(Layout(), draft=joint(), options={"use_distributed_optimizer": True}), 2),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_of_both_is_the_run_that_never_stopped(
    name: str, rank_pool: RankPool, directory: Path, tmp_path: Path
) -> None:
    run, world_size = RUNS[name]
    results = check_resumed(
        rank_pool, run, world_size=world_size, directory=directory, save=tmp_path, copies=("draft_embedding.weight",)
    )
    whole, _ = results[0]["logs"]
    own = [line["lm_loss"] for line in whole if "loss" in line]
    assert own[-1] < own[0]
    assert "validation_lm_loss" in whole[-1]


@pytest.mark.parametrize("layout", [Layout(), Layout(pipeline=2)], ids=["one", "PP2"])
def test_somebody_elses_schedule_trains_both(
    layout: Layout, rank_pool: RankPool, directory: Path, tmp_path: Path
) -> None:
    results = rank_pool.run(
        "tests.parallel.trainer_cases:schedule_of_megatron",
        world_size=layout.pipeline,
        layout=layout,
        directory=directory,
        save=tmp_path,
        draft=joint(),
    )
    for result in results:
        assert any(name.startswith("decoder.layers.") for name in result["trainer"])
        assert result["megatron"].keys() == result["trainer"].keys()
        for name, gradient in result["trainer"].items():
            # megatron-core divides by the number of tokens in float32.
            torch.testing.assert_close(result["megatron"][name], gradient, rtol=2e-7, atol=0)
    own = [float(report["lm loss"][0]) for report in results[-1]["report"]]
    assert sum(own) == pytest.approx(float(results[-1]["sums"][-2]), rel=1e-12)

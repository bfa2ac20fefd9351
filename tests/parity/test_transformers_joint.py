"""Base and draft trained together on a transformers model: loss and gradients of both are the Megatron host's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from mcore_spec.bases.transformers import TransformersBase
from mcore_spec.conversion import Mode
from mcore_spec.weights.safetensors_io import WeightDirectory
from tests.parity.hf_models import TinyModel
from tests.parity.host_cases import HostCase, HostRun
from tests.parity.test_transformers_host import (
    TOLERANCE,
    check_gradients,
    documents,
    drafted,
    packed,
    padded,
    randomised,
)
from tests.pool import RankPool
from tests.tiny import draft_to_target, joint_mode

# A scaled rotary embedding, a tied head, fused projections with two rotary tables and a window, norms of heads.
FAMILIES = ("llama31", "smollm2_tied", "phi3_longrope_window", "qwen3")


MODES: dict[str, Mode] = {
    "eagle3": joint_mode("eagle3"),
    "eagle3, reduced vocabulary, through features": joint_mode("eagle3", eagle_train_through_features=True),
    "eagle1, through features": joint_mode("eagle1", eagle_train_through_features=True),
    "eagle-mtp, labels": joint_mode("eagle-mtp", eagle_self_logit_distillation=False),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest,
    tiny_models: dict[str, TinyModel],
    rank_pool: RankPool,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[PreTrainedModel, HostRun, Path]]:
    """Every algorithm on one base: the transformers model, the Megatron host's step, the gradients of its base."""
    tiny, save = tiny_models[request.param], tmp_path_factory.mktemp("gradients")
    models, cases = {}, {}
    for name, mode in MODES.items():
        d2t = draft_to_target() if "reduced" in name else None
        models[name] = drafted(tiny, mode, d2t)
        all_documents = documents(tiny.model.config.vocab_size)
        cases[name] = HostCase(tiny.directory, mode, d2t, randomised(models[name]), all_documents)
    (runs,) = rank_pool.run("tests.parity.host_cases:megatron_joint_steps", world_size=1, cases=cases, save=save)
    return {name: (models[name], runs[name], save / name) for name in MODES}


@pytest.mark.parametrize("form", ["padded", "packed", "packed, checkpointed"])
@pytest.mark.parametrize("mode", list(MODES))
def test_loss_and_gradients_are_the_megatron_hosts(family: Any, mode: str, form: str) -> None:
    model, expected, directory = family[mode]
    model.train()
    model.zero_grad()
    if "checkpointed" in form:
        model.activation_checkpointing_enable()
    all_documents = documents(model.config.vocab_size)
    output = model(**(padded if form == "padded" else packed)(all_documents))
    if "checkpointed" in form:
        model.activation_checkpointing_disable()
    output.loss.backward()
    outcome, counted = expected.outcome, expected.outcome.judged_by_step[0]
    lm_sum, num_labels = outcome.language_model
    assert counted > 10 and num_labels > counted
    assert abs(float(output.loss.detach() - outcome.loss / counted)) <= TOLERANCE
    assert abs(float(output.lm_loss - lm_sum / num_labels)) <= TOLERANCE and not output.lm_loss.requires_grad
    draft: Any = TransformersBase(model).draft()
    gradients = {name: gradient / counted for name, gradient in expected.gradients.items()}
    gradients = {f"eagle_module.{name}": gradient for name, gradient in gradients.items()}
    assert draft is model.eagle_module
    with WeightDirectory(directory) as stored:
        gradients |= {name: stored.read(name) / counted for name in stored.tensors}
    check_gradients(model, gradients)

"""A draft on a transformers model: the same loss and gradients as on the Megatron host, from the same weights.

The two share the draft and its loss; what is compared is everything before: the base's forward on packed documents,
its embedding and head, where rows are cut and what counts.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mcore_spec import convert
from mcore_spec.bases.transformers import TransformersBase
from mcore_spec.config import eagle_preset
from mcore_spec.conversion import Mode
from mcore_spec.data.document import Document
from tests.parity.hf_models import TinyModel, norm_in_float64
from tests.parity.host_cases import HostCase, HostRun
from tests.pool import RankPool
from tests.tiny import draft_to_target

TOLERANCE = 1e-10
FAMILIES = (
    "llama2",
    "llama31",
    "smollm2_tied",
    "mistral_window",
    "phi3",
    "phi3_longrope_window",
    "qwen15",
    "qwen2_tied_window",
    "qwen3",
)
MODES: dict[str, Mode] = {
    "eagle3": eagle_preset("eagle3"),
    "eagle3, reduced vocabulary": eagle_preset("eagle3"),
    "eagle1": eagle_preset("eagle1"),
    "eagle-mtp": eagle_preset("eagle-mtp"),
    "medusa": "medusa",
}
LENGTHS = (19, 5, 12, 16)
IGNORED = -100


def documents(vocab_size: int) -> list[Document]:
    """Of several lengths, beyond LongRoPE's original one and not, with gaps in what counts."""
    generator = np.random.RandomState(3)
    return [Document(generator.randint(3, vocab_size, size=length), generator.rand(length) < 0.7) for length in LENGTHS]


def padded(all_documents: list[Document]) -> dict[str, Tensor]:
    """Every other document is padded on the left."""
    width = max(LENGTHS) + 2
    batch = {
        "input_ids": torch.zeros(len(LENGTHS), width, dtype=torch.int64),
        "attention_mask": torch.zeros(len(LENGTHS), width, dtype=torch.int64),
        "labels": torch.full((len(LENGTHS), width), IGNORED),
    }
    for row, (token_ids, mask) in enumerate(all_documents):
        start = (width - len(token_ids)) * (row % 2)
        place = slice(start, start + len(token_ids))
        batch["input_ids"][row, place] = torch.from_numpy(token_ids)
        batch["attention_mask"][row, place] = 1
        batch["labels"][row, place] = torch.from_numpy(np.where(mask, token_ids, IGNORED))
    return batch


def packed(all_documents: list[Document]) -> dict[str, Tensor]:
    """The documents behind each other, told apart by their positions."""
    token_ids = np.concatenate([document.token_ids for document in all_documents])
    mask = np.concatenate([document.mask for document in all_documents])
    return {
        "input_ids": torch.from_numpy(token_ids)[None],
        "labels": torch.from_numpy(np.where(mask, token_ids, IGNORED))[None],
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
    }


def drafted(tiny: TinyModel, mode: Mode, d2t: Tensor | None) -> PreTrainedModel:
    """A copy of the model with a draft whose weights are drawn, so that none is at its default."""
    model = copy.deepcopy(tiny.model)
    # A copy's norms are bound to the original.
    norm_in_float64(model)
    converted: Any = convert(model, mode, d2t=d2t)
    return converted


def randomised(model: PreTrainedModel) -> dict[str, Tensor]:
    draft: Any = TransformersBase(model).draft()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return {name: value.clone() for name, value in draft.state_dict().items()}


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tiny_models: dict[str, TinyModel], rank_pool: RankPool
) -> dict[str, tuple[PreTrainedModel, dict[str, Tensor], HostRun]]:
    """Every algorithm on one base: the transformers model, its draft's initial weights, the Megatron host's step."""
    tiny = tiny_models[request.param]
    models, initial, cases = {}, {}, {}
    for name, mode in MODES.items():
        d2t = draft_to_target() if "reduced" in name else None
        models[name] = drafted(tiny, mode, d2t)
        draft: Any = TransformersBase(models[name]).draft()
        initial[name] = {key: value.clone() for key, value in draft.state_dict().items()}
        all_documents = documents(tiny.model.config.vocab_size)
        cases[name] = HostCase(tiny.directory, mode, d2t, randomised(models[name]), all_documents)
    (runs,) = rank_pool.run("tests.parity.host_cases:megatron_steps", world_size=1, cases=cases)
    return {name: (models[name], initial[name], runs[name]) for name in MODES}


def check_gradients(module: nn.Module, expected: dict[str, Tensor]) -> None:
    """Every parameter has one, and it is the expected one."""
    parameters = dict(module.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, theirs in expected.items():
        found, largest = parameters[name].grad, float(theirs.abs().max())
        assert found is not None and largest > 0, name
        assert float((found - theirs).abs().max()) <= TOLERANCE * max(1.0, largest), name


@pytest.mark.parametrize("form", [padded, packed])
@pytest.mark.parametrize("mode", list(MODES))
def test_loss_and_gradients_are_the_megatron_hosts(family: Any, mode: str, form: Any) -> None:
    model, _, expected = family[mode]
    model.train()
    model.zero_grad()
    output = model(**form(documents(model.config.vocab_size)))
    output.loss.backward()
    counted = expected.outcome.judged_by_step
    assert counted[0] > 10
    assert abs(float(output.loss.detach() - expected.outcome.loss / counted[0])) <= TOLERANCE
    assert torch.allclose(output.accuracy, expected.outcome.correct_by_step / counted)
    draft: Any = TransformersBase(model).draft()
    check_gradients(draft, {name: gradient / counted[0] for name, gradient in expected.gradients.items()})
    assert all(parameter.grad is None for parameter in model.model.parameters())


@pytest.mark.parametrize("mode", list(MODES))
def test_initial_weights_are_the_megatron_hosts(family: Any, mode: str) -> None:
    _, initial, expected = family[mode]
    assert initial.keys() == expected.initial.keys()
    assert [name for name, value in initial.items() if not torch.equal(value, expected.initial[name])] == []

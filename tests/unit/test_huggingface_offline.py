"""Trainer on stored hidden states: the run is the one on the base itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, TrainingArguments

import mcore_spec
from mcore_spec import ConfigError
from mcore_spec.bases.transformers import TransformersBase
from mcore_spec.config import eagle_preset
from mcore_spec.conversion import Mode, conversion_of, find_algorithm
from mcore_spec.data.hidden_states import DocumentStates, StatesStore, StatesWriter
from mcore_spec.data.hidden_states.writer import finish_store
from mcore_spec.huggingface.data import ConversationDataset, DraftCollator
from mcore_spec.huggingface.offline import StatesCollator, StatesDataset
from mcore_spec.huggingface.trainer import DraftTrainer
from tests.tiny import VOCAB_SIZE, write_hf_model
from tests.unit.test_hidden_states import description
from tests.unit.test_huggingface_trainer import Documents

MODES: dict[str, Mode] = {"eagle3": eagle_preset("eagle3"), "eagle1": eagle_preset("eagle1"), "medusa": "medusa"}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("base") / "llama", "llama", tied=False, dtype=torch.float64)


def store_of(base_dir: Path, directory: Path, aux_layer_ids: tuple[int, ...], *, is_normed: bool) -> StatesStore:
    """What the model's own forward gives, one conversation at a time."""
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    documents = Documents().documents
    raw: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _module, _inputs, output: raw.append(output))
    about = description(
        backend="transformers",
        num_documents=len(documents),
        seq_length=max(len(token_ids) for token_ids, _ in documents),
        vocab_size=VOCAB_SIZE,
        hidden_size=model.config.hidden_size,
        # One more than the draft reads, in front of its own.
        aux_layer_ids=tuple(sorted({0, *aux_layer_ids})),
        last_is_normed=is_normed,
    )
    with StatesWriter(directory, about) as writer:
        for number, (token_ids, mask) in enumerate(documents):
            with torch.no_grad():
                output = model(torch.from_numpy(token_ids)[None], output_hidden_states=True)
            # hidden_states[0] is the embedding; the last one stands behind the final norm.
            aux = torch.stack([output.hidden_states[layer + 1][0] for layer in about.aux_layer_ids], dim=1)
            last = output.hidden_states[-1][0] if is_normed else raw[-1][0]
            writer.append(number, DocumentStates(torch.from_numpy(token_ids), torch.from_numpy(mask), aux, last))
    finish_store(directory)
    return StatesStore(directory)


def trained(model: Any, output: Path, dataset: Dataset[Any], collator: Any) -> Mapping[str, Tensor]:
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    DraftTrainer(model=model, args=arguments, train_dataset=dataset, data_collator=collator).train()
    state: Mapping[str, Tensor] = model.state_dict()
    return state


@pytest.mark.parametrize("is_normed", [True, False])
@pytest.mark.parametrize("mode", list(MODES))
def test_stored_states_train_as_the_base_does(mode: str, is_normed: bool, base_dir: Path, tmp_path: Path) -> None:
    live = mcore_spec.convert(AutoModelForCausalLM.from_pretrained(base_dir), MODES[mode], seed=1)
    expected = trained(live, tmp_path / "live", ConversationDataset(Documents()), DraftCollator())
    model: Any = mcore_spec.convert(AutoModelForCausalLM.from_pretrained(base_dir), MODES[mode], seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    conversion = conversion_of(model)
    assert conversion is not None
    layers = find_algorithm(conversion.algorithm).task(conversion.config).aux_layer_ids
    store = store_of(base_dir, tmp_path / "store", layers, is_normed=is_normed)
    dataset = StatesDataset(store, TransformersBase(model), aux_layer_ids=layers)
    # The layers of this one would give other states.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
    found = trained(model, tmp_path / "stored", dataset, StatesCollator())
    of_draft = [name for name in before if not name.startswith(("model.", "lm_head."))]
    assert any((expected[name] - before[name]).abs().max() > 1e-3 for name in of_draft)
    for name in of_draft:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-11)


def test_the_bases_loss_is_that_of_the_stored_states(base_dir: Path) -> None:
    model: Any = mcore_spec.convert(AutoModelForCausalLM.from_pretrained(base_dir), "medusa").train()
    token_ids = torch.tensor([[5, 6, 7, 8]])
    states = torch.randn(1, 4, model.config.hidden_size, dtype=torch.float64)
    output = model(input_ids=token_ids, labels=token_ids, last_hidden_states=states)
    expected = F.cross_entropy(states[0, :-1] @ model.lm_head.weight.T, token_ids[0, 1:])
    torch.testing.assert_close(output.lm_loss, expected.detach())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"aux_hidden_states": None}, r"aux_hidden_states is missing; this draft reads \[1, 4, "),
        ({"aux_hidden_states": torch.zeros(1, 4, 3)}, r"aux_hidden_states is of shape \[1, 4, 3\]"),
        ({"last_hidden_states": torch.zeros(1, 3, 8)}, r"last_hidden_states is of shape \[1, 3, 8\]"),
        ({"last_hidden_states": None}, r"last_hidden_states is missing; this draft reads \[1, 4, "),
    ],
)
def test_states_that_do_not_fit(changes: dict[str, Any], says: str, base_dir: Path) -> None:
    model: Any = mcore_spec.convert(AutoModelForCausalLM.from_pretrained(base_dir), MODES["eagle3"])
    size = model.config.hidden_size
    states = {"last_hidden_states": torch.zeros(1, 4, size), "aux_hidden_states": torch.zeros(1, 4, 2 * size)}
    token_ids = torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(ConfigError, match=says):
        model(input_ids=token_ids, labels=token_ids, **{**states, **changes})


def test_states_that_are_not_read(base_dir: Path) -> None:
    model: Any = mcore_spec.convert(AutoModelForCausalLM.from_pretrained(base_dir), MODES["eagle1"])
    token_ids, states = torch.tensor([[5, 6, 7, 8]]), torch.zeros(1, 4, model.config.hidden_size)
    with pytest.raises(ConfigError, match="aux_hidden_states is given, and this draft reads no aux layers"):
        model(input_ids=token_ids, labels=token_ids, last_hidden_states=states, aux_hidden_states=states)

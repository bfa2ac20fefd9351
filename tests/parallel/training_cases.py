"""What the ranks do for `test_training.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mcore_spec.bases.feature_sources import LiveFeatures, StoredFeatures
from mcore_spec.bases.features import features_for
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.config import EagleAlgorithm, TrainingConfig, eagle_preset
from mcore_spec.conversion import convert
from mcore_spec.data.batch import Batch, Batches, Document, make_batch
from mcore_spec.data.hidden_states import StatesStore
from mcore_spec.data.hidden_states.batches import StoredBatches, StoreReader
from mcore_spec.data.noise import draw_noise_key
from mcore_spec.data.seeds import RandomUse, random_state
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.parallel.sharding import Shard, gather_whole, sharded_tensors
from mcore_spec.training.data import ReadStates
from mcore_spec.training.optimizer import DraftOptimizer
from mcore_spec.training.step import DraftStep, MakeFeatures
from mcore_spec.training.totals import Totals
from tests.tiny import VOCAB_SIZE, draft_to_target, drawn, fill, import_base

NUM_STEPS = 3
DECAY = 0.7
# In the reduced draft vocabulary too.
FAVOURITE = 3


class Case(NamedTuple):
    """A draft and how the documents of one optimizer step are cut.

    Attributes:
        architecture: of the draft.
        has_d2t: whether its vocabulary is reduced.
        hard_labels: the data's next token instead of the base's distribution.
        cut: documents of each micro-batch, in order; shared out over the data-parallel ranks in turn.
        recompute: activations of each TTT step.
        mixes_states: the draft's own with the base's, instead of growing keys.
        pad_to: rows of each document, as without packing.
        keeps_all: rows whose teacher argmax is not in the draft vocabulary too.
        member: of the EAGLE family.
        noise: on the features.
        detaches: the states that steps hand on.
        trains_base: too, for the next token.
        through_features: the draft's gradient flows into the base.
    """

    architecture: dict[str, Any]
    has_d2t: bool = False
    hard_labels: bool = False
    cut: tuple[tuple[int, ...], ...] = ((0, 1, 2), (3, 4), (5,), (6,))
    recompute: bool = False
    mixes_states: bool = False
    keeps_all: bool = False
    pad_to: int | None = None
    member: EagleAlgorithm = "eagle3"
    noise: float = 0.0
    detaches: bool = False
    trains_base: bool = False
    through_features: bool = False


CASES = {
    "whole vocabulary": Case({}),
    "reduced vocabulary": Case({"num_hidden_layers": 2, "fc_norm": True}, has_d2t=True),
    "hard labels": Case({"has_lm_head": True}, hard_labels=True),
    "reduced, hard labels": Case({"norm_before_fc": True}, has_d2t=True, hard_labels=True),
    "one row": Case({}, cut=((0, 1, 2, 3, 4, 5, 6), ()), has_d2t=True),
    "one document each": Case({}, cut=((6,), (5,), (4,), (3,), (2,), (1,), (0,), ())),
    "recompute": Case({}, recompute=True),
    "mixed": Case({"num_hidden_layers": 2}, mixes_states=True),
    "mixed, one row, recompute": Case({}, cut=((6, 5, 4, 3, 2, 1, 0), ()), mixes_states=True, recompute=True),
    "padded": Case({}, cut=((0, 6), (1, 2), (3, 4), (5,)), has_d2t=True, pad_to=16),
    "detached": Case({"num_hidden_layers": 2}, has_d2t=True, detaches=True),
    "all rows kept": Case({}, has_d2t=True, keeps_all=True),
    "parallel heads": Case({"parallel_draft_step": 3, "parallel_draft_heads_num_layers": 2}, has_d2t=True),
}
LENGTHS = (9, 2, 14, 1, 7, 12, 5)


def documents() -> list[Document]:
    """Tokens and masks: an ordinary one, a mask that is all empty, all set, or has gaps."""
    generator = torch.Generator().manual_seed(11)
    made = []
    for number, length in enumerate(LENGTHS):
        tokens = torch.randint(VOCAB_SIZE, (length,), generator=generator)
        mask = torch.rand(length, generator=generator) < 0.7
        if number == 4:
            mask[:] = False
        if number == 5:
            mask[:] = True
        made.append(Document(tokens.numpy(), mask.numpy()))
    return made


def mixing_state(number: int) -> np.random.RandomState:
    """What decides which rows of a document are mixed, wherever the document stands."""
    return random_state(5, RandomUse.MIXING, number)


def noise_key(number: int) -> int:
    """What the noise on the features of a document is made from, wherever the document stands."""
    return draw_noise_key(random_state(5, RandomUse.NOISE, number))


def replaced_rows(number: int) -> list[list[bool]]:
    """Of a document that stands alone."""
    batch = make_batch([documents()[number]], num_steps=NUM_STEPS, num_samples=1, mixing=[mixing_state(number)])
    assert batch.replaced is not None
    return batch.replaced.tolist()


def converted(directory: Path, layout: Layout, case: Case, *, favours: bool = True) -> GPTModel:
    model = import_base(directory, layout).model
    if favours:
        _favour_a_token(MegatronBase(model))
    config = {
        "eagle_ttt_steps": NUM_STEPS,
        "eagle_loss_decay_factor": DECAY,
        "eagle_self_logit_distillation": not case.hard_labels,
        "eagle_mix_hidden_states": case.mixes_states,
        "eagle_keep_out_of_vocabulary": case.keeps_all,
        "eagle_feature_noise": case.noise,
        "eagle_detach_states": case.detaches,
        "eagle_freeze_base_model": not case.trains_base,
        "eagle_train_through_features": case.through_features,
        "eagle_architecture_config": {
            **eagle_preset(case.member)["config"]["eagle_architecture_config"],
            **case.architecture,
        },
    }
    convert(model, [("eagle", config)], d2t=draft_to_target() if case.has_d2t else None)
    base = MegatronBase(model)
    draft = base.draft()
    if draft is not None:
        fill(draft, base.tp)
    return model


@torch.no_grad()
def _favour_a_token(base: MegatronBase) -> None:
    """Make one token likely for base and draft, or a draft that is not trained would never be right."""
    if base.is_last_stage:
        weight = base.head_weight()
        row = FAVOURITE - base.tp.rank * weight.shape[0]
        if 0 <= row < weight.shape[0]:
            weight[row] *= 8


def batches(model: GPTModel, step: DraftStep, case: Case) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches; an empty cut is a batch of one document that counts nothing."""
    every, groups = documents(), model.pg_collection
    empty = Document(every[4].token_ids, every[4].mask)
    for number, cut in enumerate(case.cut):
        if number % groups.dp.size() != groups.dp.rank():
            continue
        yield make_batch(
            [every[index] for index in cut] or [empty],
            mixing=[mixing_state(index) for index in cut or (4,)] if case.mixes_states else None,
            noise_keys=[noise_key(index) for index in cut or (4,)] if case.noise else None,
            numbers=cut or (4,),
            num_steps=step.num_steps,
            document_multiple=step.document_multiple,
            row_multiple=step.row_multiple,
            num_samples=1,
            pad_to=case.pad_to,
        )


class OneStep(NamedTuple):
    """The batches of one optimizer step, as a trainer asks for them."""

    made: list[Batch]

    def micro_batches(self, index: int) -> Iterator[Batch]:
        return iter(self.made if index == 0 else ())


def gradients(
    *,
    layout: Layout,
    directory: Path,
    names: Sequence[str],
    cases: Mapping[str, Case] | None = None,
    store: Path | None = None,
    read_states: ReadStates | None = None,
) -> dict[str, dict[str, Any]]:
    """Each of the named cases: the reduced totals, and every whole gradient where the draft lives.

    Without a `store` the base runs; with one its hidden states are read there, or where `read_states` says.
    """
    found = {}
    if store is not None:
        opened = StatesStore(store)
        read_states = lambda _model, step: StoreReader(opened, aux_layer_ids=step.task.aux_layer_ids)  # noqa: E731
    make_features: MakeFeatures = LiveFeatures if read_states is None else partial(StoredFeatures, last_is_normed=True)
    with parallel_runtime(layout):
        for name in names:
            case = (cases or CASES)[name]
            model = converted(directory, layout, case)
            before = checksum(model)
            step = DraftStep(model, recompute=case.recompute, make_features=make_features)
            made: Batches = OneStep(list(batches(model, step, case)))
            if read_states is not None and step.base.is_last_stage:
                made = StoredBatches(made, read_states(model, step))
            optimizer = DraftOptimizer(model, TrainingConfig(data_path=("x",), train_iters=1), num_iterations=1)
            optimizer.zero_grad()
            totals = Totals.zeros(step.num_steps, device=torch.device("cpu"), num_regressed=step.task.num_regressed)
            for batch in made.micro_batches(0):
                output = step(batch)
                if output is not None:
                    output.loss.backward()
                    is_counted = model.pg_collection.cp.rank() == 0
                    totals.add(output, num_tokens=batch.num_tokens if is_counted else 0)
            totals.reduce(data_group=model.pg_collection.dp_cp, pipeline_group=model.pg_collection.pp)
            optimizer.reduce_gradients(num_rows=totals.num_rows)
            assert checksum(model) == before, "the base moved"
            found[name] = {"totals": totals.sums, "gradients": whole_gradients(model)}
    return found


def checksum(model: GPTModel) -> dict[str, str]:
    """Of the bits of everything that is not trained, buffers too."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    kept = [(name, each) for name, each in (*model.named_parameters(), *model.named_buffers()) if name not in trained]
    return {
        name: sha256(each.detach().flatten().view(torch.uint8).numpy().tobytes()).hexdigest() for name, each in kept
    }


def whole_gradients(model: GPTModel) -> dict[str, Tensor] | None:
    draft = MegatronBase(model).draft()
    if draft is None:
        return None
    return {
        entry.name: gather_whole(entry.tensor.main_grad, entry.shard, draft.tp)
        for entry in sharded_tensors(draft)
        if entry.tensor.requires_grad
    }


def reference_inputs(*, directory: Path, case: Case | None = None) -> dict[str, Any]:
    """What the oracle needs of the base: hidden states of each document alone, embedding and head."""
    layout = Layout()
    with parallel_runtime(layout):
        model = converted(directory, layout, case or CASES["whole vocabulary"])
        base = MegatronBase(model)
        step = DraftStep(model)
        states = []
        for document in documents():
            features = base.features(torch.from_numpy(document.token_ids)[None], aux_layer_ids=step.task.aux_layer_ids)
            assert features is not None
            assert step.draft is not None
            states.append((features_for(step.draft, features)[:, 0], features.last[:, 0]))
        return {
            "states": states,
            "embedding": gather_whole(base.embedding_weight(), Shard(0, VOCAB_SIZE), base.tp),
            "head": gather_whole(base.head_weight(), Shard(0, VOCAB_SIZE), base.tp),
        }


def weight_shapes(*, directory: Path, cases: Mapping[str, Case] | None = None) -> dict[str, dict[str, tuple[int, ...]]]:
    """Each case's trainable tensors."""
    layout = Layout()
    with parallel_runtime(layout):
        found = {}
        for name, case in (cases or CASES).items():
            draft = MegatronBase(converted(directory, layout, case)).draft()
            assert draft is not None
            found[name] = {key: tuple(p.shape) for key, p in draft.named_parameters()}
        return found


def drawn_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: drawn(name, shape).requires_grad_() for name, shape in shapes.items()}

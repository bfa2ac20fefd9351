"""What the ranks do for `test_typical.py` and the tests of training and exporting Medusa's heads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.config import TrainingConfig
from mcore_spec.conversion import convert
from mcore_spec.data.batch import Batch, Document, make_batch
from mcore_spec.drafts.medusa import MedusaDraft
from mcore_spec.evaluation.acceptance import Evaluator, Settings
from mcore_spec.evaluation.decoding import Answer, Decoder
from mcore_spec.evaluation.report import table, to_json
from mcore_spec.evaluation.typical import TypicalAcceptance
from mcore_spec.export.draft import export_draft
from mcore_spec.export.plan import ExportFormat
from mcore_spec.export.reader import attach_exported
from mcore_spec.parallel.collectives import gather_without_grad
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.parallel.sharding import Shard, gather_whole
from mcore_spec.training.optimizer import DraftOptimizer
from mcore_spec.training.step import DraftStep
from mcore_spec.training.totals import Means, Totals
from tests.parallel.evaluation_cases import CONVERSATIONS, OSL, PROMPTS, Digits, loaded, requests_of
from tests.parallel.evaluation_cases import Case as EvaluationCase
from tests.parallel.trainer_cases import Corpus, Run, overfitting, trainer_of
from tests.parallel.trainer_cases import converted as model_of_run
from tests.parallel.training_cases import FAVOURITE, checksum, documents, whole_gradients
from tests.parity.export_cases import converted as converted_for_export
from tests.parity.export_cases import import_base as import_for_export
from tests.tiny import VOCAB_SIZE, draft_to_target, drawn, fill, import_base

DECAY = 0.7


class Case(NamedTuple):
    """Heads, and how the documents of one optimizer step are cut.

    Attributes:
        num_heads: of the draft.
        num_layers: residual blocks of a head.
        soft_labels: the base's distribution instead of the data's next token.
        cut: documents of each micro-batch, in order; shared out over the data-parallel ranks in turn.
        recompute: activations of the residual blocks.
        has_d2t: a draft vocabulary.
        pad_to: rows of each document, as without packing.
    """

    num_heads: int = 3
    num_layers: int = 1
    soft_labels: bool = False
    cut: tuple[tuple[int, ...], ...] = ((0, 1, 2), (3, 4), (5,), (6,))
    recompute: bool = False
    pad_to: int | None = None
    has_d2t: bool = False

    @property
    def draft_ids(self) -> list[int] | None:
        """The tokens of the draft vocabulary."""
        d2t = draft_to_target()
        return (d2t + torch.arange(len(d2t))).tolist() if self.has_d2t else None

    @property
    def favourite(self) -> int:
        """The favourite token's row of the heads."""
        return FAVOURITE if self.draft_ids is None else self.draft_ids.index(FAVOURITE)

    @property
    def config(self) -> dict[str, Any]:
        return {
            "medusa_num_heads": self.num_heads,
            "medusa_num_layers": self.num_layers,
            "medusa_loss_decay_factor": DECAY,
            "medusa_self_logit_distillation": self.soft_labels,
        }


CASES = {
    "hard labels": Case(),
    "soft labels, two layers": Case(num_layers=2, soft_labels=True),
    "one head": Case(num_heads=1, soft_labels=True),
    "five heads, one row, recompute": Case(num_heads=5, cut=((6, 5, 4, 3, 2, 1, 0), ()), recompute=True),
    "padded": Case(num_heads=2, soft_labels=True, cut=((0, 6), (1, 2), (3, 4), (5,)), pad_to=16),
    "draft vocabulary, hard labels": Case(num_heads=2, has_d2t=True),
    "draft vocabulary, soft labels": Case(num_heads=2, soft_labels=True, has_d2t=True),
}


def converted(directory: Path, layout: Layout, case: Case) -> GPTModel:
    """The tiny base with drawn heads; one token is likely for all, or heads that are not trained were never right."""
    model = import_base(directory, layout).model
    convert(model, [("medusa", case.config)], d2t=draft_to_target() if case.has_d2t else None)
    base = MegatronBase(model)
    if base.is_last_stage:
        draft = base.draft()
        assert isinstance(draft, MedusaDraft)
        fill(draft, base.tp)
        with torch.no_grad():
            heads = [(head.weight, case.favourite) for head in draft.own_heads()]
            for weight, favourite in [(base.head_weight(), FAVOURITE), *heads]:
                row = favourite - base.tp.rank * weight.shape[0]
                if 0 <= row < weight.shape[0]:
                    weight[row] *= 8
    return model


def drawn_weights(shapes: dict[str, tuple[int, ...]], case: Case) -> dict[str, Tensor]:
    """The same heads, whole."""
    weights = {name: drawn(name, shape) for name, shape in shapes.items()}
    for name, weight in weights.items():
        if name.endswith("lm_head.weight"):
            weight[case.favourite] *= 8
    return {name: weight.requires_grad_() for name, weight in weights.items()}


def batches(model: GPTModel, step: DraftStep, case: Case) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches; an empty cut is a batch of one document that counts nothing."""
    every, groups = documents(), model.pg_collection
    empty = Document(every[4].token_ids, every[4].mask)
    for number, cut in enumerate(case.cut):
        if number % groups.dp.size() == groups.dp.rank():
            yield make_batch(
                [every[index] for index in cut] or [empty],
                num_steps=step.num_steps,
                document_multiple=step.document_multiple,
                row_multiple=step.row_multiple,
                num_samples=1,
                pad_to=case.pad_to,
            )


def gradients(*, layout: Layout, directory: Path) -> dict[str, dict[str, Any]]:
    """Each case: the reduced totals, and every whole gradient where the draft lives."""
    found = {}
    with parallel_runtime(layout):
        for name, case in CASES.items():
            model = converted(directory, layout, case)
            before = checksum(model)
            step = DraftStep(model, recompute=case.recompute)
            optimizer = DraftOptimizer(model, TrainingConfig(data_path=("x",), train_iters=1), num_iterations=1)
            optimizer.zero_grad()
            totals = Totals.zeros(step.num_steps, device=torch.device("cpu"))
            for batch in batches(model, step, case):
                output = step(batch)
                if output is not None:
                    output.loss.backward()
                    totals.add(output, num_tokens=0)
            totals.reduce(data_group=model.pg_collection.dp_cp, pipeline_group=model.pg_collection.pp)
            optimizer.reduce_gradients(num_rows=totals.num_rows)
            assert checksum(model) == before, "the base moved"
            found[name] = {"totals": totals.sums, "gradients": whole_gradients(model)}
    return found


def reference_inputs(*, directory: Path) -> dict[str, Any]:
    """What the oracle needs: hidden states of each document alone, the base's head, and each case's tensors."""
    layout = Layout()
    with parallel_runtime(layout):
        models = {name: converted(directory, layout, case) for name, case in CASES.items()}
        base = MegatronBase(models["hard labels"])
        states = []
        for document in documents():
            features = base.features(torch.from_numpy(document.token_ids)[None])
            assert features is not None
            states.append(features.last[:, 0])
        shapes = {}
        for name, model in models.items():
            draft = MegatronBase(model).draft()
            assert draft is not None
            # Of the vocabulary's padding there is none on one rank.
            shapes[name] = {key: tuple(p.shape) for key, p in draft.named_parameters()}
        head = gather_whole(base.head_weight(), Shard(0, VOCAB_SIZE), base.tp)
        return {"states": states, "head": head, "shapes": shapes}


# --- whole runs -------------------------------------------------------------------------------------


class DistinctCorpus(Corpus):
    """No token stands in it twice: a head sees the last token, and little of those before it."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        super().__init__(lengths)
        tokens = iter(np.random.default_rng(5).permutation(VOCAB_SIZE))
        self._documents = [Document(np.fromiter(tokens, np.int64, n), np.arange(n) > 0) for n in lengths]


def overfit(*, directory: Path, save: Path, draft: dict[str, Any], num_iterations: int) -> Means:
    """Figures after many steps on a few conversations."""
    run = Run(Layout(), has_d2t=False, draft=draft)
    with parallel_runtime(run.layout):
        config = overfitting(run, num_iterations=num_iterations, lr=2e-2, min_lr=1e-3)
        trainer = trainer_of(model_of_run(directory, run), config, save, DistinctCorpus((12, 10, 14, 9)))
        for _ in range(num_iterations):
            trainer.train_step()
        means = trainer.evaluate()
        assert means is not None
        return means


# --- serving ----------------------------------------------------------------------------------------


def decode_typically(*, case: EvaluationCase, typical: TypicalAcceptance) -> list[Answer]:
    """Continue all prompts, in one batch."""
    with parallel_runtime(case.layout):
        decoder = Decoder(loaded(case), topology=case.topology, typical=typical)
        return decoder.decode(requests_of(PROMPTS)).answers


def evaluate_typically(*, case: EvaluationCase, typical: TypicalAcceptance) -> dict[str, Any]:
    """A whole evaluation, as JSON and as a table."""
    with parallel_runtime(case.layout):
        settings = Settings(topology=case.topology, osl=OSL, typical=typical, batch_size=2)
        evaluation = Evaluator(loaded(case), Digits(), settings)(CONVERSATIONS)
        return {"json": to_json(evaluation), "table": table(evaluation)}


# --- export -----------------------------------------------------------------------------------------


class ExportedHeads(NamedTuple):
    """What the module says of some hidden states, and what a second one says that was read from its export."""

    hidden: Tensor
    logits: list[Tensor]
    read: list[Tensor]


def export_heads(
    *, base: Path, directory: Path, layout: Layout, config: dict[str, Any], export_format: ExportFormat
) -> ExportedHeads | None:
    """Export heads that are far from their start, read them back; on the last stage, both modules' logits."""
    with parallel_runtime(layout):
        model, record = converted_for_export(base, layout, [("medusa", config)], None)
        export_draft(model, record, directory, export_format=export_format)
        other = import_for_export(base, layout)[0]
        attach_exported(other, directory)
        features = MegatronBase(model).features(torch.arange(12)[None] % VOCAB_SIZE)
        if features is None:
            return None
        with torch.no_grad():
            logits, read = (_whole_logits(each, features.last) for each in (model, other))
        return ExportedHeads(features.last[:, 0], logits, read)


def _whole_logits(model: GPTModel, hidden: Tensor) -> list[Tensor]:
    base = MegatronBase(model)
    draft = base.draft()
    assert isinstance(draft, MedusaDraft)
    return [gather_without_grad(each, -1, base.tp.group)[:, 0, :VOCAB_SIZE] for each in draft(hidden)]

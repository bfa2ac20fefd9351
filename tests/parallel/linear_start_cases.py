"""What the ranks do for `test_linear_start.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from mcore_spec.bases.features import features_for
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.config import EagleAlgorithm
from mcore_spec.data.batch import Batch, make_batch
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.parallel.sharding import gather_whole, sharded_tensors
from mcore_spec.training.linear_start import fit_linear_start
from mcore_spec.training.step import DraftStep
from tests.parallel.training_cases import Case, batches, converted, documents

CASE = Case({"num_hidden_layers": 2})
RECURRENT: dict[EagleAlgorithm, Case] = {
    "eagle1": Case({"num_hidden_layers": 2}, member="eagle1"),
    "eagle-mtp": Case({}, member="eagle-mtp"),
}


def fitted(*, layout: Layout, directory: Path) -> dict[str, Any]:
    """The draft's whole weights, what its head reads in the first row of each document, the base's final norm, and the
    size of the features, which is all that earlier stages know."""
    with parallel_runtime(layout):
        model = converted(directory, layout, CASE)
        step = DraftStep(model)
        size = fit_linear_start(model, step, list(batches(model, step, CASE)), seed=3)
        base, firsts = MegatronBase(model), []
        for document in documents():
            tokens = torch.from_numpy(document.token_ids)[None]
            # Ranks that share rows are told by their weights alone.
            if layout.sequence_parallel or layout.context > 1:
                continue
            features = base.features(tokens, aux_layer_ids=step.task.aux_layer_ids)
            if features is None or step.draft is None:
                continue
            with torch.no_grad():
                (output,) = step.draft(features.aux, [base.embed(tokens.roll(-1, dims=1))])
            firsts.append(output.hidden[0, 0])
        if step.draft is None:
            return {"size": size}
        whole = {e.name: gather_whole(e.tensor, e.shard, step.draft.tp) for e in sharded_tensors(step.draft)}
        return {"weights": whole, "firsts": firsts, "final_norm": base.final_norm_weight(), "size": size}


def fitted_recurrent(*, layout: Layout, directory: Path, member: EagleAlgorithm) -> dict[str, Any]:
    """The draft's whole weights, where it lives, and what its head reads at step 0 in every row of a document."""
    case = RECURRENT[member]
    with parallel_runtime(layout):
        model = converted(directory, layout, case)
        step = DraftStep(model)
        fit_linear_start(model, step, list(batches(model, step, case)), seed=3)
        if step.draft is None:
            return {}
        whole = {e.name: gather_whole(e.tensor, e.shard, step.draft.tp) for e in sharded_tensors(step.draft)}
        found = {"weights": whole, "final_norm": step.base.final_norm_weight()}
        if layout == Layout():
            tokens = torch.from_numpy(documents()[2].token_ids)[None]
            features = step.base.features(tokens, aux_layer_ids=step.task.aux_layer_ids)
            assert features is not None
            with torch.no_grad():
                (output,) = step.draft(features_for(step.draft, features), [step.base.embed(tokens.roll(-1, dims=1))])
            found["hidden"] = output.hidden[:, 0]
        return found


def refusals(*, directory: Path) -> list[str]:
    """Batches that count nothing; a draft whose residual is normed."""
    found = []
    with parallel_runtime(Layout()):
        for case in (CASE, Case({"norm_before_residual": True})):
            model = converted(directory, Layout(), case)
            step = DraftStep(model)
            given = list(batches(model, step, case)) if case is not CASE else [_nothing(step)]
            found.append(_refusal(model, step, given))
    return found


def _nothing(step: DraftStep) -> Batch:
    return make_batch([documents()[4]], num_steps=step.num_steps, num_samples=1)


def _refusal(model: GPTModel, step: DraftStep, given: list[Batch]) -> str:
    try:
        fit_linear_start(model, step, given, seed=3)
    except (ConfigError, UnsupportedError) as error:
        return str(error)
    return "taken"

"""What the ranks do for `test_linear_start.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.data.batch import Batch, make_batch
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.parallel.sharding import gather_whole, sharded_tensors
from mcore_spec.training.linear_start import fit_linear_start
from mcore_spec.training.step import DraftStep
from tests.parallel.training_cases import Case, batches, converted, documents

CASE = Case({"num_hidden_layers": 2})


def fitted(*, layout: Layout, directory: Path) -> dict[str, Any] | None:
    """The draft's whole weights, what its head reads in the first row of each document, and the base's final norm."""
    with parallel_runtime(layout):
        model = converted(directory, layout, CASE)
        step = DraftStep(model)
        fit_linear_start(model, step, list(batches(model, step, CASE)), seed=3)
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
            return None
        whole = {e.name: gather_whole(e.tensor, e.shard, step.draft.tp) for e in sharded_tensors(step.draft)}
        return {"weights": whole, "firsts": firsts, "final_norm": base.final_norm_weight()}


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

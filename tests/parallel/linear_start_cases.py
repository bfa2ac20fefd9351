"""What the ranks do for `test_linear_start.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mcore_spec.bases.features import features_for
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.config import EagleAlgorithm
from mcore_spec.data.batch import Batch, make_batch
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.objectives.linear_start import SHRINKING
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.parallel.sharding import gather_whole, sharded_tensors
from mcore_spec.training.linear_start import add_batches, fit_linear_start
from mcore_spec.training.step import DraftStep
from tests.parallel.training_cases import Case, batches, converted, documents

CASE = Case({"num_hidden_layers": 2})
SEED = 3
RECURRENT: dict[EagleAlgorithm, Case] = {
    "eagle1": Case({"num_hidden_layers": 2}, member="eagle1"),
    "eagle-mtp": Case({}, member="eagle-mtp"),
}


def fitted(*, layout: Layout, directory: Path) -> dict[str, Any]:
    """The draft's whole weights, what its head reads in the first row of each document behind the first regression, and
    factors of the learning rate, which are all that earlier stages know."""
    with parallel_runtime(layout):
        model = converted(directory, layout, CASE)
        step = DraftStep(model)
        given = list(batches(model, step, CASE))
        firsts = _firsts(model, step, given, layout)
        rates = fit_linear_start(model, step, given, seed=SEED)
        if step.draft is None:
            return {"rates": rates}
        return {"weights": _whole(step), "firsts": firsts, "final_norm": step.base.final_norm_weight(), "rates": rates}


def _firsts(model: GPTModel, step: DraftStep, given: list[Batch], layout: Layout) -> list[Tensor]:
    solver, base, found = add_batches(model, step, given), MegatronBase(model), []
    if solver is not None:
        solver.solve_map(seed=SEED)
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
        found.append(output.hidden[0, 0])
    return found


def _whole(step: DraftStep) -> dict[str, Tensor]:
    assert step.draft is not None
    return {e.name: gather_whole(e.tensor, e.shard, step.draft.tp) for e in sharded_tensors(step.draft)}


def fitted_recurrent(*, layout: Layout, directory: Path, member: EagleAlgorithm) -> dict[str, Any]:
    """The draft's whole weights, where it lives, and what its head reads at step 0 in every row of a document behind
    the first regression."""
    case = RECURRENT[member]
    with parallel_runtime(layout):
        model = converted(directory, layout, case)
        step = DraftStep(model)
        given, found = list(batches(model, step, case)), {}
        if layout == Layout():
            solver = add_batches(model, step, given)
            assert solver is not None
            solver.solve_map(seed=SEED)
            tokens = torch.from_numpy(documents()[2].token_ids)[None]
            features = step.base.features(tokens, aux_layer_ids=step.task.aux_layer_ids)
            assert features is not None
            assert step.draft is not None
            with torch.no_grad():
                (output,) = step.draft(features_for(step.draft, features), [step.base.embed(tokens.roll(-1, dims=1))])
            found["hidden"] = output.hidden[:, 0]
        fit_linear_start(model, step, given, seed=SEED)
        if step.draft is None:
            return {}
        return {"weights": _whole(step), "final_norm": step.base.final_norm_weight(), **found}


def staged(*, directory: Path, architecture: dict[str, Any]) -> dict[str, Any]:
    """The draft's weights behind each part of the start, and the loss with other sizes of the last norm.

    The size is fitted with four times the head, where what is known little is said much too loudly.
    """
    with parallel_runtime(Layout()):
        model = converted(directory, Layout(), Case(architecture))
        step = DraftStep(model)
        given = list(batches(model, step, CASE))
        solver = add_batches(model, step, given)
        assert solver is not None and step.draft is not None
        weights = []

        def fit_size_of_large_logits() -> None:
            with torch.no_grad():
                step.base.head_weight().mul_(4)
            solver.fit_size()

        for part in (lambda: solver.solve_map(seed=SEED), solver.solve_mlp, fit_size_of_large_logits):
            part()
            weights.append({name: value.clone() for name, value in step.draft.state_dict().items()})
        norm = step.draft.get_parameter("norm.weight")
        whole, losses = norm.detach().clone(), []
        for exponent in (-1, 0, 1):
            with torch.no_grad():
                norm.copy_(whole * SHRINKING**exponent)
                losses.append(sum(float(step(batch).loss) for batch in given))
        return {"weights": weights, "losses": losses}


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
        fit_linear_start(model, step, given, seed=SEED)
    except (ConfigError, UnsupportedError) as error:
        return str(error)
    return "taken"

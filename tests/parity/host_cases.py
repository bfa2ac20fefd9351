"""What a rank does for tests of drafts on transformers models: the Megatron host's side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mcore_spec import BaseIdentity, make_record, restore, save
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.conversion import Mode, convert
from mcore_spec.data.batch import Batch, make_batch
from mcore_spec.data.document import Document
from mcore_spec.losses.outcome import LossOutput
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.training.linear_start import fit_linear_start
from mcore_spec.training.step import DraftStep
from mcore_spec.weights.hf_export import export_base
from mcore_spec.weights.safetensors_io import WeightDirectory
from tests.tiny import import_base


class HostRun(NamedTuple):
    """What a step gives, and the weights that the draft started with."""

    outcome: LossOutput
    gradients: dict[str, Tensor]
    initial: dict[str, Tensor]


class HostStart(NamedTuple):
    """The draft's weights behind a start from data, and the factors of their rates."""

    weights: dict[str, Tensor]
    rates: dict[str, float]


class HostCase(NamedTuple):
    """One draft on one base."""

    directory: Path
    mode: Mode
    d2t: Tensor | None
    weights: dict[str, Tensor]
    documents: list[Document]


def megatron_steps(*, cases: dict[str, HostCase]) -> dict[str, HostRun]:
    """One step of each."""
    with parallel_runtime(Layout()):
        return {name: _step(case) for name, case in cases.items()}


def megatron_starts(*, cases: dict[str, HostCase], seed: int) -> dict[str, HostStart]:
    """The least-squares start of each, from its documents; the weights of the case are not used."""
    with parallel_runtime(Layout()):
        return {name: _start(case, seed=seed) for name, case in cases.items()}


def _start(case: HostCase, *, seed: int) -> HostStart:
    model = import_base(case.directory, Layout()).model
    convert(model, case.mode, d2t=case.d2t)
    step = DraftStep(model)
    rates = fit_linear_start(model, step, [_batch(case, step)], seed=seed)
    draft: Any = MegatronBase(model).draft()
    return HostStart({name: value.clone() for name, value in draft.state_dict().items()}, rates)


def megatron_joint_steps(*, cases: dict[str, HostCase], save: Path) -> dict[str, HostRun]:
    """One step of base and draft together of each, and the base's gradients in a directory of the case's name.

    They are written as a base whose weights they are, so that they have transformers' names.
    """
    with parallel_runtime(Layout()):
        return {name: _joint_step(case, save / name) for name, case in cases.items()}


def _joint_step(case: HostCase, save: Path) -> HostRun:
    model, run = _run(case, lambda step: step.run_stage(_batch(case, step)))
    base = MegatronBase(model)
    draft = base.draft()
    for child in model.children():
        for parameter in child.parameters() if child is not draft else ():
            if parameter.requires_grad:
                assert parameter.grad is not None
                parameter.data = parameter.grad
    save.mkdir(parents=True)
    export_base(base, save)
    return run


def _batch(case: HostCase, step: DraftStep) -> Batch:
    return make_batch(case.documents, num_steps=step.num_steps, num_samples=len(case.documents))


def _step(case: HostCase) -> HostRun:
    return _run(case, lambda step: step(_batch(case, step)))[1]


def _run(case: HostCase, forward: Callable[[DraftStep], Any]) -> tuple[GPTModel, HostRun]:
    model = import_base(case.directory, Layout()).model
    convert(model, case.mode, d2t=case.d2t)
    draft: Any = MegatronBase(model).draft()
    initial = {name: value.clone() for name, value in draft.state_dict().items()}
    draft.load_state_dict(case.weights)
    step = DraftStep(model)
    outcome = forward(step)
    assert isinstance(outcome, LossOutput)
    outcome.loss.backward()
    gradients = {name: parameter.grad for name, parameter in draft.named_parameters()}
    return model, HostRun(LossOutput(*(None if x is None else x.detach() for x in outcome)), gradients, initial)


def hand_over(*, base: Path, source: Path, destination: Path) -> None:
    """Restore a draft on two tensor-parallel ranks, add one to every weight, save it."""
    with parallel_runtime(Layout(tensor=2)):
        imported = import_base(base, Layout(tensor=2))
        restore(imported.model, source)
        draft: Any = MegatronBase(imported.model).draft()
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter.add_(1)
        fingerprint = WeightDirectory(base).fingerprint()
        identity = BaseIdentity(source=str(base), fingerprint=fingerprint, hf_config=imported.raw_config)
        save(imported.model, destination, record=make_record(imported.model, identity))

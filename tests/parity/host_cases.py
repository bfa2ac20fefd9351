"""What a rank does for tests of drafts on transformers models: the Megatron host's side."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
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


def _batch(case: HostCase, step: DraftStep) -> Batch:
    return make_batch(case.documents, num_steps=step.num_steps, num_samples=len(case.documents))


def _step(case: HostCase) -> HostRun:
    model = import_base(case.directory, Layout()).model
    convert(model, case.mode, d2t=case.d2t)
    draft: Any = MegatronBase(model).draft()
    initial = {name: value.clone() for name, value in draft.state_dict().items()}
    draft.load_state_dict(case.weights)
    step = DraftStep(model)
    outcome = step(_batch(case, step))
    assert outcome is not None
    outcome.loss.backward()
    gradients = {name: parameter.grad for name, parameter in draft.named_parameters()}
    return HostRun(LossOutput(*(None if x is None else x.detach() for x in outcome)), gradients, initial)


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

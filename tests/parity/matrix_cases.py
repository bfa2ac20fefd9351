"""The jobs of test_support_matrix.py: import, convert and run a draft on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.megatron_build import build_gpt_model
from mcore_spec.checkpoint.store import make_record
from mcore_spec.config import BaseIdentity, eagle_preset
from mcore_spec.conversion import Mode, convert
from mcore_spec.drafts.eagle3 import Eagle3Draft
from mcore_spec.drafts.medusa import MedusaDraft
from mcore_spec.drafts.mtp import MiMoDraft
from mcore_spec.errors import UnsupportedError
from mcore_spec.export.draft import export_draft
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.weights.hf_config import describe_hf, read_hf_config
from mcore_spec.weights.hf_import import import_hf
from mcore_spec.weights.safetensors_io import WeightDirectory

NUM_STEPS = 3
MODES: dict[str, Mode] = {
    "eagle3": eagle_preset("eagle3"),
    "eagle1": eagle_preset("eagle1"),
    "eagle-mtp": eagle_preset("eagle-mtp"),
    "medusa": "medusa",
}


class DraftRun(NamedTuple):
    """A draft's weights by name, what it was attached to, and its logits [s, b, v] by step or head."""

    weights: dict[str, Tensor]
    config: dict[str, Any]
    aux_layer_ids: tuple[int, ...]
    logits: list[Tensor]
    exported: list[str]
    refusal: str


def run_drafts(*, directory: Path, token_ids: Tensor, export_root: Path) -> dict[str, DraftRun]:
    """Every algorithm on the base in `directory`."""
    with parallel_runtime(Layout()):
        return {name: _run(directory, token_ids, name, export_root) for name in MODES}


def _run(directory: Path, token_ids: Tensor, algorithm: str, export_root: Path) -> DraftRun:
    raw = read_hf_config(directory)
    model = build_gpt_model(describe_hf(raw, where=str(directory)), Layout())
    with WeightDirectory(directory) as source:
        import_hf(model, source)
        fingerprint = source.fingerprint()
    convert(model, MODES[algorithm])
    base = MegatronBase(model)
    draft = base.draft()
    assert draft is not None
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    rows = token_ids.shape[1] - NUM_STEPS
    aux_layer_ids = draft.aux_layer_ids if isinstance(draft, Eagle3Draft | MiMoDraft) else ()
    features = base.features(token_ids, aux_layer_ids=aux_layer_ids)
    assert features is not None
    if isinstance(draft, MedusaDraft):
        logits = draft(features.last[:rows])
    else:
        embeddings = [base.embed(token_ids[:, 1 + step : 1 + step + rows]) for step in range(NUM_STEPS)]
        read = features.last if draft.reads == "last" else features.aux
        logits = [base.logits(output.hidden) for output in draft(read[:rows], embeddings)]
    record = make_record(model, BaseIdentity(source="base", fingerprint=fingerprint, hf_config=raw))
    target = export_root / algorithm
    exported, refusal = [], ""
    try:
        export_draft(model, record, target)
        exported = sorted(WeightDirectory(target).tensors)
    except UnsupportedError as error:
        refusal = str(error)
    assert record.conversion is not None
    return DraftRun(
        weights={name: parameter.detach() for name, parameter in draft.named_parameters()},
        config=record.conversion.config,
        aux_layer_ids=aux_layer_ids,
        logits=[step.detach()[..., : base.architecture.vocab_size] for step in logits],
        exported=exported,
        refusal=refusal,
    )

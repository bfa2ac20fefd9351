"""Exporting the draft of a model: plan, gather over the tensor-parallel group, write whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path

from megatron.core.models.gpt import GPTModel

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.conversion import conversion_of, find_algorithm
from mcore_spec.drafts.draft import Draft
from mcore_spec.errors import ConfigError
from mcore_spec.export.card import model_card
from mcore_spec.export.directory import atomic_directory
from mcore_spec.export.plan import ExportFormat, ExportPlan, PlannedTensors
from mcore_spec.parallel.collectives import group_rank
from mcore_spec.parallel.layout import run_on_every_rank
from mcore_spec.weights.safetensors_io import SINGLE_NAME, write_tensors


def export_draft(
    model: GPTModel,
    record: CheckpointRecord,
    directory: Path | str,
    *,
    export_format: ExportFormat = "hf",
    overwrite: bool = False,
) -> None:
    """Write the draft of `model` as a directory for inference engines; all ranks take part.

    Args:
        model: this rank's part, converted.
        record: base and conversion.
        directory: where to write.
        export_format: engines' Hugging Face form, or `speculators`'.
        overwrite: replace an earlier export.

    Raises:
        ConfigError: a model without a draft, or a directory that is in the way.
        UnsupportedError: a draft that would not serve.
    """
    plan = plan_draft(model, record, export_format)
    with atomic_directory(Path(directory), record=record, overwrite=overwrite) as partial:
        write_draft(model, record, plan, partial)


def plan_draft(model: GPTModel, record: CheckpointRecord, export_format: ExportFormat) -> ExportPlan | None:
    """What to write, before anything is created: a draft that does not serve leaves no trace.

    Returns:
        The plan on the last stage, ``None`` on the others.

    Raises:
        ConfigError: a model without a draft.
        UnsupportedError: a draft that would not serve; on every rank.
    """
    conversion = conversion_of(model)
    if conversion is None:
        raise ConfigError("the checkpoint has no draft; convert it first, or leave --export-extra-modules out")
    draft = MegatronBase(model).draft()
    plan = find_algorithm(conversion.algorithm).plan
    return run_on_every_rank(lambda: None if draft is None else plan(draft, record, export_format))


def write_draft(model: GPTModel, record: CheckpointRecord, plan: ExportPlan | None, directory: Path) -> None:
    """Write the planned files; all ranks take part.

    Raises:
        OSError: writing failed; on every rank.
    """
    base = MegatronBase(model)
    draft = base.draft()

    def write() -> None:
        if draft is not None and plan is not None and group_rank(model.pg_collection.dp_cp) == 0:
            _write(directory, plan, draft, base, record)

    run_on_every_rank(write)


def _write(directory: Path, plan: ExportPlan, draft: Draft, base: MegatronBase, record: CheckpointRecord) -> None:
    tensors = PlannedTensors(plan, draft, base)
    specs = tensors.specs()
    write_tensors(directory / SINGLE_NAME if draft.tp.rank == 0 else None, specs, tensors.gather())
    if draft.tp.rank > 0:
        return
    num_parameters = sum(math.prod(spec.shape) for spec in specs if spec.dtype.is_floating_point)
    card = model_card(plan, record, algorithm=draft.label, num_parameters=num_parameters)
    (directory / "README.md").write_text(card)
    for name, text in plan.extra_files.items():
        (directory / name).write_text(text)
    (directory / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n")

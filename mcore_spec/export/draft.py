"""Exporting the draft of a model: plan, gather over the tensor-parallel group, write whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from mcore_spec.bases.base import Base
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.config.quantization import QuantFormat
from mcore_spec.conversion import as_base, conversion_of, find_algorithm
from mcore_spec.drafts.draft import Draft
from mcore_spec.errors import ConfigError
from mcore_spec.export.card import model_card
from mcore_spec.export.directory import atomic_directory
from mcore_spec.export.plan import FORMATS_WITH_BASE, ExportFormat, ExportPlan, PlannedTensors, exported_record
from mcore_spec.export.quantized import DEFAULT_FORM, UNQUANTIZED, QuantizedExport, check_form, quantized_draft
from mcore_spec.parallel.layout import run_on_every_rank, run_on_rank_zero
from mcore_spec.weights.safetensors_io import BESIDE_BASE_NAME, TensorSpec, write_tensors

# Where the base that was trained with a draft lies in the directory of that draft.
TRAINED_BASE_NAME = "base"


def export_draft(
    model: nn.Module,
    record: CheckpointRecord,
    directory: Path | str,
    *,
    export_format: ExportFormat = "hf",
    overwrite: bool = False,
    quant_format: QuantFormat | None = None,
    write_base: Callable[[Path], None] | None = None,
) -> None:
    """Write the draft of `model` as a directory for inference engines; all ranks take part.

    Args:
        model: converted; of a `GPTModel` this rank's part.
        record: base and conversion.
        directory: where to write.
        export_format: engines' Hugging Face form, or `speculators`'.
        overwrite: replace an earlier export.
        quant_format: whose form the scales of a quantised draft have; ``None``: ModelOpt's.
        write_base: writes the base that was trained with the draft, on the first rank, into ``base/`` below.

    Raises:
        ConfigError: a model without a draft, a format that holds the base too, a directory that is in the way, or a
            form of scales where there are none.
        UnsupportedError: a draft that would not serve.
    """
    if export_format in FORMATS_WITH_BASE:
        raise ConfigError(
            f"export_format = {export_format!r} is base and draft in one model; export both (leave "
            "--export-extra-modules out)"
        )
    record = exported_record(record)
    planned = plan_draft(model, record, export_format, quant_format=quant_format)
    if planned is not None and write_base is not None:
        remark = f"The base that was trained with this draft is in `{TRAINED_BASE_NAME}/` of this directory."
        planned = planned._replace(plan=replace(planned.plan, remarks=(*planned.plan.remarks, remark)))
    write_planned(model, record, planned, directory, overwrite=overwrite, write_base=write_base)


def write_planned(
    model: nn.Module,
    record: CheckpointRecord,
    planned: PlannedDraft | None,
    directory: Path | str,
    *,
    overwrite: bool,
    write_base: Callable[[Path], None] | None = None,
) -> None:
    """Write a planned draft whole or not at all; all ranks take part. `write_base` as of `export_draft`."""
    with atomic_directory(Path(directory), record=record, overwrite=overwrite) as partial:
        write_draft(model, record, planned, partial)
        if write_base is not None:
            write = write_base
            run_on_rank_zero(lambda: write(partial / TRAINED_BASE_NAME))


class PlannedDraft(NamedTuple):
    """What is written of a draft, and how."""

    plan: ExportPlan
    quantized: QuantizedExport = UNQUANTIZED


def plan_draft(
    model: nn.Module,
    record: CheckpointRecord,
    export_format: ExportFormat,
    *,
    quant_format: QuantFormat | None = None,
) -> PlannedDraft | None:
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
    draft = as_base(model).draft()
    make_plan = find_algorithm(conversion.algorithm).plan
    check_form(record, quant_format)

    def plan() -> PlannedDraft | None:
        if draft is None:
            return None
        made = make_plan(draft, record, export_format)
        return PlannedDraft(made, quantized_draft(model, draft, made, record, quant_format or DEFAULT_FORM))

    return run_on_every_rank(plan)


def write_draft(
    model: nn.Module,
    record: CheckpointRecord,
    planned: PlannedDraft | None,
    directory: Path,
    *,
    with_base: bool = False,
) -> None:
    """Write the planned files; all ranks take part.

    Args:
        model: converted; of a `GPTModel` this rank's part.
        record: base and conversion.
        planned: of the draft.
        directory: exists.
        with_base: the base's files are there: the tensors come into a file of their own, and the plan's configuration
            into the base's.

    Raises:
        OSError: writing failed; on every rank.
    """
    base = as_base(model)
    draft = base.draft()

    def write() -> None:
        if draft is not None and planned is not None and base.is_writer:
            _write(directory, planned, draft, base, record, with_base=with_base)

    run_on_every_rank(write)


def _write(
    directory: Path, planned: PlannedDraft, draft: Draft, base: Base, record: CheckpointRecord, *, with_base: bool
) -> None:
    plan, quantized = planned
    tensors = PlannedTensors(plan, draft, base, quantized.encodings)
    specs = tensors.specs()
    file = directory / (BESIDE_BASE_NAME if with_base else plan.weights_file)
    write_tensors(file if draft.tp.rank == 0 else None, specs, tensors.gather())
    if draft.tp.rank > 0:
        return
    num_parameters = sum(math.prod(spec.shape) for spec in specs if _is_parameter(spec))
    is_quantized = bool(quantized.encodings)
    card = model_card(plan, record, algorithm=draft.label, num_parameters=num_parameters, is_quantized=is_quantized)
    (directory / "README.md").write_text(card)
    for name, text in {**plan.extra_files, **quantized.files}.items():
        (directory / name).write_text(text)
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **plan.config} if with_base else {**plan.config, **quantized.config}
    path.write_text(json.dumps(config, indent=2) + "\n")


def _is_parameter(spec: TensorSpec) -> bool:
    """Weights, quantised or not; no scales, and no numbers of tokens."""
    return (spec.dtype.is_floating_point or spec.dtype is torch.int8) and not spec.name.endswith("_scale")

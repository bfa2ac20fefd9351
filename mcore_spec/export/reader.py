"""Reading an exported draft back onto its base, through the tables that it was written by."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.megatron_build import BaseGPTModel
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.config import BaseArchitecture
from mcore_spec.conversion import attach, find_algorithm, reads_tokens
from mcore_spec.drafts.draft import Draft
from mcore_spec.errors import CheckpointError, ConfigError
from mcore_spec.export.directory import MARKER
from mcore_spec.export.plan import ExportFormat, ExportPlan
from mcore_spec.parallel.layout import run_on_every_rank
from mcore_spec.parallel.sharding import Shard, ShardedTensorEntry, sharded_tensors, whole_shape
from mcore_spec.parallel.tensor_parallel import TensorParallel
from mcore_spec.weights.draft_names import stored_name
from mcore_spec.weights.safetensors_io import WeightDirectory

_D2T = "d2t"
# What a draft's weights depend on; the dtype may be another one.
_BASE_FIELDS = ("hidden_size", "vocab_size", "num_layers")


def read_export_record(directory: Path) -> CheckpointRecord:
    """What was exported to `directory`, or to the one above, where it is the ``draft`` of a base's export.

    Raises:
        CheckpointError: it is no export of this package, or one without a draft.
    """
    for place in (directory, directory.parent):
        file = place / MARKER
        if file.exists():
            break
    else:
        raise CheckpointError(
            f"draft = {directory} has no {MARKER}, which says how the draft was made; give a directory that "
            "mcore-spec export wrote"
        )
    try:
        record = CheckpointRecord.parse(json.loads(file.read_text()), where=str(file))
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); export the draft again") from error
    if record.conversion is None:
        raise CheckpointError(f"draft = {directory} is the export of a base without a draft; give a draft's")
    return record


def check_base(record: CheckpointRecord, base: BaseArchitecture, *, directory: Path) -> None:
    """Refuse a base that the draft was not made for.

    Raises:
        CheckpointError: names what differs.
    """
    own, others = record.base.model_dump(), base.model_dump()
    for field in _BASE_FIELDS:
        if own[field] != others[field]:
            raise CheckpointError(
                f"draft = {directory} was made for a base with {field} = {own[field]} ({record.identity.source}), this "
                f"base has {others[field]}; give the base that the draft belongs to"
            )


def attach_exported(model: BaseGPTModel, directory: Path) -> CheckpointRecord:
    """Attach the draft in `directory` to `model`, a bare base; all ranks take part.

    Returns:
        What was exported.

    Raises:
        CheckpointError: no export, another base, or tensors missing, left over or of another shape.
    """
    record = read_export_record(directory)
    base = MegatronBase(model)
    check_base(record, base.architecture, directory=directory)
    assert record.conversion is not None
    algorithm = find_algorithm(record.conversion.algorithm)
    draft = attach(base, record.conversion.algorithm, algorithm.config_class.parse(record.conversion.config))

    def fill() -> None:
        if draft is None:
            return
        with WeightDirectory(directory) as weights:
            # A plan refuses a draft vocabulary that is not filled in yet.
            if _D2T in weights.tensors:
                draft.set_draft_vocabulary(weights.read(_D2T))
            _fill(draft, weights, algorithm.plan(draft, record, _format_of(directory)), base.tp)

    run_on_every_rank(fill)
    if reads_tokens(model):
        base.copy_embedding_to_last_stage()
    return record


def _format_of(directory: Path) -> ExportFormat:
    config = json.loads((directory / "config.json").read_text())
    return "speculators" if "speculators_model_type" in config else "hf"


@torch.no_grad()
def _fill(draft: Draft, weights: WeightDirectory, plan: ExportPlan, tp: TensorParallel) -> None:
    entries = {stored_name(plan.table, entry.name): entry for entry in sharded_tensors(draft)}
    extra = {plan.base_head, plan.base_embedding, *plan.computed}
    missing, unknown = sorted(entries.keys() - weights.tensors), sorted(weights.tensors.keys() - entries.keys() - extra)
    shapes = {name: whole_shape(entry, tp) for name, entry in entries.items()}
    wrong = [name for name in entries if name in weights.tensors and weights.tensors[name].shape != shapes[name]]
    if missing or unknown or wrong:
        raise CheckpointError(
            f"{weights.directory} does not fit its {MARKER}: missing {missing or 'nothing'}, not known "
            f"{unknown or 'nothing'}, of another shape {wrong or 'nothing'}; export the draft again"
        )
    for name, entry in entries.items():
        entry.tensor.copy_(_read_shard(weights, name, entry, tp))


def _read_shard(weights: WeightDirectory, name: str, entry: ShardedTensorEntry, tp: TensorParallel) -> Tensor:
    """This rank's slice, padded with zeros where the cut is padded."""
    shard: Shard = entry.shard
    if shard.dim is None:
        return weights.read(name)
    local = entry.tensor.shape[shard.dim]
    size = weights.tensors[name].shape[shard.dim]
    start, stop = (min(row, size) for row in (tp.rank * local, (tp.rank + 1) * local))
    part = weights.read(name, dim=shard.dim, start=start, stop=stop)
    return F.pad(part, (0, 0, 0, local - part.shape[0])) if shard.size is not None else part

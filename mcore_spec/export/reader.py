"""Reading an exported draft back onto its base, through the tables that it was (or would have been) written by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mcore_spec.bases.base import Base
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.config import BaseArchitecture
from mcore_spec.conversion import as_base, attach, find_algorithm, reads_tokens
from mcore_spec.drafts.draft import Draft
from mcore_spec.drafts.vocab_map import check_draft_to_target
from mcore_spec.errors import CheckpointError, ConfigError, UnsupportedError
from mcore_spec.export.directory import MARKER
from mcore_spec.export.foreign import read_foreign
from mcore_spec.export.modules import is_of_modules, plan_modules, record_of_model_directory
from mcore_spec.export.plan import ExportPlan, format_of
from mcore_spec.parallel.layout import run_on_every_rank
from mcore_spec.parallel.sharding import Shard, ShardedTensorEntry, sharded_tensors, whole_shape
from mcore_spec.parallel.tensor_parallel import TensorParallel
from mcore_spec.weights.draft_names import stored_name
from mcore_spec.weights.hf_config import read_hf_config
from mcore_spec.weights.safetensors_io import WeightDirectory

_D2T = "d2t"
_T2D = "t2d"
_EMBEDDING = "embed_tokens.weight"
# What a draft's weights depend on; the dtype may be another one.
_BASE_FIELDS = ("hidden_size", "vocab_size", "num_layers")


class Exported(NamedTuple):
    """A draft's directory, as far as it is known without its weights.

    Attributes:
        directory: where it is.
        record: how the draft was made.
        is_foreign: whether another program wrote it; the record is then what its configuration amounts to.
        below: beginning of its tensors' names, where it lies among those of its base.
        notes: what a user must know about the reading.
    """

    directory: Path
    record: CheckpointRecord
    is_foreign: bool
    notes: tuple[str, ...]
    below: str = ""


def read_exported(directory: Path, base: BaseArchitecture) -> Exported:
    """What was exported to `directory`, for `base`: by this package, or in one of the forms of `foreign`.

    Raises:
        CheckpointError: no draft, a damaged one, or one of another base.
        UnsupportedError: a draft by somebody else that this package cannot follow.
    """
    if not directory.is_dir():
        raise CheckpointError(f"draft = {directory} is no directory; give one that mcore-spec export wrote")
    marked = _marked(directory)
    if marked is not None:
        _refuse_quantized(directory)
    with_base = None if marked else record_of_model_directory(directory)
    if with_base is not None:
        check_base(with_base.record, base, directory=directory)
        return Exported(directory, with_base.record, is_foreign=False, notes=(), below=with_base.below)
    if marked is None:
        record, notes = read_foreign(directory, base)
        return Exported(directory, record, is_foreign=True, notes=notes)
    record = _read_record(marked)
    if record.conversion is None:
        raise CheckpointError(f"draft = {directory} is the export of a base without a draft; give a draft's")
    check_base(record, base, directory=directory)
    return Exported(directory, record, is_foreign=False, notes=())


def _refuse_quantized(directory: Path) -> None:
    """What an engine computes of a quantised directory, this package computes of the checkpoint behind it.

    Raises:
        UnsupportedError: the directory declares quantised weights.
    """
    if read_hf_config(directory).get("quantization_config"):
        raise UnsupportedError(
            f"draft = {directory} is quantised (quantization_config): engines read it; measure the checkpoint that it "
            "was exported from with --load"
        )


def _marked(directory: Path) -> Path | None:
    """This package's record in the directory, or in the one above, where it is the ``draft`` of a base's export."""
    files = (place / MARKER for place in (directory, directory.parent))
    return next((file for file in files if file.exists()), None)


def _read_record(file: Path) -> CheckpointRecord:
    try:
        return CheckpointRecord.parse(json.loads(file.read_text()), where=str(file))
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); export the draft again") from error


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


def attach_exported(model: nn.Module, directory: Path) -> CheckpointRecord:
    """Attach the draft in `directory` to `model`, a bare base of either library; all ranks take part.

    Returns:
        What was exported.

    Raises:
        CheckpointError: no export, another base, or tensors missing, left over or of another shape.
        UnsupportedError: a draft by somebody else that this package cannot follow.
    """
    exported = read_exported(directory, as_base(model).architecture)
    attach_read(model, exported)
    return exported.record


def attach_read(model: nn.Module, exported: Exported) -> None:
    """`attach_exported` of a directory that `read_exported` has read.

    Raises:
        CheckpointError: tensors missing, left over or of another shape.
        UnsupportedError: an embedding of the draft's own.
    """
    base, directory = as_base(model), exported.directory
    conversion = exported.record.conversion
    assert conversion is not None, "read_exported refuses a base without a draft"
    algorithm = find_algorithm(conversion.algorithm)
    draft = attach(base, conversion.algorithm, algorithm.config_class.parse(conversion.config))

    def fill() -> None:
        if draft is None:
            return
        with WeightDirectory(directory, below=exported.below) as weights:
            # A plan refuses a draft vocabulary that is not filled in yet.
            if _D2T in weights.tensors:
                d2t = check_draft_to_target(
                    weights.read(_D2T), vocab_size=base.architecture.vocab_size, where=f"{directory}: {_D2T}"
                )
                draft.set_draft_vocabulary(d2t)
            _fill(draft, weights, _plan(draft, exported), base.tp, exported)

    run_on_every_rank(fill)
    if reads_tokens(model):
        base.copy_embedding_to_last_stage()
    if exported.is_foreign:
        run_on_every_rank(lambda: _check_embedding(base, directory))


def _plan(draft: Draft, exported: Exported) -> ExportPlan:
    """The plan that the files were written by."""
    conversion = exported.record.conversion
    assert conversion is not None, "read_exported refuses a base without a draft"
    config = json.loads((exported.directory / "config.json").read_text())
    if exported.below or is_of_modules(config):
        return plan_modules(draft, exported.record)
    return find_algorithm(conversion.algorithm).plan(draft, exported.record, format_of(config))


@torch.no_grad()
def _fill(draft: Draft, weights: WeightDirectory, plan: ExportPlan, tp: TensorParallel, exported: Exported) -> None:
    """Copy every tensor of the file that the plan names."""
    entries = {stored_name(plan.table, entry.name): entry for entry in sharded_tensors(draft)}
    extra = {plan.base_head, plan.base_embedding, *plan.computed}
    stored = {name: name for name in weights.tensors}
    if exported.is_foreign:
        # The one layer has two names, of which the plan knows the one that all engines read.
        stored = {_common_name(name): name for name in weights.tensors}
        entries = {_common_name(name): entry for name, entry in entries.items()}
        extra |= {_EMBEDDING, _T2D}
        if _D2T not in entries and _D2T in stored and not weights.read(_D2T).any():
            extra.add(_D2T)  # the whole vocabulary, mapped to itself
    missing, unknown = sorted(entries.keys() - stored), sorted(stored.keys() - entries.keys() - extra)
    shapes = {name: whole_shape(entry, tp) for name, entry in entries.items()}
    wrong = [name for name in entries if name in stored and weights.tensors[stored[name]].shape != shapes[name]]
    if missing or unknown or wrong:
        file, remedy = (MARKER, "export the draft again")
        if exported.is_foreign or exported.below:
            file, remedy = ("config.json", "give it whole")
        raise CheckpointError(
            f"{weights.directory} does not fit its {file}: missing {missing or 'nothing'}, not known "
            f"{unknown or 'nothing'}, of another shape {wrong or 'nothing'}; {remedy}"
        )
    for name, entry in entries.items():
        entry.tensor.copy_(read_shard(weights, stored[name], entry, tp))


def _common_name(name: str) -> str:
    """One name for the first layer, which engines call ``midlayer`` too."""
    return f"layers.0.{name.removeprefix('midlayer.')}" if name.startswith("midlayer.") else name


def _check_embedding(base: Base, directory: Path) -> None:
    """On the last stage: an embedding in the file must be the base's, which the draft reads.

    Raises:
        UnsupportedError: it is another one.
    """
    if not base.is_last_stage:
        return
    with WeightDirectory(directory) as weights:
        if _EMBEDDING not in weights.tensors:
            return
        ours, vocab_size = base.embedding_weight(), base.architecture.vocab_size
        first = min(base.tp.rank * ours.shape[0], vocab_size)
        stop = min(first + ours.shape[0], vocab_size)
        theirs = weights.read(_EMBEDDING, start=first, stop=stop).to(ours.dtype)
        if not torch.equal(theirs, ours[: stop - first].cpu()):
            raise UnsupportedError(
                f"{directory} has an embedding of its own, other than the base's, which drafts here read; "
                "measure it in an engine"
            )


def read_shard(weights: WeightDirectory, name: str, entry: ShardedTensorEntry, tp: TensorParallel) -> Tensor:
    """This rank's slice, padded with zeros where the cut is padded."""
    shard: Shard = entry.shard
    if shard.dim is None:
        return weights.read(name)
    local = entry.tensor.shape[shard.dim]
    size = weights.tensors[name].shape[shard.dim]
    start, stop = (min(row, size) for row in (tp.rank * local, (tp.rank + 1) * local))
    part = weights.read(name, dim=shard.dim, start=start, stop=stop)
    return F.pad(part, (0, 0, 0, local - part.shape[0])) if shard.size is not None else part

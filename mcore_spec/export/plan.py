"""What an exported draft consists of, before anything is gathered or written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mcore_spec.bases.base import Base
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.config import ExportFormat
from mcore_spec.conversion import find_algorithm
from mcore_spec.drafts.draft import Draft
from mcore_spec.errors import UnsupportedError
from mcore_spec.parallel.sharding import Shard, ShardedTensorEntry, gather_whole, sharded_tensors, whole_shape
from mcore_spec.weights.draft_names import Table, stored_name
from mcore_spec.weights.encoding import Encodings, encoded_specs, encoded_tensors
from mcore_spec.weights.safetensors_io import SINGLE_NAME, TensorSpec

# What stands for the path of a base that was trained with its draft.
TRAINED_BASE = "DIRECTORY_OF_THE_BASE_TRAINED_WITH_THIS_DRAFT"
# In which the draft's tensors lie among those of the base, in one model.
FORMATS_WITH_BASE: tuple[ExportFormat, ...] = ("mimo",)


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """One draft in one format.

    Attributes:
        config: ``config.json``.
        table: names of the draft's own tensors.
        base_head: name for the base's head, where the format wants it and the draft has none.
        base_embedding: name for the base's embedding, where the format wants it.
        computed: further tensors, held whole.
        serve: engine -> command that serves the directory; ``{base}`` and ``{draft}`` are paths.
        extra_files: name -> text of further files.
        weights_file: name of the file that holds the tensors.
        remarks: what a user of the directory must know.
        can_be_quantized: whether engines read scales in a directory of this form.
    """

    config: dict[str, Any]
    table: Table
    base_head: str | None = None
    base_embedding: str | None = None
    computed: dict[str, Tensor] = field(default_factory=dict)
    serve: dict[str, str] = field(default_factory=dict)
    extra_files: dict[str, str] = field(default_factory=dict)
    weights_file: str = SINGLE_NAME
    remarks: tuple[str, ...] = ()
    can_be_quantized: bool = False


class PlannedTensors:
    """The tensors of a plan, on the ranks of the last stage: first their shapes, then one by one."""

    def __init__(self, plan: ExportPlan, draft: Draft, base: Base, encodings: Encodings) -> None:
        """List them; nothing is gathered.

        Args:
            plan: names.
            draft: this rank's part.
            base: this rank's part of the base.
            encodings: of weights that are not written as they are.
        """
        self._tp, self._encodings = draft.tp, encodings
        self._computed = plan.computed
        rows = Shard(0, size=base.architecture.vocab_size)
        entries = [entry._replace(name=stored_name(plan.table, entry.name)) for entry in sharded_tensors(draft)]
        if plan.base_head is not None:
            entries.append(ShardedTensorEntry(plan.base_head, base.head_weight(), rows))
        if plan.base_embedding is not None:
            entries.append(ShardedTensorEntry(plan.base_embedding, base.embedding_weight(), rows))
        self._entries = entries

    def specs(self) -> list[TensorSpec]:
        """Names, dtypes and whole shapes, in writing order."""
        sharded = [TensorSpec(e.name, e.tensor.dtype, whole_shape(e, self._tp)) for e in self._entries]
        specs = sharded + [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in self._computed.items()]
        return encoded_specs(specs, self._encodings)

    def gather(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors in writing order; every rank of the tensor-parallel group must iterate."""
        yield from encoded_tensors(self._gather_entries(), self._encodings)
        yield from self._computed.items()

    def _gather_entries(self) -> Iterator[tuple[str, Tensor]]:
        for entry in self._entries:
            yield entry.name, gather_whole(entry.tensor, entry.shard, self._tp)


def check_format(export_format: ExportFormat, draft: Draft, known: Sequence[ExportFormat]) -> None:
    """Refuse a format that does not know this kind of draft.

    Raises:
        UnsupportedError: it is none of the known ones.
    """
    if export_format not in known:
        raise UnsupportedError(
            f"export_format = {export_format!r} has no form for {draft.label} drafts; choose {' or '.join(known)}"
        )


def check_hf(export_format: ExportFormat, draft: Draft) -> None:
    """For drafts that only the engines' own form can say.

    Raises:
        UnsupportedError: another format.
    """
    check_format(export_format, draft, ("hf",))


def format_of(config: Mapping[str, Any]) -> ExportFormat:
    """In which format the directory with this ``config.json`` is."""
    if "speculators_model_type" in config:
        return "speculators"
    # Its names are those of FasterDecoding too.
    return "tensorrt-llm" if "num_medusa_heads" in config else "hf"


def exported_record(record: CheckpointRecord) -> CheckpointRecord:
    """The record as an export states it: a base that was trained with its draft is not the one that it was made from.

    Its weights are known by the directory alone that it is exported to, which may move.
    """
    conversion = record.conversion
    if conversion is None or record.training is None:
        return record
    algorithm = find_algorithm(conversion.algorithm)
    if algorithm.freezes_base(algorithm.config_class.parse(conversion.config)):
        return record
    identity = record.identity.model_copy(update={"source": TRAINED_BASE, "fingerprint": ""})
    return record.model_copy(update={"identity": identity})


def token_ids(record: CheckpointRecord) -> dict[str, Any]:
    """bos, eos and pad of the base, as its configuration has them."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: record.identity.hf_config.get(name) for name in names}


def target_to_draft(d2t: Tensor, vocab_size: int) -> Tensor:
    """Which of the base's tokens are in the draft vocabulary, bool [vocabulary]."""
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[torch.arange(d2t.shape[0]) + d2t.cpu()] = True
    return mask

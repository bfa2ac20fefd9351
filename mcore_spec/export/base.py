"""Exporting the base as a Hugging Face directory, with its draft in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.config.quantization import QuantFormat
from mcore_spec.errors import UnsupportedError
from mcore_spec.export.directory import atomic_directory
from mcore_spec.export.draft import plan_draft, write_draft
from mcore_spec.export.plan import FORMATS_WITH_BASE, ExportFormat, exported_record
from mcore_spec.export.quantized import DEFAULT_FORM, check_form, quantized_base
from mcore_spec.parallel.collectives import group_rank
from mcore_spec.parallel.layout import run_on_every_rank, run_on_rank_zero
from mcore_spec.weights.hf_config import to_hf_config
from mcore_spec.weights.hf_export import export_base
from mcore_spec.weights.safetensors_io import BESIDE_BASE_NAME, INDEX_NAME, read_header

# Where the draft lies in a directory that holds the base too.
DRAFT = "draft"


def export_base_and_draft(
    model: GPTModel,
    record: CheckpointRecord,
    directory: Path,
    *,
    tokenizer_path: Path,
    export_format: ExportFormat = "hf",
    overwrite: bool = False,
    quant_format: QuantFormat | None = None,
) -> None:
    """Write weights, configuration and tokenizer of the base, and its draft, if any, below; all ranks take part.

    Args:
        model: this rank's part.
        record: base and conversion.
        directory: where to write; the draft comes into ``draft/`` in it, or among the base's tensors, as the format is.
        tokenizer_path: directory of the tokenizer's files, copied as they are.
        export_format: of the draft.
        overwrite: replace an earlier export.
        quant_format: whose form the scales of a quantised model have; ``None``: ModelOpt's.

    Raises:
        ConfigError: a form of scales where there are none.
        UnsupportedError: a draft that would not serve, or a base that Hugging Face's classes cannot say.
        OSError: writing failed; on every rank.
    """
    record = exported_record(record)
    config = base_config(record)
    check_form(record, quant_format)
    has_draft = record.conversion is not None
    planned = plan_draft(model, record, export_format, quant_format=quant_format) if has_draft else None
    quantized = quantized_base(model, record, quant_format or DEFAULT_FORM)
    encodings = quantized.encodings
    if has_draft and export_format in FORMATS_WITH_BASE and quantized.config:
        raise UnsupportedError(
            f"export_format = {export_format!r} of a quantised base: its declaration would cover the draft's layer, "
            "which lies among the base's and has no scales; choose hf, or export the checkpoint before quantising"
        )
    is_writing = group_rank(model.pg_collection.dp_cp) == 0
    with atomic_directory(directory, record=record, overwrite=overwrite) as partial:
        run_on_every_rank(
            lambda: export_base(MegatronBase(model), partial, encodings=encodings) if is_writing else None
        )
        run_on_rank_zero(lambda: _write_files(partial, {**config, **quantized.config}, tokenizer_path, quantized.files))
        if has_draft and export_format in FORMATS_WITH_BASE:
            write_draft(model, record, planned, partial, with_base=True)
            run_on_rank_zero(lambda: _add_to_index(partial))
        elif has_draft:
            run_on_rank_zero(lambda: (partial / DRAFT).mkdir())
            write_draft(model, record, planned, partial / DRAFT)


def base_config(record: CheckpointRecord) -> dict[str, Any]:
    """The configuration that the base came with, its dtype as it is now."""
    config = record.identity.hf_config
    if not config:
        return to_hf_config(record.base)
    dtypes: dict[str, str] = {name: record.base.dtype for name in ("dtype", "torch_dtype") if name in config}
    return {**config, **dtypes}


def _write_files(directory: Path, config: dict[str, Any], tokenizer_path: Path, further: Mapping[str, str]) -> None:
    if tokenizer_path.is_dir():
        for file in tokenizer_path.iterdir():
            shutil.copy2(file, directory / file.name)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, text in further.items():
        (directory / name).write_text(text)


def _add_to_index(directory: Path) -> None:
    """Name the draft's tensors where the base's are named; a base in one file has no such list."""
    path, file = directory / INDEX_NAME, directory / BESIDE_BASE_NAME
    if path.exists():
        index = json.loads(path.read_text())
        index["weight_map"] |= dict.fromkeys(read_header(file), BESIDE_BASE_NAME)
        path.write_text(json.dumps(index, indent=2) + "\n")

"""Exporting the base as a Hugging Face directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.export.directory import atomic_directory
from mcore_spec.parallel.collectives import group_rank
from mcore_spec.parallel.layout import run_on_every_rank, run_on_rank_zero
from mcore_spec.weights.hf_config import to_hf_config
from mcore_spec.weights.hf_export import export_base


def export_base_directory(
    model: GPTModel,
    record: CheckpointRecord,
    directory: Path,
    *,
    tokenizer_path: Path,
    overwrite: bool = False,
) -> None:
    """Write weights, configuration and tokenizer of the base; all ranks take part.

    Args:
        model: this rank's part.
        record: the base.
        directory: where to write.
        tokenizer_path: directory of the tokenizer's files, copied as they are.
        overwrite: replace an earlier export.
    """
    config = base_config(record)
    with atomic_directory(directory, record=record, overwrite=overwrite) as partial:
        is_writing = group_rank(model.pg_collection.dp_cp) == 0
        run_on_every_rank(lambda: export_base(MegatronBase(model), partial) if is_writing else None)
        run_on_rank_zero(lambda: _write_files(partial, config, tokenizer_path))


def base_config(record: CheckpointRecord) -> dict[str, Any]:
    """The configuration that the base came with, its dtype as it is now."""
    config = record.identity.hf_config
    if not config:
        return to_hf_config(record.base)
    dtypes: dict[str, str] = {name: record.base.dtype for name in ("dtype", "torch_dtype") if name in config}
    return {**config, **dtypes}


def _write_files(directory: Path, config: dict[str, Any], tokenizer_path: Path) -> None:
    if tokenizer_path.is_dir():
        for file in tokenizer_path.iterdir():
            shutil.copy2(file, directory / file.name)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")

"""What the ranks do in `test_export_mimo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from mcore_spec.algorithms.mtp import start_as_base_mtp
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.checkpoint.store import make_record
from mcore_spec.config import eagle_preset
from mcore_spec.config.quantization import Recipe
from mcore_spec.conversion import conversion_of, convert
from mcore_spec.errors import McoreSpecError
from mcore_spec.export.base import export_base_and_draft
from mcore_spec.export.draft import export_draft
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.parallel.sharding import gather_whole, sharded_tensors
from mcore_spec.quantization.calibrate import quantize
from mcore_spec.weights import hf_export
from tests.parity.export_cases import converted, import_base, module_outputs


def export_whole(
    *,
    base_directory: Path,
    directory: Path,
    layout: Layout,
    token_ids: Tensor | None = None,
    architecture: dict[str, Any] | None = None,
    max_file_bytes: int = hf_export.MAX_FILE_BYTES,
    is_refused: bool = False,
    is_alone: bool = False,
    recipe: Recipe | None = None,
) -> Any:
    """Base and draft as one model; what the module computes, or the message of the refusal."""
    flags = eagle_preset("eagle-mtp")["config"]["eagle_architecture_config"]
    mode = [("eagle", {"eagle_architecture_config": {**flags, **(architecture or {})}})]
    with parallel_runtime(layout), mock.patch.object(hf_export, "MAX_FILE_BYTES", max_file_bytes):
        model, record = converted(base_directory, layout, mode, None)
        if recipe is not None:
            record = make_record(quantize(model, recipe), record.identity)
        try:
            if is_alone:
                export_draft(model, record, directory, export_format="mimo")
            else:
                export_base_and_draft(
                    model, record, directory, tokenizer_path=base_directory / "tokenizer", export_format="mimo"
                )
        except McoreSpecError as error:
            if not is_refused:
                raise
            return f"{type(error).__name__}: {error}"
        assert not is_refused
        return None if token_ids is None else module_outputs(model, token_ids)


def start_as_mtp(
    *, base_directory: Path, directory: Path, layout: Layout, architecture: dict[str, Any] | None = None
) -> Any:
    """The whole draft on the base, started as the layer in `directory`; or the message of the refusal."""
    flags = eagle_preset("eagle-mtp")["config"]["eagle_architecture_config"]
    with parallel_runtime(layout):
        model, _ = import_base(base_directory, layout)
        convert(model, [("eagle", {"eagle_architecture_config": {**flags, **(architecture or {})}})])
        try:
            start_as_base_mtp(model, directory)
        except McoreSpecError as error:
            return f"{type(error).__name__}: {error}"
        conversion, draft = conversion_of(model), MegatronBase(model).draft()
        assert conversion is not None
        assert conversion.config.eagle_reuse_base_mtp
        if draft is None:
            return None
        return {
            entry.name: gather_whole(entry.tensor, entry.shard, draft.tp).clone() for entry in sharded_tensors(draft)
        }

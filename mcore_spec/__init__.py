"""Attach speculative-decoding drafts to a base model, train them, and export them for inference engines.

The public names are loaded when they are first used, so that ``mcore-spec --help`` imports no torch.
"""

from __future__ import annotations

import pkgutil
from types import MappingProxyType
from typing import Any

_PUBLIC = MappingProxyType(
    {
        "EAGLE1_DEFAULT_CFG": "mcore_spec.config",
        "EAGLE3_DEFAULT_CFG": "mcore_spec.config",
        "EAGLE_MTP_DEFAULT_CFG": "mcore_spec.config",
        "BaseIdentity": "mcore_spec.config",
        "CheckpointError": "mcore_spec.errors",
        "ConfigError": "mcore_spec.errors",
        "EagleConfig": "mcore_spec.config",
        "Layout": "mcore_spec.parallel.layout",
        "MedusaConfig": "mcore_spec.config",
        "Recipe": "mcore_spec.config.quantization",
        "UnsupportedError": "mcore_spec.errors",
        "convert": "mcore_spec.conversion",
        "enable_huggingface_checkpointing": "mcore_spec.huggingface.checkpointing",
        "export_draft": "mcore_spec.export.draft",
        "export_speculative_decoding": "mcore_spec.huggingface.drafts",
        "find_checkpoint": "mcore_spec.checkpoint.store",
        "fit_start": "mcore_spec.huggingface.linear_start",
        "load_checkpoint": "mcore_spec.checkpoint.store",
        "make_record": "mcore_spec.checkpoint.store",
        "parallel_runtime": "mcore_spec.parallel.layout",
        "quantize": "mcore_spec.quantization.calibrate",
        "restore": "mcore_spec.huggingface.drafts",
        "save": "mcore_spec.huggingface.drafts",
        "save_checkpoint": "mcore_spec.checkpoint.store",
    }
)
__all__ = list(_PUBLIC)  # noqa: PLE0605 - one owner for the names


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pkgutil.resolve_name(f"{_PUBLIC[name]}:{name}")

"""What a checkpoint says about its weights."""

from __future__ import annotations

from typing import Any

from mcore_spec.config import BaseArchitecture, BaseIdentity, StrictConfig

FORMAT_VERSION = 1


class ConversionRecord(StrictConfig):
    """How the draft was attached."""

    algorithm: str
    config: dict[str, Any]


class CheckpointRecord(StrictConfig):
    """What the weights are."""

    format_version: int = FORMAT_VERSION
    base: BaseArchitecture
    identity: BaseIdentity
    conversion: ConversionRecord | None
    packages: dict[str, str]

"""What a checkpoint says about its weights."""

from __future__ import annotations

import pickle
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from mcore_spec.config import BaseArchitecture, BaseIdentity, StrictConfig
from mcore_spec.config.quantization import QuantizationRecord
from mcore_spec.errors import CheckpointError

FORMAT_VERSION = 1
# Beginnings of the names that a Megatron-LM checkpoint holds besides the model's.
NOT_MODEL = ("optimizer", "chained_", "rng_state", "rerun_state")
# What megatron-core and torch raise where files are missing, damaged or cannot be written. torch's own is a
# `BaseException`: named here, because nothing broader finds it.
STORAGE_ERRORS = (
    CheckpointingException,
    CheckpointException,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    pickle.UnpicklingError,
)


def storage_reason(error: BaseException) -> str:
    """The cause alone: torch's error carries every rank's traceback in its text."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error)


# Beginning of the names of a base's layers.
LAYERS = "decoder.layers."


class ConversionRecord(StrictConfig):
    """How the draft was attached."""

    algorithm: str
    config: dict[str, Any]


class CheckpointRecord(StrictConfig):
    """What the weights are, and in a run that can be resumed, where it is."""

    format_version: int = FORMAT_VERSION
    base: BaseArchitecture
    identity: BaseIdentity
    conversion: ConversionRecord | None
    packages: dict[str, str]
    training: dict[str, Any] | None = None
    quantization: QuantizationRecord | None = None

    def check_not_quantized(self, what: str, *, remedy: str) -> None:
        """Refuse a base that computes with quantised weights.

        Args:
            what: needs the base as it was.
            remedy: what to do instead.

        Raises:
            CheckpointError: it is quantised.
        """
        if self.quantization is not None:
            raise CheckpointError(
                f"{what}, but the checkpoint of {self.identity.source} is quantised ({self.quantization.recipe.name}): "
                f"{remedy}"
            )

    def check_has_layers(self, what: str, *, remedy: str) -> None:
        """Refuse a base that cannot run.

        Args:
            what: needs its layers.
            remedy: what to do instead.

        Raises:
            CheckpointError: it is kept without them.
        """
        if not self.base.has_layers:
            raise CheckpointError(
                f"{what} runs the base, but the checkpoint of {self.identity.source} was made with "
                f"--export-offline-model and has no layers: {remedy}"
            )

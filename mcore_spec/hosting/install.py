"""Making a transformers model with a draft one that trains, answers and is saved as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mcore_spec.bases.transformers import TransformersBase
from mcore_spec.config import StrictConfig
from mcore_spec.config.quantization import QuantizationRecord
from mcore_spec.hosting.forward import DraftedForward
from mcore_spec.hosting.key import CONFIG_KEY, FORMAT_VERSION, QUANTIZATION_KEY
from mcore_spec.objectives.objective import Task


def install(base: TransformersBase, algorithm: str, config: StrictConfig, make_task: Callable[[], Task]) -> None:
    """Give the model the forward of one with a draft, and its configuration the record.

    Args:
        base: with its draft attached.
        algorithm: a name in the registry.
        config: resolved.
        make_task: see `DraftedForward`.
    """
    model: Any = base.model
    draft = base.draft()
    assert draft is not None, "the draft is attached"
    draft.train(model.training)
    model.forward = DraftedForward(base, make_task)
    record = {"format_version": FORMAT_VERSION, "algorithm": algorithm, "config": config.model_dump(mode="json")}
    known = vars(model.config).get(CONFIG_KEY)
    # A model that is being loaded has its record, with the name of the base that it was made from.
    source = known["base"] if known else model.config.name_or_path
    setattr(model.config, CONFIG_KEY, {**(known or {}), **record, "base": source})


def record_quantization(base: TransformersBase, record: QuantizationRecord | None) -> None:
    """Let the model's configuration say how it is quantised, or no longer."""
    known = vars(base.model.config)
    known.pop(QUANTIZATION_KEY, None)
    if record is not None:
        known[QUANTIZATION_KEY] = {"format_version": FORMAT_VERSION, **record.model_dump(mode="json")}

"""EAGLE-MTP: the base's distribution at every step, as EAGLE-3; its module and what it reads are others."""

from __future__ import annotations

from mcore_spec.config import EagleConfig
from mcore_spec.objectives.objective import Task
from mcore_spec.objectives.stepwise import stepwise_task


def mtp_task(config: EagleConfig) -> Task:
    """What training the draft of this configuration takes."""
    # The start would take the place of the base's layer.
    starts_as_base = config.eagle_reuse_base_decoder or config.eagle_reuse_base_mtp
    return stepwise_task(config, starts_linearly=not starts_as_base)

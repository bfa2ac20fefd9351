"""EAGLE-3: distillation of the base's distribution through all training-time-test steps."""

from __future__ import annotations

from mcore_spec.config import EagleConfig
from mcore_spec.objectives.objective import Task
from mcore_spec.objectives.stepwise import stepwise_task


def eagle3_task(config: EagleConfig) -> Task:
    """What training the draft of this configuration takes."""
    # The map would need the length of the hidden state, which a norm before the residual takes away.
    return stepwise_task(config, starts_linearly=not config.eagle_architecture_config.norm_before_residual)

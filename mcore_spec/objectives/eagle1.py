"""EAGLE-1: the base's next feature and, through the base's head, its distribution; over several steps HASS.

The factors of the two parts are those of the paper (Li et al., arXiv 2401.15077, section 4.2).
"""

from __future__ import annotations

from mcore_spec.config import EagleConfig
from mcore_spec.objectives.objective import Task
from mcore_spec.objectives.stepwise import Terms, stepwise_task

TERMS = Terms(cross_entropy=0.1, regression=1.0)


def eagle1_task(config: EagleConfig) -> Task:
    """What training the draft of this configuration takes."""
    return stepwise_task(config, starts_linearly=True, terms=TERMS)

"""EAGLE-MTP: the base's distribution at every step, as EAGLE-3; its module and what it reads are others."""

from __future__ import annotations

from functools import partial

from mcore_spec.config import EagleConfig
from mcore_spec.objectives.objective import Task
from mcore_spec.objectives.stepwise import StepwiseObjective


def mtp_task(config: EagleConfig) -> Task:
    """What training the draft of this configuration takes."""
    return Task(
        num_steps=config.eagle_ttt_steps,
        aux_layer_ids=config.eagle_architecture_config.eagle_aux_hidden_state_layer_ids,
        mixes_hidden_states=config.eagle_mix_hidden_states,
        reports_accuracy=config.eagle_report_acc,
        # The start would take the place of the base's layer.
        starts_linearly=not config.eagle_reuse_base_decoder,
        make_objective=partial(StepwiseObjective, config),
    )

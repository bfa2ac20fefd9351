"""EAGLE-3: distillation of the base's distribution through all training-time-test steps."""

from __future__ import annotations

from functools import partial

from mcore_spec.config import EagleConfig
from mcore_spec.objectives.objective import Task
from mcore_spec.objectives.stepwise import StepwiseObjective


def eagle3_task(config: EagleConfig) -> Task:
    """What training the draft of this configuration takes."""
    return Task(
        num_steps=config.eagle_ttt_steps,
        aux_layer_ids=config.eagle_architecture_config.eagle_aux_hidden_state_layer_ids,
        mixes_hidden_states=config.eagle_mix_hidden_states,
        reports_accuracy=config.eagle_report_acc,
        # The map would need the length of the hidden state, which the norm takes away.
        starts_linearly=not config.eagle_architecture_config.norm_before_residual,
        make_objective=partial(StepwiseObjective, config),
    )

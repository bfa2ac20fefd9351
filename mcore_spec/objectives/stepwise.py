"""The objective of drafts that are fed with their own states: the base's distribution at every training-time-test step.

The members of the EAGLE family differ in what they read, which the draft says, and in the values of `Terms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mcore_spec.bases.base import Base
from mcore_spec.bases.features import Features, features_for
from mcore_spec.config import EagleConfig
from mcore_spec.data.batch import Batch
from mcore_spec.data.noise import uniform_noise
from mcore_spec.drafts.steps import Mixing, StepOutput
from mcore_spec.drafts.stepwise import StepwiseDraft
from mcore_spec.errors import ConfigError
from mcore_spec.losses.fused import distillation_loss
from mcore_spec.losses.outcome import LossOutput
from mcore_spec.losses.regression import feature_regression
from mcore_spec.objectives.objective import Task
from mcore_spec.objectives.rows import next_ids, relate_vocabularies, teacher_rows
from mcore_spec.parallel.documents import Documents

# Tokens of the document whose noise has the configured amplitude; a longer one has less (EAGLE-1's training code).
NOISE_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What the loss of a row is made of.

    Attributes:
        cross_entropy: factor of the cross-entropy.
        regression: factor of the distance between the draft's state and the base's next one; 0: not computed.
    """

    cross_entropy: float = 1.0
    regression: float = 0.0


ENTROPY = Terms()


class JudgedState(NamedTuple):
    """What proposes x[t + 2 + step + head]: the state of a step, read by its own head (0) or by a parallel one."""

    step: int
    head: int


def judged_states(config: EagleConfig) -> list[JudgedState]:
    """First those of the tokens that are served, in order: each step's own, then the last step's others."""
    last, num_heads = config.eagle_ttt_steps - 1, config.eagle_architecture_config.parallel_draft_step
    served = [JudgedState(step, 0) for step in range(last + 1)] + [JudgedState(last, i) for i in range(1, num_heads)]
    return served + [JudgedState(step, i) for step in range(last) for i in range(1, num_heads)]


def num_proposed(config: EagleConfig) -> int:
    """Tokens that a row proposes: one a step, and the last step's others."""
    return config.eagle_ttt_steps + config.eagle_architecture_config.parallel_draft_step - 1


def stepwise_task(config: EagleConfig, *, starts_linearly: bool, terms: Terms = ENTROPY) -> Task:
    """What training a member of the family takes.

    Args:
        config: resolved.
        starts_linearly: whether the member has a least-squares start.
        terms: of its loss.
    """
    return Task(
        num_steps=num_proposed(config),
        aux_layer_ids=config.eagle_architecture_config.eagle_aux_hidden_state_layer_ids,
        mixes_hidden_states=config.eagle_mix_hidden_states,
        reports_accuracy=config.eagle_report_acc,
        draws_noise=config.eagle_feature_noise > 0,
        num_regressed=config.eagle_ttt_steps if terms.regression > 0 else 0,
        starts_linearly=starts_linearly,
        trains_base=not config.eagle_freeze_base_model,
        trains_through_features=config.eagle_train_through_features,
        make_objective=partial(StepwiseObjective, config, terms=terms),
    )


class StepwiseObjective:
    """See `Objective`."""

    def __init__(
        self,
        config: EagleConfig,
        base: Base,
        draft: StepwiseDraft,
        *,
        terms: Terms = ENTROPY,
        recompute: bool = False,
        judges_base: bool = False,
    ) -> None:
        """Look at both heads.

        Args:
            config: resolved.
            base: the teacher.
            draft: the student.
            terms: of the loss.
            recompute: compute the activations of each TTT step again in backward.
            judges_base: take the base's own loss along.
        """
        self.config, self.base, self.draft = config, base, draft
        self.terms, self.recompute, self.judges_base = terms, recompute, judges_base
        further = draft.parallel_draft_heads
        self.states = judged_states(config)
        self.num_judged = num_proposed(config)
        heads = [draft.step_head] if further is None else [draft.step_head, further.lm_head]
        token_ids = draft.head_token_ids() if draft.has_reduced_vocabulary else None
        head_of_state = [] if further is None else [min(state.head, 1) for state in self.states]
        self.vocabulary = relate_vocabularies(base, heads, token_ids, head_of_state=head_of_state)

    def __call__(self, batch: Batch, documents: Documents, features: Features) -> LossOutput:
        """Sums over this rank's rows."""
        tp, config = self.base.tp, self.config
        step_token_ids = documents.take(batch.step_token_ids[: config.eagle_ttt_steps], 1)
        embeddings = [self.base.embed(token_ids[None]) for token_ids in step_token_ids]
        outputs = self.draft(
            self._with_noise(features_for(self.draft, features), batch, documents),
            embeddings,
            documents=documents,
            recompute=self.recompute,
            mixing=self._mixing(batch, documents),
            detach=config.eagle_detach_states,
        )
        teacher = teacher_rows(features, documents, tp)
        position = documents.row_index.to(batch.token_ids.device)
        counted = documents.take(batch.counted, 1)
        ahead = [state.step + state.head for state in self.states]
        entropy = distillation_loss(
            self._read([tp.enter(output.hidden) for output in outputs]),
            teacher,
            position=position,
            counted=counted[ahead],
            vocabulary=self.vocabulary,
            decay=config.eagle_loss_decay_factor,
            keep_out_of_vocabulary=config.eagle_keep_out_of_vocabulary,
            labels=None if config.eagle_self_logit_distillation else documents.take(batch.labels, 1)[ahead],
            ahead=ahead,
            num_judged=self.num_judged,
            next_ids=next_ids(batch, documents) if self.judges_base else None,
        )
        return self._with_regression(entropy, outputs, teacher, position, counted[: len(outputs)])

    def _read(self, by_step: Sequence[Tensor]) -> list[Tensor]:
        """What the heads read for each of the judged states, from that of each step; [s, 1, h] -> [s, h]."""
        further = self.draft.parallel_draft_heads
        by_head = [[hidden, *(further.states(hidden) if further is not None else ())] for hidden in by_step]
        return [by_head[state.step][state.head][:, 0] for state in self.states]

    def _with_regression(
        self,
        entropy: LossOutput,
        outputs: Sequence[StepOutput],
        teacher: Tensor,
        position: Tensor,
        counted: Tensor,
    ) -> LossOutput:
        """The cross-entropy and, where it is wanted, the distance of the states."""
        if self.terms.regression == 0:
            return entropy
        regression = feature_regression(
            [output.hidden[:, 0] for output in outputs],
            teacher,
            position=position,
            counted=counted,
            decay=self.config.eagle_loss_decay_factor,
            tp=self.base.tp,
        )
        loss = self.terms.cross_entropy * entropy.loss + self.terms.regression * regression.loss
        return entropy._replace(loss=loss, regression_by_step=regression.loss_by_step)

    def _with_noise(self, features: Tensor, batch: Batch, documents: Documents) -> Tensor:
        """Features [s or s/size, 1, h] with noise; not in validation."""
        amplitude = self.config.eagle_feature_noise
        if amplitude == 0 or not torch.is_grad_enabled():
            return features
        if batch.noise_keys is None:
            raise ConfigError(
                f"eagle_feature_noise = {amplitude}, but the batch has no keys for it; give make_batch noise_keys = "
                "one number a document"
            )
        own_rows = self.base.tp.own_rows
        rows = documents.local_rows(features.device)
        keys = own_rows(documents.take(batch.noise_keys))
        noise = uniform_noise(keys, own_rows(rows.positions), features.shape[-1])
        wide = torch.promote_types(features.dtype, noise.dtype)
        reach = amplitude * NOISE_LENGTH / own_rows(rows.lengths).to(wide)
        return features + (noise.to(wide) * reach[:, None])[:, None].to(features.dtype)

    def _mixing(self, batch: Batch, documents: Documents) -> Mixing | None:
        """How states are mixed; not in validation, which measures what an engine will compute."""
        if not (self.config.eagle_mix_hidden_states and torch.is_grad_enabled()):
            return None
        if batch.replaced is None:
            raise ConfigError(
                "eagle_mix_hidden_states = true, but the batch does not say which rows are mixed; give make_batch "
                "mixing = one random generator a document"
            )
        return Mixing(documents.take(batch.replaced, 1), documents, self.base.tp)

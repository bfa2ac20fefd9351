"""Medusa: each head learns the token that lies one further ahead, from the data or from the base."""

from __future__ import annotations

from functools import partial

from mcore_spec.bases.base import Base
from mcore_spec.bases.features import Features
from mcore_spec.config import MedusaConfig
from mcore_spec.data.batch import Batch
from mcore_spec.drafts.medusa import MedusaDraft
from mcore_spec.losses.fused import distillation_loss
from mcore_spec.losses.outcome import LossOutput
from mcore_spec.objectives.objective import Task
from mcore_spec.objectives.rows import next_ids, relate_vocabularies, teacher_rows
from mcore_spec.parallel.documents import Documents


def medusa_task(config: MedusaConfig) -> Task:
    """What training the heads of this configuration takes."""
    return Task(num_steps=config.medusa_num_heads, make_objective=partial(MedusaObjective, config))


class MedusaObjective:
    """See `Objective`. Step k is head k: row t reads the base's state at t and predicts x[t+2+k]."""

    def __init__(
        self,
        config: MedusaConfig,
        base: Base,
        draft: MedusaDraft,
        *,
        recompute: bool = False,
        judges_base: bool = False,
    ) -> None:
        """Look at the heads.

        Args:
            config: resolved.
            base: the teacher.
            draft: the student.
            recompute: compute the activations of each head's residual blocks again in backward.
            judges_base: take the base's own loss along.
        """
        self.config, self.base, self.draft = config, base, draft
        self.recompute, self.judges_base = recompute, judges_base
        token_ids = draft.head_token_ids() if draft.has_reduced_vocabulary else None
        self.vocabulary = relate_vocabularies(base, draft.own_heads(), token_ids)

    def __call__(self, batch: Batch, documents: Documents, features: Features) -> LossOutput:
        """Sums over this rank's rows."""
        config = self.config
        states = self.draft.states(features.last, recompute=self.recompute)
        return distillation_loss(
            [state[:, 0] for state in states],
            teacher_rows(features, documents, self.base.tp),
            position=documents.row_index.to(batch.token_ids.device),
            counted=documents.take(batch.counted, 1),
            vocabulary=self.vocabulary,
            decay=config.medusa_loss_decay_factor,
            labels=None if config.medusa_self_logit_distillation else documents.take(batch.labels, 1),
            next_ids=next_ids(batch, documents) if self.judges_base else None,
        )

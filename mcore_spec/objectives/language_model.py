"""The base's own objective, where it is trained beside its draft: the next token of what it has to produce."""

from __future__ import annotations

import torch

from mcore_spec.bases.base import Base
from mcore_spec.bases.features import Features
from mcore_spec.data.batch import Batch
from mcore_spec.losses.next_token import next_token_loss
from mcore_spec.losses.outcome import LossOutput
from mcore_spec.losses.vocabulary import NOT_IN_VOCABULARY
from mcore_spec.objectives.objective import Objective, Task
from mcore_spec.objectives.rows import next_ids
from mcore_spec.parallel.documents import Documents


def outcome_of(
    task: Task, objective: Objective, base: Base, batch: Batch, documents: Documents, features: Features
) -> LossOutput:
    """The draft's loss on the features, and the base's own where it is trained.

    Args:
        task: of the draft.
        objective: of the draft.
        base: that the features are of.
        batch: of the whole row.
        documents: of the batch.
        features: the base's; of one that is trained with their gradient.
    """
    outcome = objective(batch, documents, features if task.trains_through_features else features.detached())
    return with_language_model(outcome, base, batch, documents, features) if task.trains_base else outcome


def with_language_model(
    outcome: LossOutput, base: Base, batch: Batch, documents: Documents, features: Features
) -> LossOutput:
    """The draft's loss and the base's: row t predicts token x[t+1] where m[t+1].

    One token has one weight: both are sums, which the caller divides by the same number of rows.

    Args:
        outcome: of the draft's objective.
        base: whose head is trained too.
        batch: of the whole row.
        documents: of the batch.
        features: the base's, with their gradient.
    """
    labels = next_ids(batch, documents)
    own = next_token_loss(
        base.tp.enter(features.last)[:, 0],
        base.head_weight(),
        labels=labels,
        counted=labels != NOT_IN_VOCABULARY,
        vocab_size=base.architecture.vocab_size,
        tp=base.tp,
    )
    sums = torch.stack((own.loss.detach().double(), own.num_rows.double()))
    return outcome._replace(loss=outcome.loss + own.loss, language_model=sums)

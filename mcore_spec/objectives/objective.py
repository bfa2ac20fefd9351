"""What every objective is: what it asks of batches and base, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from mcore_spec.bases.features import Features
from mcore_spec.data.batch import Batch
from mcore_spec.losses.outcome import LossOutput
from mcore_spec.parallel.documents import Documents


class Objective(Protocol):
    """The loss of a draft on rows of features, on the last pipeline stage."""

    def __call__(self, batch: Batch, documents: Documents, features: Features) -> LossOutput:
        """Sums over this rank's rows.

        Args:
            batch: of the whole row.
            documents: of the batch; which of its rows are this context-parallel rank's.
            features: the base's, of this rank's rows.
        """
        ...


MakeObjective: TypeAlias = Callable[..., Objective]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What training a draft takes; every pipeline stage knows it, the last alone has the objective.

    Attributes:
        num_steps: tokens that a row proposes, K.
        aux_layer_ids: layers of the base whose outputs the draft reads.
        mixes_hidden_states: whether batches to train on say which rows read the draft's own state.
        draws_noise: whether they have the keys of noise on the features.
        num_regressed: steps, from the first, whose states the loss measures.
        reports_accuracy: whether the log has the accuracy of each step, and what follows from it.
        starts_linearly: whether the draft has a start from data (--fit-start).
        trains_base: whether the base is trained too, for the next token.
        trains_through_features: whether the draft's gradient flows on into a base that is trained.
        make_objective: ``make_objective(base, draft, recompute=..., judges_base=...)``; `recompute`: compute the
            activations of each step again in backward; `judges_base`: take the base's own loss along
            (`LossOutput.language_model`), from the logits that teach, so it is that of `Features.teacher` where there
            is one.
    """

    num_steps: int
    make_objective: MakeObjective
    aux_layer_ids: tuple[int, ...] = ()
    mixes_hidden_states: bool = False
    draws_noise: bool = False
    num_regressed: int = 0
    reports_accuracy: bool = True
    starts_linearly: bool = False
    trains_base: bool = False
    trains_through_features: bool = False


MakeTask: TypeAlias = Callable[[Any], Task]

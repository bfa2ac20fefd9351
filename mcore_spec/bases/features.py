"""What a base hands a draft."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mcore_spec.data.batch import Batch
from mcore_spec.drafts.draft import Draft
from mcore_spec.parallel.documents import Documents


class Features(NamedTuple):
    """Hidden states of one forward pass of the base, on the last pipeline stage; of a frozen base without gradient.

    Attributes:
        aux: outputs of the aux layers in layer order, joined on the last dimension, [s or s/tp, b, n h];
            ``None`` where none were asked for.
        last: the last layer's output after the final norm, [s or s/tp, b, h].
        teacher: the same of another pass, whose distribution the draft is to learn; ``None``: `last` is it.
    """

    aux: Tensor | None
    last: Tensor
    teacher: Tensor | None = None

    def to(self, device: torch.device) -> Features:
        """The same states on another device."""
        aux, teacher = (None if states is None else states.to(device) for states in (self.aux, self.teacher))
        return Features(aux=aux, last=self.last.to(device), teacher=teacher)

    def detached(self) -> Features:
        """The same states, through which no gradient flows into the base."""
        return self._replace(aux=None if self.aux is None else self.aux.detach(), last=self.last.detach())


class FeatureSource(Protocol):
    """Where the features of a batch come from: a base that runs, or a store."""

    def __call__(self, batch: Batch, documents: Documents) -> Features | None:
        """Features of this rank's rows on the last stage, ``None`` on the others; every rank of the model must call.

        Args:
            batch: of the whole row.
            documents: of the batch; which of its rows are this context-parallel rank's.
        """
        ...


def features_for(draft: Draft, features: Features) -> Tensor:
    """Those of the base's hidden states that the draft reads."""
    if draft.reads == "last":
        return features.last
    assert features.aux is not None
    return features.aux

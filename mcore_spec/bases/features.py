"""What a base hands a draft."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mcore_spec.drafts.draft import Draft


class Features(NamedTuple):
    """Hidden states of one forward pass of the base, without gradient, on the last pipeline stage.

    Attributes:
        aux: outputs of the aux layers in layer order, joined on the last dimension, [s or s/tp, b, n h];
            ``None`` where none were asked for.
        last: the last layer's output after the final norm, [s or s/tp, b, h].
        teacher: the same of another pass, whose distribution the draft is to learn; ``None``: `last` is it.
    """

    aux: Tensor | None
    last: Tensor
    teacher: Tensor | None = None


def features_for(draft: Draft, features: Features) -> Tensor:
    """Those of the base's hidden states that the draft reads."""
    if draft.reads == "last":
        return features.last
    assert features.aux is not None
    return features.aux

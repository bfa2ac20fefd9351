"""What objectives take from base and batch: the teacher's rows, and the two vocabularies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mcore_spec.bases.base import Base
from mcore_spec.bases.features import Features
from mcore_spec.layers.linear import VocabularyHead
from mcore_spec.losses.vocabulary import Vocabulary
from mcore_spec.parallel.collectives import gather_without_grad
from mcore_spec.parallel.documents import Documents
from mcore_spec.parallel.tensor_parallel import SEQUENCE_DIM, TensorParallel


def teacher_rows(features: Features, documents: Documents, tp: TensorParallel) -> Tensor:
    """The teacher's last hidden states of the whole row, [rows, h]; its logits are computed block by block."""
    last = features.last if features.teacher is None else features.teacher
    if tp.sequence_parallel:
        last = gather_without_grad(last, SEQUENCE_DIM, tp.group)
    return documents.join(last, with_grad=False)[:, 0]


@torch.no_grad()
def relate_vocabularies(base: Base, own_heads: Sequence[VocabularyHead], token_ids: Tensor | None) -> Vocabulary:
    """The heads of both sides; every rank of the last stage's tensor-parallel group must call.

    Args:
        base: the teacher.
        own_heads: the draft's head, or one a step; none: the base's.
        token_ids: base id of each entry of a reduced draft vocabulary; ``None``: the whole vocabulary.
    """
    head, rows = base.head_weight(), None
    own: Tensor | tuple[Tensor, ...] = head
    if own_heads:
        own = own_heads[0].weight if len(own_heads) == 1 else tuple(each.weight for each in own_heads)
        first = own_heads[0]
        if base.tp.size > 1 and (token_ids is not None or first.weight.shape != head.shape):
            # The base's rows of these entries lie on other ranks.
            ids = torch.arange(first.vocab_size, device=head.device) if token_ids is None else token_ids
            rows = base.head_rows(ids, first=first.first_row, stop=first.first_row + first.num_valid_rows())
    return Vocabulary(
        teacher_head=head,
        vocab_size=base.architecture.vocab_size,
        student_head=own,
        draft_to_target=token_ids,
        teacher_rows=rows,
        tp=base.tp,
    )

"""What objectives take from base and batch: the teacher's rows, and the two vocabularies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mcore_spec.bases.base import Base
from mcore_spec.bases.features import Features
from mcore_spec.data.batch import Batch
from mcore_spec.layers.linear import VocabularyHead
from mcore_spec.losses.vocabulary import NOT_IN_VOCABULARY, Vocabulary
from mcore_spec.parallel.documents import Documents, whole_rows
from mcore_spec.parallel.tensor_parallel import TensorParallel


def teacher_rows(features: Features, documents: Documents, tp: TensorParallel) -> Tensor:
    """The teacher's last hidden states of the whole row, [rows, h]; its logits are computed block by block."""
    return whole_rows(features.last if features.teacher is None else features.teacher, documents, tp)


def next_ids(batch: Batch, documents: Documents) -> Tensor:
    """The token behind each of this rank's rows, int64; `NOT_IN_VOCABULARY` where the base need not produce it."""
    return documents.take(batch.step_token_ids[0].masked_fill(~batch.produced, NOT_IN_VOCABULARY))


@torch.no_grad()
def relate_vocabularies(
    base: Base,
    heads: Sequence[VocabularyHead | None],
    token_ids: Tensor | None,
    *,
    head_of_state: Sequence[int] = (),
) -> Vocabulary:
    """The heads of both sides; every rank of the last stage's tensor-parallel group must call.

    Args:
        base: the teacher.
        heads: the draft's head, or several; ``None`` among them: the base's, read as it is.
        token_ids: base id of each entry of a reduced draft vocabulary; ``None``: the whole vocabulary.
        head_of_state: which of several heads reads each of the draft's states; empty: one each.
    """
    head, rows = base.head_weight(), None
    weights = tuple(head if each is None else each.weight for each in heads)
    own = [each for each in heads if each is not None]
    if own:
        first = own[0]
        if base.tp.size > 1 and (token_ids is not None or first.weight.shape != head.shape):
            # The base's rows of these entries lie on other ranks.
            ids = torch.arange(first.vocab_size, device=head.device) if token_ids is None else token_ids
            rows = base.head_rows(ids, first=first.first_row, stop=first.first_row + first.num_valid_rows())
    return Vocabulary(
        teacher_head=head,
        vocab_size=base.architecture.vocab_size,
        student_head=weights[0] if len(weights) == 1 else weights,
        draft_to_target=token_ids,
        teacher_rows=rows,
        tp=base.tp,
        frozen_heads=tuple(index for index, each in enumerate(heads) if each is None),
        head_of_state=tuple(head_of_state),
    )

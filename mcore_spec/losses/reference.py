"""The distillation loss, row by row: the specification of `fused`.

One process, whole heads, every logit of a row at once, gradients by autograd. Slow, and meant to be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from mcore_spec.losses.outcome import LossOutput
from mcore_spec.losses.vocabulary import NOT_IN_VOCABULARY, Vocabulary


def distillation_loss_reference(
    student: Sequence[Tensor],
    teacher: Tensor,
    *,
    position: Tensor,
    counted: Tensor,
    vocabulary: Vocabulary,
    decay: float,
    labels: Tensor | None = None,
    keep_out_of_vocabulary: bool = False,
    ahead: Sequence[int] | None = None,
    num_judged: int | None = None,
    next_ids: Tensor | None = None,
) -> LossOutput:
    """`fused.distillation_loss`, which has the arguments' full description, for a group of one rank.

    Args:
        student: K tensors [rows, h].
        teacher: [positions, h].
        position: int64 [rows].
        counted: bool [K, rows].
        vocabulary: the heads of both, whole.
        decay: weight of a step relative to the one before.
        labels: int64 [K, rows], or None.
        keep_out_of_vocabulary: whether rows stay whose teacher argmax is not in the draft vocabulary.
        ahead: what stands for k in positions and decay, one a tensor of `student`, or None.
        num_judged: how many of them the statistics are about, or None.
        next_ids: int64 [rows], the token behind each row where the base is judged too, or None.

    Returns:
        The sums; `loss` carries gradients to `student` and to the student's heads.
    """
    assert vocabulary.tp.size == 1, "the reference holds whole heads"
    wide = torch.promote_types(student[0].dtype, torch.float32)
    ids = vocabulary.draft_to_target
    # The base id of each row of the student's head.
    draft_ids = list(range(vocabulary.vocab_size)) if ids is None else ids.tolist()
    teacher_head = vocabulary.teacher_head.detach()[: vocabulary.vocab_size]
    ahead = range(len(student)) if ahead is None else ahead
    judged = slice(num_judged)
    entered, correct = torch.zeros_like(counted), torch.zeros_like(counted)
    losses = []
    language_model = None
    if next_ids is not None:
        is_wanted = next_ids != NOT_IN_VOCABULARY
        log_p = (teacher.detach()[position[is_wanted]] @ teacher_head.T).to(wide).log_softmax(1)
        own = -log_p.gather(1, next_ids[is_wanted, None]).sum()
        language_model = torch.stack((own.double(), is_wanted.sum().double()))
    for k, hidden in enumerate(student):
        student_head = vocabulary.student_heads[vocabulary.head_of(k)][: len(draft_ids)]
        # A zero that depends on every input, so that a step without rows has gradients of zero.
        loss = 0 * (hidden.sum() + student_head.sum()).to(wide)
        for row in counted[k].nonzero().flatten().tolist():
            teacher_logits = (teacher_head @ teacher[position[row] + 1 + ahead[k]].detach()).to(wide)
            student_logits = (student_head @ hidden[row]).to(wide)
            best = int(teacher_logits.argmax())
            correct[k, row] = draft_ids[int(student_logits.argmax())] == best
            log_q = student_logits.log_softmax(0)
            if labels is None:
                entered[k, row] = keep_out_of_vocabulary or best in draft_ids
                term = -(teacher_logits[draft_ids].softmax(0) * log_q).sum()
            else:
                label = int(labels[k, row])
                entered[k, row] = label in draft_ids
                term = -log_q[draft_ids.index(label)] if label in draft_ids else log_q.sum()
            if entered[k, row]:
                loss = loss + term
        losses.append(loss)
    return LossOutput(
        loss=torch.stack([decay**k * loss for k, loss in zip(ahead, losses, strict=True)]).sum(),
        loss_by_step=torch.stack(losses).detach()[judged],
        rows_by_step=entered[judged].sum(1),
        judged_by_step=counted[judged].sum(1),
        correct_by_step=correct[judged].sum(1),
        accepted=torch.tensor(sum(_accepted(row) for row in correct[judged].T.tolist()), device=counted.device),
        language_model=language_model,
    )


def _accepted(correct: list[bool]) -> int:
    """Steps of one row that were right before the first that was not, or that the mask leaves out."""
    return len(list(takewhile(bool, correct)))

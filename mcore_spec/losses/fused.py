"""The distillation loss of all training-time-test steps with its gradients, chunk by chunk over teacher positions.

Each teacher logit is computed once: a chunk's teacher logits, then the rows of the K steps that are judged there,
whose loss and gradients are finished while the chunk's probabilities are at hand. Nothing of size [tokens, vocabulary]
ever exists, and under tensor parallelism the vocabulary stays sharded. The same numbers, row by row: `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mcore_spec.errors import ConfigError
from mcore_spec.losses.blocks import Scratch, add_head_gradient, block_rows, project
from mcore_spec.losses.outcome import LossOutput
from mcore_spec.losses.schedule import Chunk, StepRows, schedule
from mcore_spec.losses.softmax import against_labels, all_reduce, exponentiate, row_peak
from mcore_spec.losses.vocabulary import NOT_IN_VOCABULARY, Vocabulary, VocabularySlice


def distillation_loss(
    student: Sequence[Tensor],
    teacher: Tensor,
    *,
    position: Tensor,
    counted: Tensor,
    vocabulary: Vocabulary,
    decay: float,
    labels: Tensor | None = None,
    keep_out_of_vocabulary: bool = False,
    max_logits: int | None = None,
    ahead: Sequence[int] | None = None,
    num_judged: int | None = None,
    next_ids: Tensor | None = None,
) -> LossOutput:
    """Cross-entropy of the draft against the base, summed over rows and over K steps (EAGLE-3, arXiv 2503.01840).

    Row r is judged at step k by the base's distribution p at position ``position[r] + 1 + k``; its loss is
    -sum_v p(v) log q(v), p over the draft vocabulary's rows (renormalised). A row whose teacher argmax over the full
    vocabulary is not in the draft vocabulary is dropped from the loss and still judged, as wrong.

    The gradients are made in forward, in the dtype of what they belong to; `loss.backward()` multiplies them by the
    incoming scalar. Logits, softmax and sums are float32 or wider. Under tensor parallelism the gradient of a
    student tensor is this rank's term of a sum over the group, because each rank sees its slice of the vocabulary:
    `TensorParallel.enter`, by which the caller entered the parallel region, adds the terms.

    Args:
        student: K tensors [rows, h], what a head reads at each step.
        teacher: the base's last hidden states after the final norm, [positions, h]; no gradient.
        position: index into `teacher` of each row's features, int64 [rows]; any order, no two alike.
        counted: rows of the mask, bool [K, rows]; their positions at the step exist.
        vocabulary: the heads of both; the student has one for all steps, or K.
        decay: weight of a step relative to the one before.
        labels: base ids int64 [K, rows], read where `counted`: the loss is then -log q(label), and a row whose label
            is not in the draft vocabulary is dropped. None: the base's distribution.
        keep_out_of_vocabulary: do not drop rows for their teacher argmax (with `labels` there is nothing to keep).
        max_logits: elements in a block of logits on this rank; 2 to 4 blocks are held. Default: by device.
        ahead: what stands for k above in positions and decay, one a tensor of `student`. Default: 0, 1, ... K - 1.
        num_judged: how many of them, from the first, the statistics are about. Default: all.
        next_ids: the token behind each row, int64 [rows], for the base's own loss, `LossOutput.language_model`;
            `NOT_IN_VOCABULARY` where it is not wanted. It adds nothing to `loss`. None: nowhere.

    Returns:
        The sums; `loss` carries the gradients.

    Raises:
        ConfigError: `max_logits` below 1, or `keep_out_of_vocabulary` with `labels`.
    """
    if keep_out_of_vocabulary and labels is not None:
        raise ConfigError(
            "keep_out_of_vocabulary = true with labels: a label outside of the draft vocabulary has no logit; "
            "leave it off, or distil from the base's distribution"
        )
    assert counted.shape == (len(student), position.shape[0]), f"counted is {list(counted.shape)}"
    assert labels is None or labels.shape == counted.shape, "labels are shaped like counted"
    assert all(hidden.shape == (position.shape[0], teacher.shape[1]) for hidden in student), "one hidden state a row"
    num_heads = len(vocabulary.head_of_state or vocabulary.student_heads)
    assert num_heads in (1, len(student)), "one head for all steps, or one a step"
    request = _Request(
        teacher=teacher.detach(),
        position=position.to(teacher.device),
        counted=counted,
        vocabulary=vocabulary,
        decay=decay,
        labels=labels,
        keep_out_of_vocabulary=keep_out_of_vocabulary,
        max_positions=block_rows(
            max(vocabulary.teacher.width, vocabulary.student.width), device=teacher.device, max_logits=max_logits
        ),
        with_grad=torch.is_grad_enabled(),
        ahead=tuple(range(len(student)) if ahead is None else ahead),
        num_judged=len(student) if num_judged is None else num_judged,
        next_ids=next_ids,
    )
    frozen = vocabulary.frozen_heads
    heads = [head.detach() if i in frozen else head for i, head in enumerate(vocabulary.student_heads)]
    return LossOutput(*_DistillationLoss.apply(request, *heads, *student))


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What the loss is asked for, without the tensors that may get a gradient."""

    teacher: Tensor
    position: Tensor
    counted: Tensor
    vocabulary: Vocabulary
    decay: float
    labels: Tensor | None
    keep_out_of_vocabulary: bool
    max_positions: int
    with_grad: bool
    ahead: tuple[int, ...]
    num_judged: int
    next_ids: Tensor | None


class _DistillationLoss(Function):
    @staticmethod
    def forward(ctx: Any, request: _Request, *heads_and_student: Tensor) -> tuple[Tensor | None, ...]:
        wants = [request.with_grad and needed for needed in ctx.needs_input_grad[1:]]
        num_heads = len(request.vocabulary.student_heads)
        student = heads_and_student[num_heads:]
        work = _Work(request, student, wants_heads=wants[:num_heads], wants_student=wants[num_heads:])
        for chunk in schedule(
            request.position,
            request.counted,
            ahead=request.ahead,
            num_positions=request.teacher.shape[0],
            max_positions=request.max_positions,
            further=None if work.next_ids is None else work.next_ids != NOT_IN_VOCABULARY,
        ):
            work.add(chunk)
        outcome = work.finish()
        ctx.save_for_backward(*work.head_grads, *work.student_grads)
        ctx.mark_non_differentiable(*(part for part in outcome[1:] if part is not None))
        return tuple(outcome)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        # A head's is wider than the head where that is narrow; autograd rounds what it is given.
        return None, *(None if grad is None else grad * grads[0] for grad in ctx.saved_tensors)


class _Target(NamedTuple):
    """What the teacher says at the n positions of a chunk.

    Attributes:
        ids: argmax over the full vocabulary, int64 [n].
        is_kept: whether rows judged here may enter the loss, bool [n].
        probabilities: over this rank's slice of the draft vocabulary, [n, width], zero where not kept; None: labels.
    """

    ids: Tensor
    is_kept: Tensor
    probabilities: Tensor | None


class _Work:
    """The sums and gradients, chunk by chunk."""

    def __init__(
        self,
        request: _Request,
        student: Sequence[Tensor],
        *,
        wants_heads: Sequence[bool],
        wants_student: Sequence[bool],
    ) -> None:
        self.request, self.student = request, student
        self.group = request.vocabulary.tp.group
        dtype, device = student[0].dtype, request.teacher.device
        self.wide = torch.promote_types(torch.promote_types(dtype, request.teacher.dtype), torch.float32)
        self.head_grads = [
            torch.zeros_like(head, dtype=self.wide) if wants else None
            for head, wants in zip(request.vocabulary.student_heads, wants_heads, strict=True)
        ]
        self.student_grads = [
            torch.zeros_like(hidden) if wants else None for hidden, wants in zip(student, wants_student, strict=True)
        ]
        self._wants_gradients = any(wants_heads) or any(wants_student)
        self.entered = torch.zeros_like(request.counted)
        self.expected = torch.zeros_like(request.counted, dtype=torch.int64)
        self.predicted = torch.zeros_like(self.expected)
        # A row's loss is log_sum - cross; log_sum is the same on every rank, cross one term of a sum over the group.
        self.log_sum = torch.zeros(len(student), dtype=self.wide, device=device)
        self.cross = torch.zeros_like(self.log_sum)
        # The same two of the base's own loss, and the token behind each position.
        self.base_log_sum, self.base_cross = torch.zeros((2,), dtype=self.wide, device=device).unbind()
        self.next_ids = None
        if request.next_ids is not None:
            nowhere = torch.full((request.teacher.shape[0],), NOT_IN_VOCABULARY, dtype=torch.int64, device=device)
            self.next_ids = nowhere.index_copy_(0, request.position, request.next_ids)
        self._teacher_block, self._draft_block, self._student_block, self._taken_block = (
            Scratch(self.wide, device) for _ in range(4)
        )
        self._narrow_blocks = {narrow: Scratch(narrow, device) for narrow in {dtype, request.teacher.dtype}}

    def add(self, chunk: Chunk) -> None:
        """Judge the rows of every step at the positions of a chunk."""
        target = self._teach(chunk.positions)
        for step in chunk.steps:
            self._judge(step, target)

    def finish(self) -> LossOutput:
        """The sums over all chunks."""
        judged, decay, ahead = slice(self.request.num_judged), self.request.decay, self.request.ahead
        counted = self.request.counted
        vocabulary = self.request.vocabulary
        predicted = all_reduce(self.predicted, dist.ReduceOp.MIN, self.group).clamp_(max=vocabulary.draft_size - 1)
        loss_by_step = self.log_sum - all_reduce(self.cross, dist.ReduceOp.SUM, self.group)
        weights = torch.tensor([decay**k for k in ahead], dtype=self.wide)
        correct = ((vocabulary.to_target(predicted) == self.expected) & counted)[judged]
        return LossOutput(
            loss=(weights.to(loss_by_step.device) * loss_by_step).sum(),
            loss_by_step=loss_by_step[judged],
            rows_by_step=self.entered[judged].sum(1),
            judged_by_step=counted[judged].sum(1),
            correct_by_step=correct.sum(1),
            # A row's run ends with the first step that is wrong or that the mask leaves out.
            accepted=correct.to(torch.int64).cumprod(0).sum(),
            language_model=self._language_model(),
        )

    def _language_model(self) -> Tensor | None:
        """The base's own loss and its tokens."""
        if self.next_ids is None:
            return None
        loss = self.base_log_sum - all_reduce(self.base_cross.clone(), dist.ReduceOp.SUM, self.group)
        return torch.stack((loss.double(), (self.next_ids != NOT_IN_VOCABULARY).sum().double()))

    def _teach(self, positions: Tensor) -> _Target:
        request, vocabulary = self.request, self.request.vocabulary
        hidden = request.teacher.index_select(0, positions)
        logits = self._logits(hidden, vocabulary.teacher, self._teacher_block)
        peak = row_peak(logits, vocabulary.teacher.first, self.group)
        # Rows of NaN have no peak; the clamp keeps the index valid, and the loss says NaN.
        ids = all_reduce(peak.entry, dist.ReduceOp.MIN, self.group).clamp_(max=vocabulary.vocab_size - 1)
        if request.labels is not None:
            if self.next_ids is not None:
                self._exponentiate_teacher(positions, logits, peak.value)
            return _Target(ids, torch.ones_like(ids, dtype=torch.bool), None)
        is_kept = vocabulary.to_draft(ids) != NOT_IN_VOCABULARY
        if request.keep_out_of_vocabulary:
            is_kept = torch.ones_like(is_kept)
        if vocabulary.shares_logits:
            total = self._exponentiate_teacher(positions, logits, peak.value)
            return _Target(ids, is_kept, logits.mul_((is_kept / total)[:, None]))
        draft_logits = self._draft_logits(hidden, logits)
        if self.next_ids is not None:
            self._exponentiate_teacher(positions, logits, peak.value)
        highest = row_peak(draft_logits, vocabulary.student.first, self.group).value
        total = exponentiate(draft_logits, highest, self.group).total
        return _Target(ids, is_kept, draft_logits.mul_((is_kept / total)[:, None]))

    def _exponentiate_teacher(self, positions: Tensor, logits: Tensor, highest: Tensor) -> Tensor:
        """Logits over the full vocabulary become exponentials; their totals [n]. In passing, the base's own loss."""
        if self.next_ids is None:
            return exponentiate(logits, highest, self.group).total
        next_ids, first = self.next_ids.index_select(0, positions), self.request.vocabulary.teacher.first
        surprise = against_labels(logits, highest, next_ids, first, self.group, wants_gradients=False)
        self.base_log_sum += (surprise.log_sum * (next_ids != NOT_IN_VOCABULARY)).sum()
        self.base_cross += surprise.label.sum()
        return surprise.total

    def _draft_logits(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """The teacher's logits over this rank's slice of the draft vocabulary, [n, width]."""
        vocabulary = self.request.vocabulary
        if vocabulary.teacher_rows is not None:
            rows = VocabularySlice(vocabulary.teacher_rows, vocabulary.student.first)
            return self._logits(hidden, rows, self._draft_block)
        assert vocabulary.draft_to_target is not None
        out = self._draft_block.block(logits.shape[0], vocabulary.draft_size)
        return torch.index_select(logits, 1, vocabulary.draft_to_target, out=out)

    def _judge(self, step: StepRows, target: _Target) -> None:
        k, rows, head = step.step, step.rows, self.request.vocabulary.student_at(step.step)
        hidden = self.student[k].index_select(0, rows)
        logits = self._logits(hidden, head, self._student_block)
        peak = row_peak(logits, head.first, self.group)
        self.predicted[k].index_copy_(0, rows, peak.entry)
        self.expected[k].index_copy_(0, rows, target.ids.index_select(0, step.slots))
        if target.probabilities is None:
            entered = self._against_labels(step, logits, peak.value)
        else:
            entered = target.is_kept.index_select(0, step.slots)
            p = step.take(target.probabilities, self._taken_block.block(rows.shape[0], head.width))
            total, cross = exponentiate(logits, peak.value, self.group, weights=p)
            assert cross is not None
            self.cross[k] += cross.sum()
            self.log_sum[k] += (total.log() * entered).sum()
            if self._wants_gradients:
                torch.addcmul(p, logits, (1 / total)[:, None], value=-1, out=logits)
        self.entered[k].index_copy_(0, rows, entered)
        if self._wants_gradients:
            self._add_gradients(step, hidden, entered, logits)

    def _against_labels(self, step: StepRows, logits: Tensor, highest: Tensor) -> Tensor:
        """Cross-entropy with hard labels; `logits` becomes onehot - q. Returns which rows entered, bool [m]."""
        assert self.request.labels is not None
        k, head = step.step, self.request.vocabulary.student
        label = self.request.vocabulary.to_draft(self.request.labels[k].index_select(0, step.rows))
        # A label outside of the draft vocabulary stands in no column.
        entered = label != NOT_IN_VOCABULARY
        surprise = against_labels(logits, highest, label, head.first, self.group, wants_gradients=self._wants_gradients)
        self.cross[k] += surprise.label.sum()
        self.log_sum[k] += (surprise.log_sum * entered).sum()
        return entered

    def _add_gradients(self, step: StepRows, hidden: Tensor, entered: Tensor, descent: Tensor) -> None:
        """Add what the rows of one step give; `descent` is p - q, minus the gradient with respect to their logits."""
        factor, head = (
            -(self.request.decay ** self.request.ahead[step.step]),
            self.request.vocabulary.student_at(step.step),
        )
        if hidden.dtype != descent.dtype:
            descent = self._narrow_blocks[hidden.dtype].block(*descent.shape).copy_(descent)
        grad = self.student_grads[step.step]
        if grad is not None:
            # The factor is applied to a row of h, not of the vocabulary, and before rounding to the row's dtype.
            scale = (entered.to(self.wide) * factor)[:, None]
            grad.index_copy_(0, step.rows, (torch.mm(descent, head.weight) * scale).to(grad.dtype))
        whole_grad = self.head_grads[self.request.vocabulary.head_of(step.step)]
        if whole_grad is None:
            return
        add_head_gradient(whole_grad[: head.width], descent, hidden * entered[:, None], factor=factor)

    def _logits(self, hidden: Tensor, head: VocabularySlice, scratch: Scratch) -> Tensor:
        """[n, h] -> [n, width], multiplied in the tensors' dtype and widened."""
        return project(hidden, head.weight, scratch, self._narrow_blocks[hidden.dtype])

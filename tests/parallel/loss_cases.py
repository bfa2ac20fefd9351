"""Inputs of a distillation loss, and what the ranks do with them for `test_losses.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mcore_spec.errors import ConfigError
from mcore_spec.losses.fused import LossOutput, Vocabulary, distillation_loss
from mcore_spec.losses.vocabulary import NOT_IN_VOCABULARY
from mcore_spec.parallel.collectives import gather_without_grad
from mcore_spec.parallel.tensor_parallel import TensorParallel
from tests.tiny import VOCAB_SIZE, draft_to_target

HIDDEN, NUM_POSITIONS, NUM_ROWS, NUM_STEPS = 6, 45, 30, 3
# Odd, like the vocabulary, and large enough that rows are right several steps in a row.
DRAFT_SIZE = 61
DECAY = 0.8
# What the loss is multiplied by before backward: not one, so that a forgotten factor is seen.
UPSTREAM = 0.37
# Padding rows of a head: large, so that they would win every softmax that they reached.
PADDING = 50.0


class Case(NamedTuple):
    """One loss: whole heads without padding, rows at arbitrary positions.

    A student with a head for each step has them stacked, [steps, vocabulary, h].
    """

    student: list[Tensor]
    teacher: Tensor
    position: Tensor
    counted: Tensor
    teacher_head: Tensor
    student_head: Tensor
    is_shared: bool
    draft_to_target: Tensor | None
    options: dict[str, Any]


def make_case(
    *,
    reduced: bool = False,
    own_head: bool = False,
    step_heads: bool = False,
    labels: bool = False,
    keep: bool = False,
    judges_base: bool = False,
    ties: bool = False,
    vocab_size: int = VOCAB_SIZE,
    draft_size: int = DRAFT_SIZE,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    """A student that is near its teacher, so that some rows are right and some runs are long.

    Args:
        reduced: a draft vocabulary of `draft_size`, with a head of its own.
        own_head: the whole vocabulary, with a head of its own.
        step_heads: besides one of the two, a head of its own for each step.
        labels: hard labels.
        keep: out-of-vocabulary rows stay.
        judges_base: the base's own loss is wanted at some rows, among them one whose position nothing else needs.
        ties: whole numbers, whose products are exact, and every row of both heads stands there twice, in the two
            halves of the vocabulary.
        vocab_size: of the base.
        draft_size: of the draft.
        dtype: of every floating-point tensor.
        seed: of the values.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=random, dtype=torch.float64)
        return values.round() if ties else values

    ids = draft_to_target(draft_size, vocab_size=vocab_size) + torch.arange(draft_size) if reduced else None
    teacher_head = normal(vocab_size, HIDDEN)
    if ties:
        half = vocab_size // 2
        teacher_head[half : 2 * half] = teacher_head[:half]
    student_head = teacher_head
    if reduced or own_head:
        student_head = teacher_head[ids] if ids is not None else teacher_head.clone()
        shape = (NUM_STEPS, *student_head.shape) if step_heads else student_head.shape
        student_head = student_head + (0 if ties else 0.1) * normal(*shape)
    teacher = normal(NUM_POSITIONS, HIDDEN)
    position = torch.randperm(NUM_POSITIONS, generator=random)[:NUM_ROWS]
    at = position + 1 + torch.arange(NUM_STEPS)[:, None]
    counted = (torch.rand(NUM_STEPS, NUM_ROWS, generator=random) < 0.8) & (at < NUM_POSITIONS)
    near = teacher[at.clamp(max=NUM_POSITIONS - 1)]
    options: dict[str, Any] = {"keep_out_of_vocabulary": keep} if keep else {}
    if labels:
        # What the mask leaves out has no label, as in a data pipeline.
        drawn = torch.randint(vocab_size, counted.shape, generator=random)
        options["labels"] = torch.where(counted, drawn, -100)
    if judges_base:
        # No row is judged at the first position.
        is_wanted = (torch.rand(NUM_ROWS, generator=random) < 0.6) | (position == position.min())
        drawn = torch.randint(vocab_size, (NUM_ROWS,), generator=random)
        options["next_ids"] = torch.where(is_wanted, drawn, NOT_IN_VOCABULARY)
    return Case(
        student=[(step + (0 if ties else 0.3) * normal(NUM_ROWS, HIDDEN)).to(dtype) for step in near],
        teacher=teacher.to(dtype),
        position=position,
        counted=counted,
        teacher_head=teacher_head.to(dtype),
        student_head=student_head.to(dtype),
        is_shared=not (reduced or own_head),
        draft_to_target=ids,
        options=options,
    )


class Gradients(NamedTuple):
    """Of the loss times `UPSTREAM`: one a step, and of the student's heads, stacked if several, where it is trained."""

    student: list[Tensor]
    head: Tensor | None


class Result(NamedTuple):
    """What a loss returned, and its gradients."""

    output: LossOutput
    gradients: Gradients


def evaluate(case: Case, function: Any, *, padding: int = 0, **options: Any) -> Result:
    """A loss in this process; `padding` rows are behind each head."""
    teacher_head = padded(case.teacher_head, case.teacher_head.shape[0] + padding)
    student_head = teacher_head
    if not case.is_shared:
        student_head = padded(case.student_head, case.student_head.shape[-2] + padding).requires_grad_()
    vocabulary = Vocabulary(
        teacher_head=teacher_head,
        vocab_size=case.teacher_head.shape[0],
        student_head=heads_of(student_head),
        draft_to_target=case.draft_to_target,
    )
    student = [hidden.clone().requires_grad_() for hidden in case.student]
    output = function(student, vocabulary=vocabulary, **inputs(case), **options)
    (output.loss * UPSTREAM).backward()
    return Result(detached(output), Gradients([hidden.grad for hidden in student], student_head.grad))


def inputs(case: Case) -> dict[str, Any]:
    """The arguments of a loss that are the same on every rank."""
    names = ("teacher", "position", "counted")
    return {**{name: getattr(case, name) for name in names}, "decay": DECAY, **case.options}


def detached(output: LossOutput) -> LossOutput:
    return LossOutput(*(None if value is None else value.detach() for value in output))


def padded(head: Tensor, num_rows: int) -> Tensor:
    return F.pad(head, (0, 0, 0, num_rows - head.shape[-2]), value=PADDING)


def heads_of(head: Tensor) -> Tensor | tuple[Tensor, ...]:
    """One head, or each of the stacked ones."""
    return head if head.ndim == 2 else head.unbind()


# --- on several ranks -------------------------------------------------------------------------------


class Shares(NamedTuple):
    """A result on one rank.

    Attributes:
        result: gradients of the student whole, the head's gathered with its padding.
        reduced_shapes: of every tensor that was reduced over the group in forward.
    """

    result: Result
    reduced_shapes: list[tuple[int, ...]]


def sharded_loss(
    *,
    sequence_parallel: bool = False,
    teacher_multiple: int = 1,
    max_logits: int | None = None,
    **case_options: Any,
) -> Shares:
    """The fused loss with both heads cut over all ranks.

    Args:
        sequence_parallel: the student's rows are sharded before the parallel region.
        teacher_multiple: the base's vocabulary is padded to a multiple of this and of the ranks.
        max_logits: as the loss takes it.
        case_options: of `make_case`.
    """
    tp = TensorParallel(group=dist.group.WORLD, sequence_parallel=sequence_parallel)
    case = make_case(**case_options)
    vocab_size, draft_size = case.teacher_head.shape[0], case.student_head.shape[-2]
    multiple = teacher_multiple * tp.size
    teacher_head = cut(padded(case.teacher_head, -(-vocab_size // multiple) * multiple), tp)
    student_head, teacher_rows = teacher_head, None
    if not case.is_shared:
        student_head = cut(padded(case.student_head, tp.padded(draft_size)), tp, dim=-2).requires_grad_()
    if case.draft_to_target is not None or student_head.shape[-2:] != teacher_head.shape:
        draft_ids = torch.arange(vocab_size) if case.draft_to_target is None else case.draft_to_target
        first = tp.rank * student_head.shape[-2]
        teacher_rows = case.teacher_head[draft_ids[first : first + student_head.shape[-2]]]
    vocabulary = Vocabulary(
        teacher_head=teacher_head,
        vocab_size=vocab_size,
        student_head=heads_of(student_head),
        draft_to_target=case.draft_to_target,
        teacher_rows=teacher_rows,
        tp=tp,
    )
    rows = [cut(hidden, tp) if sequence_parallel else hidden for hidden in case.student]
    student = [hidden.clone().requires_grad_() for hidden in rows]
    entered = [tp.enter(hidden) for hidden in student]
    shapes, plain = [], dist.all_reduce

    def recording(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        shapes.append(tuple(tensor.shape))
        return plain(tensor, *arguments, **options)

    dist.all_reduce = recording
    try:
        output = distillation_loss(entered, vocabulary=vocabulary, max_logits=max_logits, **inputs(case))
    finally:
        dist.all_reduce = plain
    (output.loss * UPSTREAM).backward()
    grads = [hidden.grad for hidden in student]
    if sequence_parallel:
        grads = [gather_without_grad(grad, 0, tp.group) for grad in grads]
    head_grad = None if student_head.grad is None else gather_without_grad(student_head.grad, -2, tp.group)
    return Shares(Result(detached(output), Gradients(grads, head_grad)), shapes)


def errors_without_teacher_rows() -> list[str]:
    """What a vocabulary says to a reduced student head, to one that is padded otherwise, and to one cut alike."""
    tp, errors = TensorParallel(group=dist.group.WORLD), []
    for num_rows, ids in ((3, torch.arange(6)), (6, None), (5, None)):
        try:
            Vocabulary(
                teacher_head=torch.zeros(5, HIDDEN),
                vocab_size=9,
                student_head=torch.zeros(num_rows, HIDDEN),
                draft_to_target=ids,
                tp=tp,
            )
            errors.append("")
        except ConfigError as error:
            errors.append(str(error))
    return errors


def cut(whole: Tensor, tp: TensorParallel, *, dim: int = 0) -> Tensor:
    return whole.chunk(tp.size, dim=dim)[tp.rank].clone()

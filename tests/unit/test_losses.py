"""The distillation loss: the fast one equals the readable one, and the readable one is worked by hand."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mcore_spec.errors import ConfigError
from mcore_spec.losses.blocks import HOST_MAX_LOGITS
from mcore_spec.losses.fused import LossOutput, Vocabulary, distillation_loss
from mcore_spec.losses.reference import distillation_loss_reference
from mcore_spec.losses.schedule import schedule
from mcore_spec.losses.vocabulary import NOT_IN_VOCABULARY
from tests.parallel.loss_cases import (
    DECAY,
    NUM_POSITIONS,
    UPSTREAM,
    Case,
    Result,
    evaluate,
    inputs,
    make_case,
)
from tests.tiny import VOCAB_SIZE
from tests.unit import loss_memory

# float64; the sums run in another order.
BOUND = 1e-12
KINDS: dict[str, dict[str, Any]] = {
    "shared head": {},
    "own head": {"own_head": True},
    "reduced": {"reduced": True},
    "reduced, kept": {"reduced": True, "keep": True},
    "labels": {"own_head": True, "labels": True},
    "labels, reduced": {"reduced": True, "labels": True},
    "heads of the steps": {"own_head": True, "step_heads": True},
    "heads of the steps, labels": {"own_head": True, "step_heads": True, "labels": True},
    "heads of the steps, reduced": {"reduced": True, "step_heads": True},
    "base too, shared head": {"judges_base": True},
    "base too, own head": {"own_head": True, "judges_base": True},
    "base too, reduced": {"reduced": True, "judges_base": True},
    "base too, labels": {"own_head": True, "labels": True, "judges_base": True},
}
DROPPING = ("reduced", "labels, reduced", "heads of the steps, reduced", "base too, reduced")
JUDGING = [name for name in KINDS if name.startswith("base too")]
LOSSES = [distillation_loss, distillation_loss_reference]
STATISTICS = LossOutput._fields[2:6]


def assert_near(actual: Tensor, expected: Tensor, bound: float = BOUND) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    assert (actual - expected).abs().max() <= bound * scale


def assert_same(actual: Result, expected: Result) -> None:
    """Every sum and every gradient; the head's may have padding rows behind it, whose gradient is zero."""
    assert_near(actual.output.loss, expected.output.loss)
    assert_near(actual.output.loss_by_step, expected.output.loss_by_step)
    for name in STATISTICS:
        assert torch.equal(getattr(actual.output, name), getattr(expected.output, name)), name
    own, expected_own = actual.output.language_model, expected.output.language_model
    assert (own is None) == (expected_own is None)
    if own is not None and expected_own is not None:
        assert_near(own, expected_own)
    for ours, theirs in zip(actual.gradients.student, expected.gradients.student, strict=True):
        assert_near(ours, theirs)
    head, expected_head = actual.gradients.head, expected.gradients.head
    assert (head is None) == (expected_head is None)
    if head is not None and expected_head is not None:
        num_rows = expected_head.shape[-2]
        assert_near(head[..., :num_rows, :], expected_head)
        assert not head[..., num_rows:, :].any()


@pytest.mark.parametrize("name", KINDS)
# One chunk; five positions in a chunk; one.
@pytest.mark.parametrize("max_logits", [None, 5 * VOCAB_SIZE, 1])
def test_fused_equals_the_reference(name: str, max_logits: int | None) -> None:
    case = make_case(**KINDS[name])
    expected = evaluate(case, distillation_loss_reference)
    assert_same(evaluate(case, distillation_loss, max_logits=max_logits, padding=3), expected)
    dropped = expected.output.judged_by_step - expected.output.rows_by_step
    assert bool(dropped.any()) == (name in DROPPING), "the case drops rows where it should"
    assert expected.output.correct_by_step.all() and expected.output.accepted > expected.output.correct_by_step[0]


@pytest.mark.parametrize("seed", range(1, 9))
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_random_masks(seed: int, share: float) -> None:
    case = make_case(reduced=True, seed=seed)
    drawn = torch.rand(case.counted.shape, generator=torch.Generator().manual_seed(seed)) < share
    at = case.position + 1 + torch.arange(len(case.student))[:, None]
    case = case._replace(counted=drawn & (at < NUM_POSITIONS))
    expected = evaluate(case, distillation_loss_reference)
    assert_same(evaluate(case, distillation_loss, max_logits=7 * VOCAB_SIZE), expected)


def test_rows_of_a_context_parallel_rank() -> None:
    """Three documents of 12, 20 and 8; rank 0 of two holds the first and the last quarter of each."""
    case = make_case(own_head=True)
    spans = ((0, 3), (9, 15), (27, 34), (38, 40))
    position = torch.cat([torch.arange(*span) for span in spans])
    document_end = torch.tensor([12, 32, 40])[torch.bucketize(position, torch.tensor([12, 32]), right=True)]
    num_rows = position.shape[0]
    counted = torch.stack([position + 2 + k < document_end for k in range(len(case.student))])
    case = case._replace(student=[step[:num_rows] for step in case.student], position=position, counted=counted)
    expected = evaluate(case, distillation_loss_reference)
    assert_same(evaluate(case, distillation_loss, max_logits=4 * VOCAB_SIZE), expected)


@pytest.mark.parametrize("function", LOSSES)
@pytest.mark.parametrize("name", KINDS)
def test_nothing_counted_is_nothing(name: str, function: Any) -> None:
    case = make_case(**KINDS[name])
    result = evaluate(case._replace(counted=torch.zeros_like(case.counted)), function)
    assert not any(value.any() or value.isnan().any() for value in result.output[:6])
    head = result.gradients.head
    for grad in [*result.gradients.student, *([] if head is None else [head])]:
        assert not grad.any() and not grad.isnan().any()


@pytest.mark.parametrize("function", LOSSES)
@pytest.mark.parametrize("name", JUDGING)
def test_the_bases_own_loss_is_torch_cross_entropy(name: str, function: Any) -> None:
    """Also where no row of the student counts."""
    case = make_case(**KINDS[name])
    next_ids = case.options["next_ids"]
    wanted = next_ids != NOT_IN_VOCABULARY
    logits = case.teacher[case.position[wanted]] @ case.teacher_head.T
    expected = torch.stack((F.cross_entropy(logits, next_ids[wanted], reduction="sum"), wanted.sum()))
    for counted in (case.counted, torch.zeros_like(case.counted)):
        assert_near(evaluate(case._replace(counted=counted), function).output.language_model, expected)


@pytest.mark.parametrize("name", JUDGING)
def test_the_bases_own_loss_changes_nothing_else(name: str) -> None:
    """Bit for bit where the positions are those of the student's rows: what is multiplied has the same shape."""
    case = make_case(**KINDS[name])
    at = case.position + 1 + torch.arange(len(case.student))[:, None]
    next_ids = case.options["next_ids"].masked_fill(~torch.isin(case.position, at[case.counted]), NOT_IN_VOCABULARY)
    assert (next_ids != NOT_IN_VOCABULARY).sum() > 10
    without = case._replace(options={key: value for key, value in case.options.items() if key != "next_ids"})
    ours = evaluate(case._replace(options=case.options | {"next_ids": next_ids}), distillation_loss)
    theirs = evaluate(without, distillation_loss)
    assert ours.output.language_model is not None and theirs.output.language_model is None
    assert all(map(torch.equal, ours.output[:6], theirs.output[:6]))
    assert all(map(torch.equal, ours.gradients.student, theirs.gradients.student))
    assert case.is_shared or torch.equal(ours.gradients.head, theirs.gradients.head)


def test_only_counted_rows_and_needed_positions_are_read() -> None:
    case = make_case(own_head=True)
    expected = evaluate(case, distillation_loss)
    at = case.position + 1 + torch.arange(len(case.student))[:, None]
    teacher = torch.full_like(case.teacher, float("nan"))
    needed = at[case.counted]
    teacher[needed] = case.teacher[needed]
    assert teacher.isnan().any()
    student = [
        step.masked_fill(~counted[:, None], float("nan"))
        for step, counted in zip(case.student, case.counted, strict=True)
    ]
    assert_same(evaluate(case._replace(teacher=teacher, student=student), distillation_loss), expected)


@pytest.mark.parametrize("max_positions", [1, 4, 100])
def test_schedule(max_positions: int) -> None:
    """Each counted row is judged once, at its own position; a position that nobody needs is in no chunk."""
    position = torch.tensor([7, 2, 3, 11])
    counted = torch.tensor([[True, True, True, False], [False, True, False, True]])
    chunks = schedule(position, counted, num_positions=14, max_positions=max_positions)
    assert torch.cat([chunk.positions for chunk in chunks]).tolist() == [3, 4, 8, 13]
    assert all(1 <= chunk.positions.shape[0] <= max_positions for chunk in chunks)
    judged = [
        (step.step, row, chunk.positions[slot].item())
        for chunk in chunks
        for step in chunk.steps
        for row, slot in zip(step.rows.tolist(), step.slots.tolist(), strict=True)
    ]
    assert sorted(judged) == [(0, 0, 8), (0, 1, 3), (0, 2, 4), (1, 1, 4), (1, 3, 13)]


def test_a_schedule_with_further_positions() -> None:
    further = torch.zeros(14, dtype=torch.bool)
    further[[0, 4]] = True
    for is_counted, positions, slots in ((True, [0, 3, 4], [[1, 2]]), (False, [0, 4], [])):
        counted = torch.full((1, 2), is_counted)
        (chunk,) = schedule(torch.tensor([2, 3]), counted, num_positions=14, max_positions=9, further=further)
        assert chunk.positions.tolist() == positions
        assert [step.slots.tolist() for step in chunk.steps] == slots


@pytest.mark.parametrize("function", LOSSES)
def test_a_case_worked_by_hand(function: Any) -> None:
    """Heads are identities, so that hidden states are logits. Vocabulary 0..3, draft vocabulary {1, 3}, two steps."""
    teacher = [[9, 9, 9, 9], [0, 2, 0, 1], [0, 1, 0, 3], [5, 0, 0, 1]]
    # Entries 1 and 3 are the draft's logits. Row 0 is right at positions 1 and 2. Row 1 is right at 2, and at 3 no
    # draft can be: the base says 0. Row 2 stands outside of the mask.
    student = [[[0, 4, 0, 1], [0, 1, 0, 2], [0, 8, 0, 0]], [[0, 0, 0, 3], [0, 2, 0, 0], [0, 7, 0, 7]]]
    eye = torch.eye(4, dtype=torch.float64)
    output = function(
        [torch.tensor(step, dtype=torch.float64) for step in student],
        torch.tensor(teacher, dtype=torch.float64),
        position=torch.tensor([0, 1, 2]),
        counted=torch.tensor([[True, True, False], [True, True, False]]),
        vocabulary=Vocabulary(
            teacher_head=eye, vocab_size=4, student_head=eye[[1, 3]], draft_to_target=torch.tensor([1, 3])
        ),
        decay=0.5,
    )

    def two_classes(teacher_margin: float, student_margin: float) -> float:
        p = 1 / (1 + math.exp(-teacher_margin))
        log_q, log_not_q = -math.log1p(math.exp(-student_margin)), -math.log1p(math.exp(student_margin))
        return -p * log_q - (1 - p) * log_not_q

    steps = [two_classes(1, 3) + two_classes(-2, -1), two_classes(-2, -3)]
    assert output.loss_by_step.tolist() == pytest.approx(steps, rel=BOUND)
    assert float(output.loss) == pytest.approx(steps[0] + 0.5 * steps[1], rel=BOUND)
    assert output.rows_by_step.tolist() == [2, 1]
    assert output.judged_by_step.tolist() == [2, 2]
    assert output.correct_by_step.tolist() == [2, 1]
    assert int(output.accepted) == 2 + 1


@pytest.mark.parametrize("function", LOSSES)
def test_a_run_of_accepted_tokens_ends_where_the_mask_does(function: Any) -> None:
    case = make_case(own_head=True)
    at = case.position + 1 + torch.arange(3)[:, None]
    perfect = [case.teacher[step.clamp(max=NUM_POSITIONS - 1)] for step in at]
    counted = torch.zeros_like(case.counted)
    inside = (at[2] < NUM_POSITIONS).nonzero().flatten()[:4].tolist()
    for row, steps in zip(inside, ([0, 1, 2], [0, 2], [1, 2], [0, 1]), strict=True):
        counted[steps, row] = True
    case = case._replace(student=perfect, student_head=case.teacher_head, counted=counted)
    output = evaluate(case, function).output
    assert torch.equal(output.correct_by_step, output.judged_by_step)
    assert int(output.accepted) == 3 + 1 + 0 + 2


@pytest.mark.parametrize("labels", [False, True])
def test_the_reference_is_torch_cross_entropy(labels: bool) -> None:
    case = make_case(own_head=True, labels=labels)
    expected = torch.zeros((), dtype=torch.float64)
    for k, hidden in enumerate(case.student):
        rows = case.counted[k].nonzero().flatten()
        p = (case.teacher[case.position[rows] + 1 + k] @ case.teacher_head.T).softmax(-1)
        target = case.options["labels"][k, rows] if labels else p
        expected += DECAY**k * F.cross_entropy(hidden[rows] @ case.student_head.T, target, reduction="sum")
    assert_near(evaluate(case, distillation_loss_reference).output.loss, expected)


@pytest.mark.parametrize("vocab_size", [102, 128])
def test_ties_go_to_the_lowest_id(vocab_size: int) -> None:
    """Every logit stands there twice, often only the first of the two in the draft vocabulary.

    The search for the maximum goes by blocks of 64: one and a rest, and two.
    """
    case = make_case(reduced=True, ties=True, vocab_size=vocab_size)
    ours, theirs = (evaluate(case, function) for function in LOSSES)
    assert_same(ours, theirs)
    assert torch.equal(ours.output.correct_by_step, ours.output.rows_by_step), "the student's head is the teacher's"
    assert ours.output.rows_by_step.sum() < ours.output.judged_by_step.sum()


def test_large_logits() -> None:
    """Logits in the thousands; for most rows the teacher's largest is outside of the draft vocabulary and far above."""
    case = make_case(reduced=True, keep=True)
    outside = torch.ones(VOCAB_SIZE, dtype=torch.bool)
    outside[case.draft_to_target] = False
    teacher_head = case.teacher_head.clone()
    teacher_head[outside] *= 1000
    case = case._replace(teacher_head=teacher_head, student=[1000 * hidden for hidden in case.student])
    ours, theirs = (evaluate(case, function) for function in LOSSES)
    assert theirs.output.loss > 1000 and not any(grad.isnan().any() for grad in theirs.gradients.student)
    assert_same(ours, theirs)


def test_gradcheck() -> None:
    case = make_case(reduced=True, vocab_size=9, draft_size=5)
    student = [hidden[:6].clone().requires_grad_() for hidden in case.student[:2]]
    head = case.student_head.clone().requires_grad_()

    def loss(head: Tensor, *student: Tensor) -> Tensor:
        return distillation_loss(
            student,
            case.teacher,
            position=case.position[:6],
            counted=case.counted[:2, :6],
            vocabulary=Vocabulary(
                teacher_head=case.teacher_head, vocab_size=9, student_head=head, draft_to_target=case.draft_to_target
            ),
            decay=DECAY,
            max_logits=27,
        ).loss

    assert torch.autograd.gradcheck(loss, (head, *student))


def test_what_is_frozen_gets_no_gradient() -> None:
    case = make_case(own_head=True)
    head = case.student_head.clone()
    vocabulary = Vocabulary(teacher_head=case.teacher_head, vocab_size=VOCAB_SIZE, student_head=head)
    student = [hidden.clone() for hidden in case.student]
    student[1].requires_grad_()
    with Recorder() as recorder:
        distillation_loss(student, vocabulary=vocabulary, **inputs(case)).loss.backward()
    assert "aten.addmm_" not in recorder.names, "no gradient of the head was computed"
    assert student[0].grad is None and student[2].grad is None and head.grad is None
    expected = evaluate(case, distillation_loss).gradients.student[1]
    assert_near(student[1].grad * UPSTREAM, expected)


@pytest.mark.parametrize("name", ["own head", "labels"])
def test_without_gradients_the_sums_are_the_same(name: str) -> None:
    case = make_case(**KINDS[name])
    head = case.student_head.clone().requires_grad_()
    vocabulary = Vocabulary(teacher_head=case.teacher_head, vocab_size=VOCAB_SIZE, student_head=head)
    with torch.no_grad(), Recorder() as recorder:
        output = distillation_loss(case.student, vocabulary=vocabulary, **inputs(case))
    assert not output.loss.requires_grad
    assert not {"aten.addcmul", "aten.addmm_"} & recorder.names, "no gradient was computed"
    for ours, theirs in zip(output[:6], evaluate(case, distillation_loss).output[:6], strict=True):
        assert torch.equal(ours, theirs)


def test_backward_can_run_twice() -> None:
    case = make_case()
    student = [hidden.clone().requires_grad_() for hidden in case.student]
    vocabulary = Vocabulary(teacher_head=case.teacher_head, vocab_size=VOCAB_SIZE, student_head=case.teacher_head)
    loss = distillation_loss(student, vocabulary=vocabulary, **inputs(case)).loss
    first = torch.autograd.grad(3 * loss, student, retain_graph=True)
    second = torch.autograd.grad(loss, student)
    for ours, theirs in zip(first, second, strict=True):
        assert_near(ours, 3 * theirs)


# Not where rows are dropped for the teacher's argmax, which rounding may change.
@pytest.mark.parametrize("name", ["shared head", "own head", "reduced, kept", "labels, reduced", "base too, own head"])
def test_bfloat16_is_near_float64(name: str) -> None:
    """Logits are rounded to 8 bits once; the softmax and the sums are float32."""
    narrow = make_case(**KINDS[name], dtype=torch.bfloat16)
    wide = Case(*(_widened(value) for value in narrow))
    ours, theirs = evaluate(narrow, distillation_loss), evaluate(wide, distillation_loss_reference)
    assert ours.output.loss.dtype == torch.float32
    assert torch.equal(ours.output.judged_by_step, theirs.output.judged_by_step)
    assert torch.allclose(ours.output.loss_by_step.double(), theirs.output.loss_by_step, rtol=0.01)
    if theirs.output.language_model is not None:
        assert torch.allclose(ours.output.language_model, theirs.output.language_model, rtol=0.01)
    heads = [] if theirs.gradients.head is None else [(ours.gradients.head, theirs.gradients.head)]
    for grad, expected in [*zip(ours.gradients.student, theirs.gradients.student, strict=True), *heads]:
        assert grad.dtype == torch.bfloat16
        assert torch.linalg.vector_norm(grad.double() - expected) < 0.03 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("labels", [False, True])
def test_float32_keeps_its_digits(labels: bool) -> None:
    """Sums over a vocabulary of 65,536 do not pile up one by one: that lost three more digits."""
    narrow = make_case(own_head=True, labels=labels, vocab_size=2**16, dtype=torch.float32)
    wide = Case(*(_widened(value) for value in narrow))
    ours, theirs = evaluate(narrow, distillation_loss), evaluate(wide, distillation_loss_reference)
    assert_near(ours.output.loss_by_step.double(), theirs.output.loss_by_step, 1e-6)
    assert_near(ours.gradients.head.double(), theirs.gradients.head, 1e-6)


def test_a_weight_may_get_other_memory() -> None:
    """As megatron-core's optimizer gives it, after the vocabulary was made."""
    case = make_case(own_head=True)
    head = torch.nn.Parameter(torch.zeros_like(case.student_head))
    vocabulary = Vocabulary(teacher_head=case.teacher_head, vocab_size=VOCAB_SIZE, student_head=head)
    distillation_loss(case.student, vocabulary=vocabulary, **inputs(case))
    head.data = case.student_head
    output = distillation_loss(case.student, vocabulary=vocabulary, **inputs(case))
    assert torch.equal(output.loss.detach(), evaluate(case, distillation_loss).output.loss)


def _widened(value: Any) -> Any:
    if isinstance(value, list):
        return [_widened(item) for item in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


class Recorder(TorchDispatchMode):
    """Which operations ran, and the elements of memory behind the largest tensor that one of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(str(func.overloadpacket))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        return result


def test_nothing_of_tokens_times_vocabulary_exists() -> None:
    """16,384 tokens, seven steps, 151,936 entries; eight rows in a run of 512 count, to keep it to seconds."""
    vocab_size, num_rows, num_steps, hidden = 151_936, 16_384, 7, 8
    random = torch.Generator().manual_seed(0)
    head = torch.randn(vocab_size, hidden, generator=random)
    own_head = head.clone().requires_grad_()
    position = torch.arange(num_rows)
    counted = (position % 512 < 8).expand(num_steps, num_rows)
    student = [torch.randn(num_rows, hidden, generator=random).requires_grad_() for _ in range(num_steps)]
    with Recorder() as recorder:
        output = distillation_loss(
            student,
            torch.randn(num_rows, hidden, generator=random),
            position=position,
            counted=counted,
            vocabulary=Vocabulary(teacher_head=head, vocab_size=vocab_size, student_head=own_head),
            decay=DECAY,
        )
        output.loss.backward()
    assert output.judged_by_step.tolist() == [256] * num_steps
    assert vocab_size < recorder.largest <= HOST_MAX_LOGITS
    assert 256 * vocab_size > HOST_MAX_LOGITS, "less than the counted rows alone would take"


def test_peak_memory_is_blocks_and_gradients() -> None:
    """The same sizes, 1,024 rows of each step in the mask; what the process held at most, as the kernel counts it."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.unit.loss_memory"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    measured = loss_memory.Measured(**json.loads(process.stdout))
    assert measured.judged == [loss_memory.NUM_COUNTED] * loss_memory.NUM_STEPS
    assert measured.has_gradients
    float_size = 4
    gradients = (loss_memory.VOCAB_SIZE + loss_memory.NUM_STEPS * loss_memory.NUM_TOKENS) * loss_memory.HIDDEN
    # Teacher, student, and rows of the teacher's that stand in another order; the gradients as they are made in forward
    # and as backward hands them out; the maxima of 64 entries each, lists of rows, and what a matrix product packs.
    allowed = float_size * (3 * HOST_MAX_LOGITS + 2 * gradients) + 2**25
    assert HOST_MAX_LOGITS * float_size < measured.peak - measured.before < allowed
    one_step = loss_memory.NUM_COUNTED * loss_memory.VOCAB_SIZE * float_size
    assert allowed < one_step / 2, "the logits of one step's counted rows, teacher or draft, would not fit"
    assert allowed < 0.03 * loss_memory.NUM_TOKENS * loss_memory.VOCAB_SIZE * float_size


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab_size": 11}, ("teacher_head", "10 rows", "11")),
        ({"student_head": torch.zeros(3, 2), "draft_to_target": torch.arange(4)}, ("student_head", "3 rows", "4")),
        ({"draft_to_target": torch.tensor([0, 10])}, ("draft_to_target", "0 to 10", "10", "i + d2t[i]")),
        ({"draft_to_target": torch.tensor([3, 3])}, ("draft_to_target", "twice")),
        ({"teacher_rows": torch.zeros(4, 2)}, ("teacher_rows", "4 rows", "10")),
        (
            {"student_head": (torch.zeros(10, 2), torch.zeros(12, 2))},
            ("student_head", "[(10, 2), (12, 2)]", "one a step of one shape"),
        ),
    ],
)
def test_heads_that_do_not_fit_are_refused(options: dict[str, Any], words: tuple[str, ...]) -> None:
    head = torch.zeros(10, 2)
    with pytest.raises(ConfigError) as caught:
        Vocabulary(**{"teacher_head": head, "vocab_size": 10, "student_head": head, **options})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_logits": 0}, ("max_logits = 0",)),
        ({"keep_out_of_vocabulary": True}, ("keep_out_of_vocabulary", "labels")),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], words: tuple[str, ...]) -> None:
    case = make_case(reduced=True, labels=True)
    with pytest.raises(ConfigError) as caught:
        evaluate(case, distillation_loss, **options)
    assert all(word in str(caught.value) for word in words)

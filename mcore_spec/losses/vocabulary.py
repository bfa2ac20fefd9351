"""How the teacher's and the draft's vocabulary relate, and which part of each this rank holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mcore_spec.errors import ConfigError
from mcore_spec.parallel.tensor_parallel import TensorParallel

NOT_IN_VOCABULARY = -1


class VocabularySlice(NamedTuple):
    """Rows of a head on this rank, padding left out.

    Attributes:
        weight: [width, h], a view.
        first: vocabulary index of the first row.
    """

    weight: Tensor
    first: int

    @property
    def width(self) -> int:
        """Vocabulary entries on this rank; 0 where it holds only padding."""
        return self.weight.shape[0]


def head_slice(head: Tensor, vocab_size: int, tp: TensorParallel) -> VocabularySlice:
    """The rows of a rank's part of a head [padded vocabulary / size, h] that are vocabulary entries."""
    first = tp.rank * head.shape[0]
    return VocabularySlice(head[: max(0, vocab_size - first)], first)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The heads of both sides. The padding rows at the end of a head never reach a softmax.

    Attributes:
        teacher_head: this rank's rows of the base's head, [padded vocabulary / size, h]; frozen.
        vocab_size: base vocabulary without padding.
        student_head: this rank's rows of the head that the draft reads, [padded draft vocabulary / size, h]: the very
            tensor of the base, or a weight of its own. It gets a gradient if it requires one. Or a head for each
            step, of one shape: Medusa's.
        draft_to_target: base id of each entry of the draft vocabulary, int64 [draft vocabulary]; ``None``: the
            draft's vocabulary is the base's.
        teacher_rows: the base's head rows of this rank's slice of the draft vocabulary, [width of the slice, h].
            Needed where that slice is not among this rank's rows of the base: on several ranks, with a reduced
            vocabulary or with heads that are padded differently.
        tp: the tensor-parallel group; the caller has entered its parallel region.
        frozen_heads: which of the student's heads get no gradient: the base's, also where it is trained for another
            loss.
        head_of_state: which of several heads reads each of the student's states; empty: one for all, or one each.
    """

    teacher_head: Tensor
    vocab_size: int
    student_head: Tensor | tuple[Tensor, ...]
    draft_to_target: Tensor | None = None
    teacher_rows: Tensor | None = None
    tp: TensorParallel = field(default_factory=TensorParallel)
    frozen_heads: tuple[int, ...] = ()
    head_of_state: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse heads that do not hold their vocabulary.

        Raises:
            ConfigError: a head with too few rows, heads of several shapes, ids outside of the vocabulary, or
                `teacher_rows` that are missing or not those of this rank's slice.
        """
        shapes = {tuple(head.shape) for head in self.student_heads}
        if len(shapes) != 1:
            raise ConfigError(
                f"student_head holds heads of the shapes {sorted(shapes)}; give one head, or one a step of one shape"
            )
        for name, head, size in (
            ("teacher_head", self.teacher_head, self.vocab_size),
            ("student_head", self.student_heads[0], self.draft_size),
        ):
            if head.shape[0] * self.tp.size < size:
                raise ConfigError(
                    f"{name} has {head.shape[0]} rows on each of {self.tp.size} ranks, fewer than its vocabulary of "
                    f"{size}; hand in this rank's rows of a head padded to at least {size}"
                )
        if self.draft_to_target is not None:
            self._check_ids(self.draft_to_target)
        if self.teacher_rows is not None and self.teacher_rows.shape[0] != self.student.width:
            raise ConfigError(
                f"teacher_rows has {self.teacher_rows.shape[0]} rows, and this rank's slice of the draft vocabulary "
                f"{self.student.width}; hand in the base's rows of that slice (MegatronBase.head_rows)"
            )
        if self.teacher_rows is None and self.tp.size > 1 and not self._slices_agree:
            raise ConfigError(
                f"teacher_rows = None on {self.tp.size} ranks, where this rank's slice of the draft vocabulary is not "
                "its slice of the base's; hand in the base's rows of that slice (MegatronBase.head_rows)"
            )

    def _check_ids(self, ids: Tensor) -> None:
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ConfigError(
                f"draft_to_target holds ids from {int(ids.min())} to {int(ids.max())}, outside of the vocabulary of "
                f"{self.vocab_size}; it holds base ids (i + d2t[i]), not the differences d2t"
            )
        if ids.unique().shape != ids.shape:
            raise ConfigError("draft_to_target holds an id twice; give each entry of the draft vocabulary its own")

    @property
    def student_heads(self) -> tuple[Tensor, ...]:
        """One head that every step reads, or one a step."""
        return self.student_head if isinstance(self.student_head, tuple) else (self.student_head,)

    @property
    def draft_size(self) -> int:
        """Entries of the draft vocabulary."""
        return self.vocab_size if self.draft_to_target is None else self.draft_to_target.shape[0]

    @property
    def _slices_agree(self) -> bool:
        """Whether entry i of this rank's draft slice is entry i of its base slice."""
        same_rows = self.tp.size == 1 or self.teacher_head.shape[0] == self.student_heads[0].shape[0]
        return self.draft_to_target is None and same_rows

    @property
    def shares_logits(self) -> bool:
        """Whether the teacher's logits over the draft slice are its logits, as they are."""
        return self._slices_agree and self.teacher_rows is None

    # Not cached: an optimizer may move a weight's storage, and a view kept from before would stay behind.
    @property
    def teacher(self) -> VocabularySlice:
        """This rank's part of the base vocabulary."""
        return self._slice(self.teacher_head.detach(), self.vocab_size)

    @property
    def student(self) -> VocabularySlice:
        """This rank's part of the draft vocabulary; of several heads, the first one's rows."""
        return self.student_at(0)

    def head_of(self, step: int) -> int:
        """Which of `student_heads` reads the state of a step."""
        if self.head_of_state:
            return self.head_of_state[step]
        return step if len(self.student_heads) > 1 else 0

    def student_at(self, step: int) -> VocabularySlice:
        """This rank's part of the head that a step reads."""
        return self._slice(self.student_heads[self.head_of(step)].detach(), self.draft_size)

    def _slice(self, head: Tensor, size: int) -> VocabularySlice:
        return head_slice(head, size, self.tp)

    @cached_property
    def target_to_draft(self) -> Tensor | None:
        """Draft index of each base id, `NOT_IN_VOCABULARY` where it has none, int64 [vocab_size]; None: the same."""
        if self.draft_to_target is None:
            return None
        ids = self.draft_to_target
        table = torch.full((self.vocab_size,), NOT_IN_VOCABULARY, dtype=torch.int64, device=ids.device)
        return table.index_copy_(0, ids, torch.arange(ids.shape[0], device=ids.device))

    def to_draft(self, target_ids: Tensor) -> Tensor:
        """Base ids -> indices into the draft vocabulary, `NOT_IN_VOCABULARY` where there is none."""
        return target_ids if self.target_to_draft is None else self.target_to_draft[target_ids]

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """Indices into the draft vocabulary -> base ids."""
        return draft_ids if self.draft_to_target is None else self.draft_to_target[draft_ids]

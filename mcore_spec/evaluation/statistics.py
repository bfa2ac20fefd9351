"""How many proposed tokens were accepted.

The acceptance length is what engines report: tokens for each verification pass of the base, that is the accepted
proposals and the base's own token, over all passes of all prompts. The pass over the prompt is none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mcore_spec.evaluation.decoding import Answer


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Counts that can be added up.

    Attributes:
        kept: verification passes that accepted at least j proposals, for j = 0 .. steps; the first is their number.
        num_tokens: that were answered, ends included and what lies behind them left out.
        num_answers: that were given.
    """

    kept: tuple[int, ...]
    num_tokens: int
    num_answers: int

    @classmethod
    def of(cls, answers: Iterable[Answer], *, num_steps: int) -> Acceptance:
        """Count.

        Args:
            answers: of any requests.
            num_steps: the most proposals that a pass can accept.
        """
        counted = list(answers)
        passes = [number for answer in counted for number in answer.accepted]
        return cls(
            kept=tuple(sum(number >= j for number in passes) for j in range(num_steps + 1)),
            num_tokens=sum(len(answer.token_ids) for answer in counted),
            num_answers=len(counted),
        )

    @classmethod
    def total(cls, parts: Sequence[Acceptance]) -> Acceptance:
        """The sum of at least one."""
        return cls(
            kept=tuple(map(sum, zip(*(part.kept for part in parts), strict=True))),
            num_tokens=sum(part.num_tokens for part in parts),
            num_answers=sum(part.num_answers for part in parts),
        )

    @property
    def num_forwards(self) -> int:
        """Verification passes, each sequence of a batch counted by itself."""
        return self.kept[0]

    @property
    def acceptance_length(self) -> float | None:
        """Tokens for each verification pass; ``None`` where every answer ended with its first token."""
        return sum(self.kept) / self.kept[0] if self.kept[0] else None

    @property
    def acceptance_by_position(self) -> list[float | None]:
        """Share of accepted proposals at each step among those whose predecessors were; ``None``: there were none."""
        return [later / earlier if earlier else None for earlier, later in pairwise(self.kept)]

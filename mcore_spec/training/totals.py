"""What was counted while training: sums that add over micro-batches, steps and ranks, and their means."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_spec.losses.outcome import LossOutput


@dataclass
class Totals:
    """Sums over rows.

    Attributes:
        sums: float64 [4 K + 3]: for each TTT step loss, rows in the loss, judged rows and correct rows; then the
            decayed loss, the accepted tokens, and the tokens that went in. Behind that, where the loss measures the
            draft's states, their distance for each such step; and where the base is trained too, its own loss and the
            tokens of that [2]. One vector, so that one collective adds it.
        num_steps: TTT steps, K.
        num_regressed: steps whose states the loss measures.
        trains_base: whether the base is trained too.
    """

    sums: Tensor
    num_steps: int
    num_regressed: int = 0
    trains_base: bool = False

    @classmethod
    def zeros(
        cls, num_steps: int, *, device: torch.device, num_regressed: int = 0, trains_base: bool = False
    ) -> Totals:
        """Nothing counted yet."""
        num_sums = 4 * num_steps + 3 + num_regressed + (2 if trains_base else 0)
        sums = torch.zeros(num_sums, dtype=torch.float64, device=device)
        return cls(sums, num_steps, num_regressed, trains_base)

    def add(self, output: LossOutput, *, num_tokens: int) -> None:
        """Count one micro-batch of `num_tokens` tokens."""
        parts = [output.loss_by_step, output.rows_by_step, output.judged_by_step, output.correct_by_step]
        scalars = torch.stack((output.loss.detach().double(), output.accepted.double()))
        parts += [scalars, scalars.new_tensor([num_tokens])]
        if output.regression_by_step is not None:
            parts.append(output.regression_by_step)
        if output.language_model is not None:
            parts.append(output.language_model)
        self.sums += torch.cat([part.double() for part in parts])

    def add_totals(self, other: Totals) -> None:
        """Count what `other` counted."""
        self.sums += other.sums

    def reduce(self, *, data_group: dist.ProcessGroup, pipeline_group: dist.ProcessGroup) -> None:
        """Add over the ranks that saw other rows, then tell the other pipeline stages.

        Args:
            data_group: data- and context-parallel ranks.
            pipeline_group: stages, of which the last has counted.
        """
        dist.all_reduce(self.sums, group=data_group)
        if pipeline_group.size() > 1:
            last = dist.get_global_rank(pipeline_group, pipeline_group.size() - 1)
            dist.broadcast(self.sums, src=last, group=pipeline_group)

    @property
    def num_rows(self) -> int:
        """Rows that count at step 0: what loss and gradient are divided by."""
        return int(self.sums[2 * self.num_steps])

    @property
    def num_tokens(self) -> int:
        """Tokens that went in, padding left out."""
        return int(self.sums[4 * self.num_steps + 2])

    def means(self) -> Means:
        """The figures that a user reads."""
        steps = self.num_steps
        loss_sums, rows, judged, correct = self.sums[: 4 * steps].view(4, steps)
        loss, accepted, _ = self.sums[4 * steps : 4 * steps + 3].tolist()
        # Every counted row has a distance, none is dropped for its token.
        rest = self.sums[4 * steps + 3 :]
        measured = self.num_regressed
        distances = rest[:measured] / judged[:measured].clamp(min=1) if measured else None
        language_model = rest[-2:].tolist() if self.trains_base else None
        return Means(
            loss=loss / max(float(judged[0]), 1.0),
            loss_by_step=(loss_sums / rows.clamp(min=1)).tolist(),
            accuracy=(correct / judged.clamp(min=1)).tolist(),
            simulated_acceptance_length=1.0 + accepted / max(float(judged[0]), 1.0),
            regression_by_step=None if distances is None else distances.tolist(),
            lm_loss=None if language_model is None else language_model[0] / max(language_model[1], 1.0),
        )


@dataclass(frozen=True)
class Means:
    """Averages over rows.

    Attributes:
        loss: sum over steps of decay^k times the loss of its rows, a counted row of step 0; where the base is trained
            too, and its own.
        loss_by_step: mean loss of each TTT step's rows, in nats.
        accuracy: fraction of each step's rows on which the draft's best token is the base's.
        simulated_acceptance_length: 1 + accepted tokens of a row, were the data what the base would say.
        regression_by_step: mean distance of the draft's states from the base's; ``None`` where the loss has none.
        lm_loss: mean loss of the base on the tokens that it has to produce; ``None`` where it is frozen.
    """

    loss: float
    loss_by_step: list[float]
    accuracy: list[float]
    simulated_acceptance_length: float
    regression_by_step: list[float] | None = None
    lm_loss: float | None = None

    def figures(self, *, with_accuracy: bool = True) -> dict[str, Any]:
        """By name, for the log; without what this draft has not."""
        unwanted = () if with_accuracy else ("accuracy", "simulated_acceptance_length")
        return {name: value for name, value in asdict(self).items() if value is not None and name not in unwanted}

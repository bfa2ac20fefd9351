"""A least-squares start of a draft: which rows it learns from, whether it is made, one solution for all ranks.

The regressions themselves are in `mcore_spec.drafts.linear_start`. Both hosts call this: a `GPTModel`'s trainer, and
what trains on transformers models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_spec.bases.base import Base
from mcore_spec.bases.features import Features, features_for
from mcore_spec.config import BaseArchitecture
from mcore_spec.data.batch import Batch
from mcore_spec.drafts.draft import Draft
from mcore_spec.drafts.linear_start import (
    MAX_DEFAULT_BYTES,
    MLP_RIDGE,
    ROWS_PER_INPUT,
    LinearMap,
    Moments,
    relative_rates,
    solve_map,
    sums_bytes,
)
from mcore_spec.drafts.stepwise import StepwiseDraft
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.objectives.objective import Task
from mcore_spec.objectives.rows import teacher_rows
from mcore_spec.parallel.collectives import Group, gather_without_grad, group_size
from mcore_spec.parallel.documents import Documents
from mcore_spec.parallel.tensor_parallel import SEQUENCE_DIM, TensorParallel

# The size of the logits is looked for in steps of this, so many at most, on so many batches of all ranks.
SHRINKING, MAX_SHRINKINGS, NUM_JUDGED = 2**-0.25, 9, 4


class Sample(NamedTuple):
    """A batch, and the base's features of this rank's rows."""

    batch: Batch
    documents: Documents
    features: Features

    def to(self, device: torch.device) -> Sample:
        """The same on another device."""
        return Sample(self.batch.to(device), self.documents, self.features.to(device))


def check_linear_start(task: Task, *, num_batches: int | None) -> None:
    """Refuse a start from data for a draft that has none, before there is a draft.

    Args:
        task: of the draft.
        num_batches: global batches to learn from, 0: none; ``None``: as the draft allows.

    Raises:
        UnsupportedError: the draft has no such start.
    """
    if num_batches and not task.starts_linearly:
        raise UnsupportedError(
            f"fit_start = {num_batches}: this draft has no such start (with norm_before_residual or "
            "eagle_reuse_base_decoder there is none); leave it at 0"
        )


def num_default_rows(task: Task, base: BaseArchitecture) -> int:
    """Rows that a start learns from if nobody says how many batches; 0: none is made.

    Args:
        task: of the draft, not trained yet.
        base: the base model.
    """
    num_inputs = (max(len(task.aux_layer_ids), 1) + 1) * base.hidden_size
    is_small = sums_bytes(num_inputs=num_inputs, num_outputs=base.hidden_size) <= MAX_DEFAULT_BYTES
    return ROWS_PER_INPUT * num_inputs if task.starts_linearly and is_small else 0


class _Rows(NamedTuple):
    """This rank's rows that count at step 0, int64 [n], and the base's next last hidden states, [n, h]."""

    rows: Tensor
    wanted: Tensor


class StartSolver:
    """Takes batches with the base's features, then sets the draft's first weights; each rank of a last stage has one.

    First the base's next hidden state is regressed on what the draft reads, then what that leaves on the inner
    activations of the first layer's MLP, as they are behind the first. At last the size of the logits is fitted to the
    loss: a prediction that is normed is as long where little is known as where much is.
    """

    def __init__(
        self,
        task: Task,
        base: Base,
        draft: Draft,
        *,
        data_group: Group,
        copies: Sequence[Group],
        data_rank: int,
        data_size: int,
    ) -> None:
        """Nothing yet.

        Args:
            task: of the draft.
            base: of the draft.
            draft: whose weights are replaced.
            data_group: ranks with other rows.
            copies: groups that take the solution of their first rank, in this order, so that it is the same bit for
                bit.
            data_rank: batch i of all is the one that rank i modulo `data_size` adds as its i // `data_size`-th.
            data_size: ranks that share the batches.

        Raises:
            UnsupportedError: the draft has no such start.
        """
        if not isinstance(draft, StepwiseDraft):
            raise UnsupportedError(f"fit_start is not built for {draft.label}; leave it at 0")
        self.task, self.base, self.draft = task, base, draft
        self.data_group, self.copies = data_group, copies
        # The same batches are judged in every layout.
        self.num_judged = -(-max(NUM_JUDGED - data_rank, 0) // data_size)
        self.hidden_size = base.architecture.hidden_size
        self.num_features = max(len(task.aux_layer_ids), 1) * self.hidden_size
        self.device = base.final_norm_weight().device
        self.moments = Moments(self.num_features + self.hidden_size, self.hidden_size, device=self.device)
        self.kept: list[Sample] = []

    @torch.no_grad()
    def add(self, sample: Sample) -> int:
        """Count a batch; returns the rows of it that count at step 0 on this rank.

        Args:
            sample: every rank of a model's last stage has its share of the rows. Its features stay in the host's memory
                for the second regression.
        """
        rows, wanted = self._counted(sample)
        inputs = self.draft.linear_inputs(features_for(self.draft, sample.features), self._embedding(sample))
        self.moments.add(_whole_rows(inputs, self.base.tp)[rows, 0], wanted)
        self.kept.append(sample.to(torch.device("cpu")))
        return rows.shape[0]

    def solve(self, *, seed: int) -> dict[str, float]:
        """Set the weights; every rank must call that holds a part of them.

        Args:
            seed: of what is drawn.

        Returns:
            What the learning rate is to be multiplied by for each matrix of the draft, see `relative_rates`.

        Raises:
            ConfigError: no row counts.
        """
        self.solve_map(seed=seed)
        self.solve_mlp()
        self.fit_size()
        return relative_rates(self.draft, self.draft.tp)

    @torch.no_grad()
    def solve_map(self, *, seed: int) -> None:
        """The first regression. `seed` and errors as of `solve`."""
        self._add_up(self.moments.sums)
        if float(self.moments.num_rows) == 0:
            raise ConfigError("fit_start: no row of the first batches counts; give more of them, or data with answers")
        parts = self._agree(solve_map(self.moments, num_features=self.num_features))
        self.draft.linear_start(LinearMap(*parts), self.base.final_norm_weight(), seed=seed)

    @torch.no_grad()
    def solve_mlp(self) -> None:
        """The last matrix of the first layer's MLP, from the states that there are now."""
        draft, tp = self.draft, self.base.tp
        last = draft.fitted_mlp.down_proj
        moments = Moments(last.in_features, self.hidden_size, device=self.device)
        for kept in self.kept:
            sample = kept.to(self.device)
            seen = draft.mlp_rows(features_for(draft, sample.features), self._embedding(sample), sample.documents)
            rows, wanted = self._counted(sample)
            missing = draft.before_last_norm(wanted) - _whole_rows(seen.before, tp)[rows, 0]
            moments.add(gather_without_grad(seen.inner[rows, 0], -1, tp.group), missing)
        self._add_up(moments.sums)
        (solution,) = self._agree([moments.solve(ridge=MLP_RIDGE)])
        last.load_whole(solution.t())

    @torch.no_grad()
    def fit_size(self) -> None:
        """Shrink the last norm's weight for as long as the loss of some of the batches falls."""
        norm = self.draft.last_norm
        if norm is None or self.draft.hands_on_size:
            return
        objective = self.task.make_objective(self.base, self.draft, recompute=False)
        whole, size, lowest = norm.weight.clone(), 1.0, float("inf")
        for number in range(MAX_SHRINKINGS):
            norm.weight.copy_(whole * SHRINKING**number)
            losses = [objective(*sample.to(self.device)).loss.double() for sample in self.kept[: self.num_judged]]
            own = sum(losses, torch.zeros((), dtype=torch.float64, device=self.device))
            (loss,) = self._agree(self._add_up([own]))
            if float(loss) >= lowest:
                break
            size, lowest = SHRINKING**number, float(loss)
        norm.weight.copy_(whole * size)

    def _embedding(self, sample: Sample) -> Tensor:
        """What the rows read at step 0, [s or s/size, 1, h]."""
        return self.base.embed(sample.documents.take(sample.batch.step_token_ids, 1)[:1])

    def _counted(self, sample: Sample) -> _Rows:
        documents = sample.documents
        rows = documents.take(sample.batch.counted, 1)[0].nonzero()[:, 0]
        following = documents.row_index.to(rows.device)[rows] + 1
        return _Rows(rows, teacher_rows(sample.features, documents, self.base.tp)[following])

    def _add_up(self, sums: Sequence[Tensor]) -> Sequence[Tensor]:
        """Over the ranks with other rows, in place."""
        for each in sums if group_size(self.data_group) > 1 else ():
            dist.all_reduce(each, group=self.data_group)
        return sums

    def _agree(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The same bit for bit on every rank."""
        agreed = [part.contiguous() for part in parts]
        for group in self.copies:
            for part in agreed if group_size(group) > 1 else ():
                dist.broadcast(part, group=group, group_src=0)
        return agreed


def _whole_rows(tensor: Tensor, tp: TensorParallel) -> Tensor:
    """[s or s/size, ...] -> [s, ...]."""
    return gather_without_grad(tensor, SEQUENCE_DIM, tp.group) if tp.sequence_parallel else tensor

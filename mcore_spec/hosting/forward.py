"""The forward of a transformers model with a draft: with labels the draft's loss, without them the model's own.

The draft's loss is a sum over rows divided by a number of rows: Trainer's ``num_items_in_batch``, which covers all
micro-batches and ranks of a step, or this batch's own counted rows. So one token has one weight, whatever the
accumulation, the padding and the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, Signature, signature
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.utils import ModelOutput

from mcore_spec.bases.transformers import TransformersBase
from mcore_spec.drafts.draft import Draft
from mcore_spec.errors import ConfigError
from mcore_spec.hosting.base_run import AUX_STATES, LAST_STATES, BaseRun, run_base
from mcore_spec.hosting.context import context_group
from mcore_spec.hosting.rows import TokenBatch, TokenRows
from mcore_spec.losses.outcome import LossOutput
from mcore_spec.objectives.language_model import outcome_of
from mcore_spec.objectives.objective import Task
from mcore_spec.parallel.collectives import Group, group_size

# What Trainer counts, and what it counts in: see `DraftedForward`.
_COUNTS = ("num_items_in_batch", "shift_labels")
# What a call may have beside the arguments of the model's own forward.
_FURTHER = (*_COUNTS, LAST_STATES, AUX_STATES)


@dataclass
class DraftedOutput(ModelOutput):
    """What the forward with labels returns.

    Attributes:
        loss: the draft's, a scalar that carries the gradient; of a base that is trained too also its own: sums over
            rows and over labels, by one divisor.
        accuracy: share of the counted rows whose draft token is the base's, by step or head, [K].
        acceptance_length: simulated: 1 + the mean number of draft tokens accepted in a row, a scalar.
        lm_loss: the base's own mean loss on the labels, all but those of first tokens, which nothing predicts.
        logits: the base's, [b, s, vocabulary], 0 in padding; ``None`` while the model is in training mode.
    """

    loss: Tensor | None = None
    accuracy: Tensor | None = None
    acceptance_length: Tensor | None = None
    lm_loss: Tensor | None = None
    logits: Tensor | None = None


class _Judged(NamedTuple):
    """Over all context-parallel ranks.

    Attributes:
        rows: counted ones by step, [K].
        correct: those of them that are right, [K].
        accepted: tokens in a row, a scalar.
        lm_loss: the base's own mean loss, a scalar; 0 without a label.
    """

    rows: Tensor
    correct: Tensor
    accepted: Tensor
    lm_loss: Tensor


class DraftedForward:
    """Stands in the place of the model's ``forward``; copies and is pickled with the model."""

    def __init__(self, base: TransformersBase, make_task: Callable[[], Task]) -> None:
        """Take the place.

        Args:
            base: with its draft attached.
            make_task: what training takes; raises where training of this draft is not built.
        """
        self.base, self.make_task = base, make_task
        self.original: Callable[..., Any] = base.model.forward

    @property
    def __signature__(self) -> Signature:
        """The original's, and what Trainer hands over besides: it looks here for columns to keep."""
        parameters = list(signature(self.original).parameters.values())
        rest = [parameter for parameter in parameters if parameter.kind is Parameter.VAR_KEYWORD]
        own = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in _FURTHER]
        return Signature([*parameters[: len(parameters) - len(rest)], *own, *rest])

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The original's arguments.

        With `labels`, in training and in evaluation, the draft's loss on them, and the base's own where it is trained
        too. `num_items_in_batch` is what the sum over rows is divided by, on every rank; `shift_labels`, which a
        collator may add, is there for Trainer to count in. With `last_hidden_states` [b, s, h], behind the final norm,
        and for drafts that read aux layers `aux_hidden_states` [b, s, n h], joined in layer order, the layers of the
        base do not run, which has to be frozen.

        Returns:
            A `DraftedOutput` with labels (a tuple of what is set where ``return_dict=False``), and what the original
            returns without.

        Raises:
            ConfigError: a training step without labels, or a batch that is not understood.
            UnsupportedError: a draft whose training is not built.
        """
        call = _flat(self.__signature__, args, options)
        if call.get("labels") is None:
            if self.base.model.training and torch.is_grad_enabled():
                raise ConfigError(
                    "labels are missing in a training step: a draft learns from them; give the tokens, with -100 where "
                    "nothing is learned (Trainer's label_smoothing_factor takes them away: leave it at 0)"
                )
            for name in _FURTHER:
                call.pop(name, None)
            return self.original(**call)
        output = self._run(call)
        return output if call.get("return_dict") is not False else output.to_tuple()

    def _run(self, call: dict[str, Any]) -> DraftedOutput:
        divisor = _number(call.pop("num_items_in_batch", None))
        group = context_group()
        task, draft = self.make_task(), self.base.draft()
        assert draft is not None, "the forward is installed with the draft"
        run = run_base(self.base, task, call, group=group)
        with torch.autocast(run.features.last.device.type, enabled=False):
            outcome = self._outcome(task, draft, run)
        judged = _judge(outcome, group)
        counted = judged.rows.clamp(min=1)
        # A rank's loss is its share times the ranks: gradients, and Trainer's report, are means over them.
        loss = outcome.loss * group_size(group) / counted[0] if divisor is None else outcome.loss / divisor
        output = DraftedOutput(
            loss=loss,
            accuracy=judged.correct / counted,
            acceptance_length=1 + judged.accepted / counted[0],
            lm_loss=judged.lm_loss,
        )
        if not self.base.model.training and group_size(group) == 1:
            output.logits = self._logits(run.features.last[:, 0], run.rows, run.tokens)
        return output

    def _outcome(self, task: Task, draft: Draft, run: BaseRun) -> LossOutput:
        """The draft's loss and the base's own, which is part of it where the base is trained too."""
        recompute = self.base.model.is_activation_checkpointing and torch.is_grad_enabled()
        # What is made from the base's weights is made here, from those of now.
        objective = task.make_objective(self.base, draft, recompute=recompute, judges_base=not task.trains_base)
        return outcome_of(task, objective, self.base, run.packed, run.documents, run.features)

    @torch.no_grad()
    def _logits(self, last: Tensor, rows: TokenRows, batch: TokenBatch) -> Tensor:
        """[tokens, h] -> [b, s, vocabulary], as the model's own forward gives them."""
        logits = self.base.logits(last)
        flat = logits.new_zeros(batch.input_ids.numel(), logits.shape[-1])
        flat[torch.from_numpy(rows.places).to(logits.device)] = logits
        return flat.unflatten(0, batch.input_ids.shape)


def _flat(of: Signature, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Every argument by name."""
    call: dict[str, Any] = dict(of.bind(*args, **options).arguments)
    for name, parameter in of.parameters.items():
        if parameter.kind is Parameter.VAR_KEYWORD:
            call.update(call.pop(name, {}))
    return call


def _number(value: Tensor | float | None) -> float | Tensor | None:
    """Trainer counts nothing where no label is set."""
    if value is None:
        return None
    return value.clamp(min=1) if isinstance(value, Tensor) else max(value, 1)


def _judge(outcome: LossOutput, group: Group) -> _Judged:
    """Sums over the ranks that share the rows."""
    assert outcome.language_model is not None, "it was asked for"
    counts = torch.cat((outcome.judged_by_step, outcome.correct_by_step, outcome.accepted.reshape(1)))
    # One collective; float64 holds counts exactly.
    values = torch.cat((outcome.language_model, counts))
    if group_size(group) > 1:
        dist.all_reduce(values, group=group)
    num_steps = outcome.judged_by_step.shape[0]
    own, rows, correct, accepted = values.split((2, num_steps, num_steps, 1))
    lm_loss = (own[0] / own[1].clamp(min=1)).to(outcome.loss.dtype)
    return _Judged(rows.long(), correct.long(), accepted[0].long(), lm_loss)

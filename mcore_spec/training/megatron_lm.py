"""The training step for somebody's own Megatron-LM loop: what `pretrain()` takes as ``forward_step_func``.

    step = MegatronForwardStep(model)
    pretrain(..., forward_step_func=step)            # batches: mcore_spec.data.batch.make_batch

It follows megatron-core's contract for per-token losses: ``loss_func`` returns the sum of the loss, the number
of tokens it was summed over, and sums to report; `finalize_model_grads` divides the gradient once by the tokens
of all ranks and micro-batches. The model's configuration must have ``calculate_per_token_loss = True``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from mcore_spec.data.batch import Batch
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.losses.outcome import LossOutput
from mcore_spec.training.step import DraftStep

Report = dict[str, Tensor]
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Report]]


class MegatronForwardStep:
    """``forward_step_func(data_iterator, model)`` for megatron-core's schedules."""

    def __init__(self, model: GPTModel, *, recompute: bool = False) -> None:
        """Look at the conversion.

        Args:
            model: this rank's part, converted and not wrapped.
            recompute: compute the activations of each TTT step again in backward.

        Raises:
            ConfigError: the model's loss is not per token.
            UnsupportedError: pipeline parallelism: the schedules send gradients back through every stage, and a
                frozen base has none; `Trainer` streams forward only.
        """
        if not model.config.calculate_per_token_loss:
            raise ConfigError(
                "calculate_per_token_loss = False: gradients would depend on how samples are cut into micro-batches; "
                "set it in the model's configuration (--calculate-per-token-loss)"
            )
        if model.pg_collection.pp.size() > 1:
            raise UnsupportedError(
                f"pipeline_model_parallel_size = {model.pg_collection.pp.size()}: megatron-core's schedules run every "
                "stage backward, a frozen base runs forward only; use mcore_spec.training.trainer.Trainer"
            )
        self.step = DraftStep(model, recompute=recompute)

    def __call__(self, data_iterator: Iterator[Batch], model: nn.Module) -> tuple[Tensor, LossFunction]:
        """Forward of the next batch; `model` is the wrapped one that was given to the schedule."""
        output = self.step(next(data_iterator).to(next(model.parameters()).device))
        assert output is not None, "without pipeline parallelism every rank has the draft"
        return output.loss, partial(_loss_function, output)


def _loss_function(output: LossOutput, loss: Tensor) -> tuple[Tensor, Tensor, Report]:
    """Loss sum, its tokens, and pairs (sum, count) as Megatron-LM averages them for its log."""
    rows = output.judged_by_step[0]
    report = {"draft loss": torch.stack((loss.detach().double(), rows.double()))}
    for step, (correct, judged) in enumerate(zip(output.correct_by_step, output.judged_by_step, strict=True)):
        report[f"draft accuracy {step}"] = torch.stack((correct.double(), judged.double()))
    return loss, rows.to(torch.int), report

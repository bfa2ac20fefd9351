"""The training step for somebody's own Megatron-LM loop: what `pretrain()` takes as ``forward_step_func``.

    step = MegatronForwardStep(model)
    pretrain(..., forward_step_func=step)            # batches: mcore_spec.data.batch.make_batch

It follows megatron-core's contract for per-token losses: ``loss_func`` returns the sum of the loss, the number
of tokens it was summed over, and sums to report; `finalize_model_grads` divides the gradient once by the tokens
of all ranks and micro-batches. The model's configuration must have ``calculate_per_token_loss = True``.

Where the base is trained too (``eagle_freeze_base_model`` false) the stages of a pipeline run backward as well, with
``variable_seq_lengths = True``; call ``step.step.follow_base()`` behind every optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from mcore_spec.data.batch import Batch
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.training.pipeline import LossFunction, stage_result
from mcore_spec.training.step import DraftStep


class MegatronForwardStep:
    """``forward_step_func(data_iterator, model)`` for megatron-core's schedules."""

    def __init__(self, model: GPTModel, *, recompute: bool = False) -> None:
        """Look at the conversion.

        Args:
            model: this rank's part, converted and not wrapped.
            recompute: compute the activations of each TTT step again in backward.

        Raises:
            ConfigError: the model's loss is not per token, or the stages of a pipeline cannot send what they have to.
            UnsupportedError: pipeline parallelism with a frozen base: the schedules send gradients back through every
                stage, and it has none; `Trainer` streams forward only.
        """
        config, num_stages = model.config, model.pg_collection.pp.size()
        if not config.calculate_per_token_loss:
            raise ConfigError(
                "calculate_per_token_loss = False: gradients would depend on how samples are cut into micro-batches; "
                "set it in the model's configuration (--calculate-per-token-loss)"
            )
        self.step = DraftStep(model, recompute=recompute)
        if num_stages > 1 and not self.step.task.trains_base:
            raise UnsupportedError(
                f"pipeline_model_parallel_size = {num_stages}: megatron-core's schedules run every stage backward, a "
                "frozen base runs forward only; use mcore_spec.training.trainer.Trainer"
            )
        if num_stages > 1 and not config.variable_seq_lengths:
            raise ConfigError(
                "variable_seq_lengths = False: stages send hidden states of several layers, and batches differ in "
                "length; set it in the model's configuration"
            )

    def __call__(self, data_iterator: Iterator[Batch], model: nn.Module) -> tuple[Tensor, LossFunction]:
        """Forward of the next batch; `model` is the wrapped one that was given to the schedule."""
        batch = next(data_iterator).to(next(model.parameters()).device)
        if self.step.task.trains_base:
            return stage_result(self.step.run_stage(batch))
        output = self.step(batch)
        assert output is not None, "without pipeline parallelism every rank has the draft"
        return stage_result(output)

"""Forward and backward of a whole global batch through every pipeline stage, where the base is trained too.

A frozen base is streamed forward only; one that learns needs the gradients of its stages, which megatron-core's own
schedule (one forward, one backward) carries. What it carries here is wider than a hidden state, and of another length
in every micro-batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor, nn

from mcore_spec.data.batch import Batch
from mcore_spec.losses.outcome import LossOutput
from mcore_spec.training.step import DraftStep

Report = dict[str, Tensor]
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Report]]


def accumulate(
    step: DraftStep,
    wrapped: DistributedDataParallel,
    batches: Sequence[Batch],
    count: Callable[[LossOutput, Batch], None],
) -> None:
    """Add the gradients of all micro-batches, base and draft; every rank of the model must call.

    Args:
        step: of the converted model.
        wrapped: the model as its optimizer has it.
        batches: this rank's micro-batches, as many on every data-parallel rank.
        count: called on the last stage with each micro-batch and what it came to.
    """
    model: GPTModel = step.base.model

    def forward_step(batches: Iterator[Batch], _model: nn.Module) -> tuple[Tensor, LossFunction]:
        batch = next(batches).to(next(model.parameters()).device)
        output = step.run_stage(batch)
        if isinstance(output, LossOutput):
            count(output, batch)
        return stage_result(output)

    # Every payload is preceded by its shape. The model's own configuration stays as it is.
    config = copy.copy(model.config)
    config.variable_seq_lengths = True
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[wrapped],
        num_microbatches=len(batches),
        # Neither is read: the shapes travel.
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
        p2p_communicator=P2PCommunicator(model.pg_collection.pp, config),
        pg_collection=model.pg_collection,
    )


def stage_result(output: LossOutput | Tensor) -> tuple[Tensor, LossFunction]:
    """What megatron-core's schedules take from a stage: a tensor, and of the last stage what to do with it."""
    if isinstance(output, LossOutput):
        return output.loss, partial(_loss_function, output)
    return output, _not_the_last


def _not_the_last(_output: Tensor) -> tuple[Tensor, Tensor, Report]:
    raise AssertionError("the schedule asks the last stage alone for a loss")


def _loss_function(output: LossOutput, loss: Tensor) -> tuple[Tensor, Tensor, Report]:
    """Loss sum, its tokens, and pairs (sum, count) as Megatron-LM averages them for its log."""
    rows = output.judged_by_step[0]
    report = {"draft loss": torch.stack((loss.detach().double(), rows.double()))}
    if output.language_model is not None:
        report["draft loss"][0] -= output.language_model[0]
        report["lm loss"] = output.language_model
    for step, (correct, judged) in enumerate(zip(output.correct_by_step, output.judged_by_step, strict=True)):
        report[f"draft accuracy {step}"] = torch.stack((correct.double(), judged.double()))
    return loss, rows.to(torch.int), report

"""The parts of training that need no model: configuration, log, totals, draft vocabulary, initial weights."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_spec.cli.parser import parse_arguments
from mcore_spec.cli.training_arguments import FinetuneArguments
from mcore_spec.config import TrainingConfig
from mcore_spec.drafts.vocab_map import check_draft_to_target, select_draft_vocabulary, target_to_draft
from mcore_spec.errors import ConfigError
from mcore_spec.losses.outcome import LossOutput
from mcore_spec.training.log import JsonLinesLogger, TensorBoardLogger, brief, draw_curves, scalars
from mcore_spec.training.totals import Totals

ENTRY: dict[str, Any] = {
    "iteration": 4,
    "loss": 1.5,
    "accuracy": [0.5, 0.25],
    "simulated_acceptance_length": 1.75,
    "grad_norm": None,
    "tokens_per_second": 1234.5,
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give one of --train-iters, --train-samples, --num-epochs: none is given"),
        ({"train_iters": 1, "num_epochs": 1}, "--train-iters and --num-epochs is given"),
        ({"train_iters": 1, "lr": 1e-4, "min_lr": 1e-3}, "--min-lr 0.001 is above --lr 0.0001"),
        ({"train_iters": 1, "split": "98,2"}, "must be three whole numbers"),
        ({"train_iters": 1, "split": "0,2,1"}, "the first above 0"),
        ({"train_iters": 1, "logger": "wandb,tensorbord"}, "tensorbord is not one of tensorboard, wandb, trackio"),
        ({"train_iters": 1, "lr_warm_up": 3}, "lr_warmup_iters"),
    ],
)
def test_what_a_run_may_not_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingConfig.parse({"data_path": ("a.jsonl",), **values})


def test_what_a_run_may_be() -> None:
    config = TrainingConfig.parse(
        {"data_path": ("a",), "train_iters": 3, "logger": "wandb,tensorboard", "split": "9,1,0"}
    )
    assert config.loggers == ("tensorboard", "wandb")
    assert config.split_weights == (9, 1, 0)


def test_megatron_lms_options_are_read_as_megatron_lm_reads_them() -> None:
    line = (
        "--load CKPT --save CKPT2 --data-path conversations.jsonl --data-path another.jsonl "
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 3 --context-parallel-size 4 --sequence-parallel "
        "--decoder-last-pipeline-num-layers 5 --seq-length 4096 --micro-batch-size 1 --global-batch-size 32 "
        "--train-iters 1000 --lr 1e-4 --min-lr 0 --lr-decay-style cosine --lr-warmup-iters 50 --clip-grad 0.5 "
        "--weight-decay 0 --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --log-interval 10 --save-interval 200 "
        "--eval-interval 200 --eval-iters 10 --split 98,2,0 --recompute-granularity draft "
        "--logger tensorboard,wandb,trackio --seed 1234 --on-bad-line skip --no-packing"
    )
    read = parse_arguments(FinetuneArguments, line.split(), prog="finetune", description="")
    assert read.data_path == ("conversations.jsonl", "another.jsonl")
    sizes = (read.tensor_model_parallel_size, read.pipeline_model_parallel_size, read.context_parallel_size)
    assert (sizes, read.sequence_parallel, read.decoder_last_pipeline_num_layers) == ((2, 3, 4), True, 5)
    assert (read.seq_length, read.micro_batch_size, read.global_batch_size, read.train_iters) == (4096, 1, 32, 1000)
    assert (read.lr, read.min_lr, read.lr_decay_style, read.lr_warmup_iters) == (1e-4, 0.0, "cosine", 50)
    assert (read.clip_grad, read.weight_decay, read.adam_beta1, read.adam_beta2) == (0.5, 0.0, 0.9, 0.95)
    assert (read.log_interval, read.save_interval, read.eval_interval, read.eval_iters) == (10, 200, 200, 10)
    assert (read.bf16, read.split_weights, read.recompute_granularity) == (True, (98, 2, 0), "draft")
    assert (read.loggers, read.seed, read.on_bad_line) == (("tensorboard", "wandb", "trackio"), 1234, "skip")
    assert not read.packing
    for other in (("--train-samples", "train_samples"), ("--num-epochs", "num_epochs")):
        instead = line.replace("--train-iters 1000", f"{other[0]} 7").split()
        read = parse_arguments(FinetuneArguments, instead, prog="finetune", description="")
        assert (read.train_iters, read.model_dump()[other[1]]) == (None, 7)


def test_a_log_is_cut_at_the_iteration_that_is_resumed(tmp_path: Path) -> None:
    log = JsonLinesLogger(tmp_path, iteration=0)
    for iteration in (2, 4, 6):
        log.write({**ENTRY, "iteration": iteration, "loss": 1 / 3})
    log.close()
    path = tmp_path / "train_log.jsonl"
    # The process was killed while it wrote.
    path.write_text(path.read_text() + '{"iteration": 8, "lo')
    JsonLinesLogger(tmp_path, iteration=4).close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4]
    assert lines[0]["loss"] == 1 / 3


def test_an_entry_in_single_numbers_and_in_few_words() -> None:
    assert scalars(ENTRY) == {
        "loss": 1.5,
        "accuracy/step_0": 0.5,
        "accuracy/step_1": 0.25,
        "simulated_acceptance_length": 1.75,
        "tokens_per_second": 1234.5,
    }
    assert brief(ENTRY) == "loss 1.5000, accuracy 0.500 0.250, acceptance length 1.750, 1,234 tokens/s"
    figures = ("loss", "accuracy", "simulated_acceptance_length")
    validation = {"iteration": 4, **{f"validation_{name}": ENTRY[name] for name in figures}}
    assert brief(validation) == "validation loss 1.5000, accuracy 0.500 0.250, acceptance length 1.750"


def test_curves_are_drawn_or_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = JsonLinesLogger(tmp_path, iteration=0)
    log.write(ENTRY)
    log.close()
    path = draw_curves(tmp_path)
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
    path.unlink()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.figure", None)
        assert draw_curves(tmp_path) is None
    assert not path.exists()


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoardLogger(tmp_path, iteration=0)
    for iteration in (4, 8):
        log.write({**ENTRY, "iteration": iteration, "loss": 1.5 / iteration})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = {"loss", "accuracy/step_0", "accuracy/step_1", "simulated_acceptance_length", "tokens_per_second"}
    assert set(events.Tags()["scalars"]) == names
    assert [(each.step, each.value) for each in events.Scalars("loss")] == [(4, 0.375), (8, 0.1875)]
    assert events.Scalars("accuracy/step_1")[1].value == 0.25


def test_totals_are_sums_and_means_are_over_rows() -> None:
    def output(scale: int) -> LossOutput:
        return LossOutput(
            loss=torch.tensor(6.0 * scale, requires_grad=True),
            loss_by_step=torch.tensor([4.0, 2.5]) * scale,
            rows_by_step=torch.tensor([4, 2]) * scale,
            judged_by_step=torch.tensor([5, 4]) * scale,
            correct_by_step=torch.tensor([3, 1]) * scale,
            accepted=torch.tensor(4 * scale),
        )

    totals = Totals.zeros(2, device=torch.device("cpu"))
    totals.add(output(1), num_tokens=10)
    totals.add(output(2), num_tokens=7)
    assert (totals.num_steps, totals.num_rows, totals.num_tokens) == (2, 15, 17)
    means = totals.means()
    assert means.loss == 18 / 15
    assert means.loss_by_step == [1.0, 1.25]
    assert means.accuracy == [3 / 5, 1 / 4]
    assert means.simulated_acceptance_length == 1 + 4 / 5
    nothing = Totals.zeros(2, device=torch.device("cpu")).means()
    assert (nothing.loss, nothing.accuracy, nothing.simulated_acceptance_length) == (0.0, [0.0, 0.0], 1.0)
    assert not math.isnan(sum(nothing.loss_by_step))


def test_the_most_frequent_tokens_are_the_draft_vocabulary() -> None:
    counts = torch.tensor([5, 0, 9, 5, 1, 0, 5])
    d2t = select_draft_vocabulary(counts, size=4)
    # 2 is the most frequent; 0, 3 and 6 are equal and all fit.
    assert (torch.arange(4) + d2t).tolist() == [0, 2, 3, 6]
    assert check_draft_to_target(d2t, vocab_size=7, where="test") is not None
    assert (torch.arange(3) + select_draft_vocabulary(counts, size=3)).tolist() == [0, 2, 3]
    assert target_to_draft(d2t, vocab_size=7).tolist() == [True, False, True, True, False, False, True]
    # More than there are different tokens: filled up with the lowest ids.
    assert (torch.arange(6) + select_draft_vocabulary(counts, size=6)).tolist() == [0, 1, 2, 3, 4, 6]
    for size in (0, 8):
        with pytest.raises(ConfigError, match=f"draft_vocab_size = {size} is not between 1 and"):
            select_draft_vocabulary(counts, size=size)

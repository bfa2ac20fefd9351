"""What the ranks do for `test_trainer.py`: whole runs of the trainer on a tiny base and made-up conversations."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.checkpoint.store import Checkpoint, find_checkpoint, load_checkpoint, make_record
from mcore_spec.config import TrainingConfig
from mcore_spec.config.quantization import GradientScaling, find_recipe
from mcore_spec.conversion import convert
from mcore_spec.data.batch import Batch, DataParallelBatches, Document, make_batch
from mcore_spec.data.packing import SampleStream
from mcore_spec.errors import ConfigError, TrainingError
from mcore_spec.parallel.layout import Layout, is_rank_zero, num_data_ranks, parallel_runtime
from mcore_spec.parallel.sharding import gather_whole, sharded_tensors
from mcore_spec.quantization.calibrate import quantize
from mcore_spec.quantization.installed import quantization_of
from mcore_spec.quantization.modes import compute_in_fp8, learn_scales
from mcore_spec.training.calibration import CalibrationLoop
from mcore_spec.training.log import JsonLinesLogger, Logger
from mcore_spec.training.megatron_lm import MegatronForwardStep
from mcore_spec.training.optimizer import DraftOptimizer
from mcore_spec.training.signals import StoppedEarly
from mcore_spec.training.step import DraftStep
from mcore_spec.training.trainer import Progress, Trainer, TrainingData
from tests.parallel.checkpoint_cases import identity
from tests.tiny import VOCAB_SIZE, draft_to_target, import_base

GLOBAL_BATCH_SIZE = 4


class Corpus:
    """Documents drawn from a seed; all but the first token are the model's."""

    def __init__(self, lengths: tuple[int, ...], *, seed: int = 5) -> None:
        generator = np.random.default_rng(seed)
        self.lengths = np.array(lengths)
        self._documents = [
            Document(generator.integers(0, VOCAB_SIZE, length), np.arange(length) > 0) for length in lengths
        ]

    def document(self, index: int) -> Document:
        return self._documents[index]


class Run(NamedTuple):
    """How a run is made.

    Attributes:
        layout: of the ranks.
        dtype: of base and draft.
        has_d2t: whether the draft vocabulary is reduced.
        draft: fields of the draft's configuration.
        options: of `TrainingConfig`.
        recipe: by which base and draft are quantised.
        gradient_scaling: of linear maps that multiply FP8 numbers; ``None``: nothing does.
        learns_scales: whether the draft's scales are trained.
    """

    layout: Layout
    dtype: str = "float32"
    has_d2t: bool = True
    draft: dict[str, Any] = {}
    options: dict[str, Any] = {}
    recipe: str | None = None
    gradient_scaling: GradientScaling | None = None
    learns_scales: bool = False


CORPUS = Corpus((9, 12, 16, 5, 7, 16, 3, 11, 8, 14, 6, 10))


def config_of(run: Run, **changes: Any) -> TrainingConfig:
    values = {
        "data_path": ("made up",),
        "train_iters": 6,
        "seq_length": 16,
        "lr": 1e-2,
        "lr_scaling": "none",
        "lr_warmup_iters": 2,
        "log_interval": 2,
        "weight_decay": 0.1,
        "split": "1,0,0",
        **run.options,
        **changes,
    }
    return TrainingConfig.parse(values)


def make_data(config: TrainingConfig, corpus: Corpus, model: GPTModel, step: DraftStep) -> TrainingData:
    def share(num_epochs: int | None) -> DataParallelBatches:
        stream = SampleStream(
            corpus,
            np.arange(len(corpus.lengths)),
            seq_length=config.seq_length,
            seed=config.seed,
            document_multiple=step.document_multiple,
            num_epochs=num_epochs,
        )
        return DataParallelBatches(
            stream,
            global_batch_size=GLOBAL_BATCH_SIZE,
            micro_batch_size=config.micro_batch_size,
            data_rank=model.pg_collection.dp.rank(),
            data_size=model.pg_collection.dp.size(),
            num_steps=step.num_steps,
            row_multiple=step.row_multiple,
            mixing_seed=config.seed if step.task.mixes_hidden_states else None,
            noise_seed=config.seed if step.task.draws_noise else None,
        )

    return TrainingData(train=share(None), valid=share(1), num_valid_batches=2, settings={"seed": config.seed})


def converted(directory: Path, run: Run) -> GPTModel:
    model = import_base(directory, run.layout, dtype=run.dtype).model
    # The fields say which algorithm is meant; without any it is EAGLE-3.
    convert(model, run.draft or [("eagle", {})], d2t=draft_to_target() if run.has_d2t else None)
    if run.recipe is not None:
        quantize(model, run.recipe, see_corpus if find_recipe(run.recipe).is_calibrated else None)
    return set_up(model, run)


def set_up(model: GPTModel, run: Run, *, is_resumed: bool = False) -> GPTModel:
    """The ways of a quantised model to be trained."""
    if run.recipe is not None:
        compute_in_fp8(model, run.gradient_scaling, is_resumed=is_resumed)
    if run.learns_scales:
        learn_scales(model)
    return model


# A calibration on some of the made-up conversations.
see_corpus = CalibrationLoop(CORPUS, num_conversations=4)


def trainer_of(
    model: GPTModel,
    config: TrainingConfig,
    save: Path,
    corpus: Corpus = CORPUS,
    *,
    resume_from: Checkpoint | None = None,
) -> Trainer:
    assert config.train_iters is not None
    return Trainer(
        model,
        partial(make_data, config, corpus),
        config,
        record=make_record(model, identity("llama")) if resume_from is None else resume_from.record,
        save=save,
        num_iterations=config.train_iters,
        global_batch_size=GLOBAL_BATCH_SIZE,
        resume_from=resume_from,
    )


def loggers_of(save: Path, iteration: int = 0) -> list[Logger]:
    return [JsonLinesLogger(save, iteration=iteration)] if is_rank_zero() else []


def weights(model: GPTModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def log_without_speed(save: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (save / "train_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


class _SignalAt:
    """Batches that ask this process to stop while a given step is made."""

    def __init__(self, batches: Any, *, iteration: int) -> None:
        self._batches, self._iteration = batches, iteration

    def micro_batches(self, index: int) -> Iterator[Batch]:
        if index == self._iteration:
            os.kill(os.getpid(), signal.SIGTERM)
        return self._batches.micro_batches(index)


def interrupted_and_not(*, run: Run, directory: Path, save: Path) -> dict[str, Any]:
    """A run of six steps; and one that one rank is told to end in its third, resumed in a new trainer.

    Returns:
        What differs between the two, bit for bit, on this rank.
    """
    with parallel_runtime(run.layout):
        config = config_of(run)
        whole = converted(directory, run)
        before = weights(whole)
        trainer_of(whole, config, save / "whole").run(loggers_of(save / "whole"))

        first = trainer_of(converted(directory, run), config, save / "parts")
        if is_rank_zero():
            first.data = first.data._replace(train=_SignalAt(first.data.train, iteration=2))
        progress = first.run(loggers_of(save / "parts"))
        assert progress.iteration == 3, progress

        checkpoint = find_checkpoint(save / "parts")
        assert checkpoint.iteration == 3
        resumed = set_up(load_checkpoint(checkpoint, run.layout), run, is_resumed=True)
        second = trainer_of(resumed, config, save / "parts", resume_from=checkpoint)
        progress = second.run(loggers_of(save / "parts", checkpoint.iteration))

        expected, found = weights(whole), weights(resumed)
        trained = [name for name, p in whole.named_parameters() if p.requires_grad]
        return {
            "differing": [name for name in expected if not torch.equal(expected[name], found[name])],
            "unmoved": [name for name in trained if torch.equal(expected[name], before[name])],
            "moved base": [n for n in before if n not in trained and not torch.equal(before[n], expected[n])],
            "progress": asdict(progress),
            "logs": [log_without_speed(save / name) for name in ("whole", "parts")] if is_rank_zero() else None,
        }


def train_and_save(*, run: Run, directory: Path, save: Path) -> dict[str, Any]:
    """Three steps, saved; then one more. The whole draft behind each, where it lives."""
    with parallel_runtime(run.layout):
        model = converted(directory, run)
        trainer = trainer_of(model, config_of(run), save)
        for _ in range(3):
            trainer.train_step()
        trainer.save()
        saved = whole_draft(model)
        trainer.train_step()
        return {"saved": saved, "next": whole_draft(model)}


def load_and_train(*, run: Run, save: Path) -> dict[str, Any]:
    """What `train_and_save` saved, in this layout, and one more step."""
    with parallel_runtime(run.layout):
        checkpoint = find_checkpoint(save)
        model = set_up(load_checkpoint(checkpoint, run.layout), run, is_resumed=True)
        loaded = whole_draft(model)
        trainer = trainer_of(model, config_of(run), save, resume_from=checkpoint)
        trainer.train_step()
        return {"saved": loaded, "next": whole_draft(model)}


def whole_draft(model: GPTModel) -> dict[str, Tensor] | None:
    draft = MegatronBase(model).draft()
    if draft is None:
        return None
    modules: list[nn.Module] = [draft]
    quantization = quantization_of(model)
    if quantization is not None:
        modules.append(quantization)
    return {
        entry.name: gather_whole(entry.tensor, entry.shard, draft.tp).detach().clone()
        for module in modules
        for entry in sharded_tensors(module)
    }


def stopped_while_fitting(*, directory: Path, save: Path) -> dict[str, Any]:
    """A run of which one rank is told to end while its first weights are made."""
    run = Run(Layout(), options={"fit_start": 3})
    with parallel_runtime(run.layout):
        model, config, asked = converted(directory, run), config_of(run), 0
        before, handler = weights(model), signal.getsignal(signal.SIGTERM)

        def signalling(given: GPTModel, step: DraftStep) -> TrainingData:
            data = make_data(config, CORPUS, given, step)
            return data._replace(train=_SignalAt(data.train, iteration=1)) if is_rank_zero() else data

        try:
            Trainer(
                model,
                signalling,
                config,
                record=make_record(model, identity("llama")),
                save=save,
                num_iterations=6,
                global_batch_size=GLOBAL_BATCH_SIZE,
            )
        except StoppedEarly:
            asked += 1
        return {
            "stopped": asked,
            "changed": [name for name, weight in weights(model).items() if not torch.equal(weight, before[name])],
            "handler is back": signal.getsignal(signal.SIGTERM) is handler,
        }


def non_finite(*, directory: Path, save: Path, bad: tuple[int, ...]) -> dict[str, Any]:
    """A run in which the gradients of some steps are not finite."""
    run = Run(Layout())
    with parallel_runtime(run.layout):
        model = converted(directory, run)
        trainer = trainer_of(model, config_of(run, save_interval=1), save)
        parameter = next(p for p in model.parameters() if p.requires_grad)
        seen: list[dict[str, Tensor]] = []

        def poison(gradient: Tensor) -> Tensor:
            is_bad = trainer.progress.iteration in bad
            return torch.full_like(gradient, float("nan")) if is_bad else gradient

        parameter.register_hook(poison)
        error, loggers = None, loggers_of(save)
        try:
            for _ in range(6):
                trainer.train_step()
                trainer.save()
                seen.append(weights(model))
        except TrainingError as raised:
            error = str(raised)
        for logger in loggers:
            logger.close()
        same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(seen, seen[1:], strict=False)]
        return {"same": same, "progress": asdict(trainer.progress), "error": error}


def unmixed_batches(*, directory: Path) -> dict[str, Any]:
    """A step that mixes states, given a batch that does not say which: to train on, and to validate on."""
    run = Run(Layout(), draft={"eagle_mix_hidden_states": True})
    with parallel_runtime(run.layout):
        step = DraftStep(converted(directory, run))
        batch = make_batch([CORPUS.document(0)], num_steps=step.num_steps, num_samples=1)
        try:
            step(batch)
        except ConfigError as raised:
            error = str(raised)
        plain = DraftStep(converted(directory, Run(Layout())))
        with torch.no_grad():
            return {"error": error, "losses": [float(each(batch).loss) for each in (step, plain)]}


def overfitting(run: Run, *, num_iterations: int, lr: float, min_lr: float) -> TrainingConfig:
    """Many steps, each in one micro-batch: a gradient is that of its samples, however they are cut."""
    sizes = {"train_iters": num_iterations, "micro_batch_size": GLOBAL_BATCH_SIZE}
    return config_of(run, **sizes, lr=lr, min_lr=min_lr, weight_decay=0.0, clip_grad=1.0)


def overfit(
    *, directory: Path, save: Path, draft: dict[str, Any] | None = None, num_iterations: int = 400
) -> tuple[Progress, list[float]]:
    """Accuracy by step after many steps on a few conversations."""
    run = Run(Layout(), has_d2t=False, draft=draft or {"eagle_architecture_config": {"intermediate_size": 128}})
    corpus = Corpus((12, 10, 14, 9))
    with parallel_runtime(run.layout):
        model = converted(directory, run)
        config = overfitting(run, num_iterations=num_iterations, lr=1e-2, min_lr=1e-4)
        trainer = trainer_of(model, config, save, corpus)
        for _ in range(num_iterations):
            trainer.train_step()
        means = trainer.evaluate()
        assert means is not None
        return trainer.progress, means.accuracy


def noisy_losses(*, directory: Path, draft: dict[str, Any]) -> dict[str, Any]:
    """Losses of one batch: with noise of two keys, without keys, in validation, and of a draft without noise."""
    with parallel_runtime(Layout()):
        step = DraftStep(converted(directory, Run(Layout(), has_d2t=False, draft=draft)))

        def loss(step: DraftStep, key: int | None) -> float:
            keys = None if key is None else [key]
            output = step(make_batch([CORPUS.document(0)], num_steps=step.num_steps, num_samples=1, noise_keys=keys))
            assert output is not None
            return float(output.loss.detach())

        try:
            loss(step, None)
        except ConfigError as raised:
            error = str(raised)
        trained = [loss(step, key) for key in (4, 4, 5)]
        with torch.no_grad():
            validated = loss(step, None)
        quiet = {**draft, "eagle_feature_noise": 0.0}
        plain = loss(DraftStep(converted(directory, Run(Layout(), has_d2t=False, draft=quiet))), None)
        return {"error": error, "trained": trained, "validated": validated, "plain": plain}


def learning_rates(
    *,
    directory: Path,
    options: dict[str, Any],
    draft: dict[str, Any] | None = None,
    has_d2t: bool = True,
    rates: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Each parameter's learning rate in a run of 4 steps: the highest, behind the warm-up, and the one of the end."""
    run = Run(Layout(), draft=draft or {}, has_d2t=has_d2t)
    with parallel_runtime(run.layout):
        model = converted(directory, run)
        config = config_of(run, train_iters=4, **options)
        optimizer = DraftOptimizer(model, config, num_iterations=4, rates=rates)
        names = {id(p): name.removeprefix("eagle_module.") for name, p in model.named_parameters()}
        found: dict[str, Any] = {}
        for iteration in (1, 4):
            optimizer.schedule(iteration)
            for group in optimizer.optimizer.param_groups:
                for parameter in group["params"]:
                    found.setdefault(names[id(parameter)], []).append(group["lr"])
        optimizer.schedule(1)
        return {"rates": found, "reported": optimizer.step().learning_rate}


def schedule_of_megatron(
    *, layout: Layout, directory: Path, save: Path, draft: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Gradients by megatron-core's own schedule and finaliser, and by the trainer; the report of the first."""
    from megatron.core.distributed import finalize_model_grads

    run = Run(layout, dtype="float64", has_d2t=False, draft=draft or {})
    with parallel_runtime(layout):
        config = config_of(run)
        found = []
        for is_megatron in (True, False):
            model = converted(directory, run)
            if is_megatron:
                model.config.variable_seq_lengths = layout.pipeline > 1
                forward_step = MegatronForwardStep(model)
                optimizer = DraftOptimizer(model, config, num_iterations=6)
                optimizer.zero_grad()
                batches = list(make_data(config, CORPUS, model, forward_step.step).train.micro_batches(0))
                assert len(batches) == GLOBAL_BATCH_SIZE // num_data_ranks(layout)
                model.config.finalize_model_grads_func = finalize_model_grads
                report = get_forward_backward_func()(
                    forward_step_func=forward_step,
                    data_iterator=iter(batches),
                    model=[optimizer.ddp],
                    num_microbatches=len(batches),
                    seq_length=16,
                    micro_batch_size=1,
                    forward_only=False,
                )
            else:
                trainer = trainer_of(model, config, save)
                trainer.optimizer.zero_grad()
                totals = trainer._accumulate(trainer.data.train, 0, with_grad=True)
                trainer.optimizer.reduce_gradients(num_rows=totals.num_rows)
                sums = totals.sums
            found.append({name: p.main_grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        return {"megatron": found[0], "trainer": found[1], "report": report, "sums": sums}

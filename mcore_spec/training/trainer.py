"""The training loop: micro-batches, optimizer, log, validation, checkpoints. One for every draft and layout."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt import GPTModel

from mcore_spec.bases.feature_sources import LiveFeatures
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.checkpoint.store import Checkpoint, load_optimizer_state, model_state, save_checkpoint
from mcore_spec.config import TrainingConfig
from mcore_spec.data.batch import Batch, Batches
from mcore_spec.data.document import Document
from mcore_spec.errors import CheckpointError, ConfigError, TrainingError
from mcore_spec.losses.outcome import LossOutput
from mcore_spec.objectives.linear_start import check_linear_start
from mcore_spec.parallel.layout import is_rank_zero, run_on_every_rank
from mcore_spec.quantization.modes import finish_step
from mcore_spec.training.acceptance import AcceptanceCheck
from mcore_spec.training.linear_start import fit_linear_start
from mcore_spec.training.log import VALIDATION, Entry, Logger, ProgressBar
from mcore_spec.training.optimizer import DraftOptimizer, StepResult
from mcore_spec.training.pipeline import accumulate
from mcore_spec.training.signals import StoppedEarly, StopRequest, stop_on_signal
from mcore_spec.training.step import DraftStep, MakeFeatures
from mcore_spec.training.totals import Means, Totals

# Steps in a row without a finite gradient that end a run: one is a bad batch, three are a broken model.
MAX_SKIPPED_IN_A_ROW = 3


class TrainingData(NamedTuple):
    """What to train on.

    Attributes:
        train: batches without end.
        valid: batches of the validation; ``None``: there is none.
        num_valid_batches: how many the validation has.
        settings: what decides which tokens stand in which batch; a run is resumed with the same only.
        questions: conversations on which acceptance is measured.
        waited_s: seconds that steps waited for batches so far, where they are read from disk.
    """

    train: Batches
    valid: Batches | None
    num_valid_batches: int
    settings: dict[str, Any]
    questions: Sequence[Document] = ()
    waited_s: Callable[[], float] | None = None


@dataclass
class Progress:
    """Where a run is; part of every checkpoint."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    num_updates: int = 0
    num_skipped: int = 0
    num_skipped_in_a_row: int = 0
    # The run was stopped where it would have been validated: that is done when it goes on.
    is_validation_due: bool = False


class Trainer:
    """A run. Every rank of the model makes one and calls `run`."""

    def __init__(
        self,
        model: GPTModel,
        make_data: Callable[[GPTModel, DraftStep], TrainingData],
        config: TrainingConfig,
        *,
        record: CheckpointRecord,
        save: Path,
        num_iterations: int,
        global_batch_size: int,
        tokenizer_files: list[Path] | None = None,
        end_ids: Sequence[int] = (),
        resume_from: Checkpoint | None = None,
        make_features: MakeFeatures = LiveFeatures,
    ) -> None:
        """Set the draft's first weights where they come from the data, and allocate the optimizer.

        Args:
            model: this rank's part, converted.
            make_data: from the model and its step; the same on every rank but for the data-parallel share.
            config: of the run.
            record: base and conversion, for the checkpoints; and the run that the draft was trained in, if it was.
            save: directory of the checkpoints.
            num_iterations: optimizer steps of the whole run.
            global_batch_size: samples in a step.
            tokenizer_files: carried along in the checkpoints.
            end_ids: tokens that end an answer, for measuring acceptance.
            resume_from: go on where this was saved; the model must have been loaded from it.
            make_features: see `DraftStep`.

        Raises:
            ConfigError: a model without a draft, or data in another order than `resume_from`'s.
            CheckpointError: weights that are not finite, or `resume_from` holds no training state.
            UnsupportedError: a draft that cannot be trained.
            StoppedEarly: on every rank, if one was told to end while the first weights were made.
        """
        self.model, self.config, self.record = model, config, record
        self.save_directory, self.num_iterations, self.global_batch_size = save, num_iterations, global_batch_size
        self.tokenizer_files = tokenizer_files or []
        run_on_every_rank(lambda: _check_finite(model))
        recompute = config.recompute_granularity == "draft"
        self.step = DraftStep(model, recompute=recompute, make_features=make_features, teacher=config.teacher)
        check_linear_start(self.step.task, num_batches=config.fit_start)
        self.data = make_data(model, self.step)
        self.acceptance: AcceptanceCheck | None = None
        if config.eval_acceptance_interval is not None:
            self.acceptance = AcceptanceCheck(
                model, self.data.questions, num_steps=self.step.num_steps, end_ids=end_ids
            )
        self.device = next(model.parameters()).device
        if resume_from is not None:
            self._check_resumable(resume_from)
        is_fitted = resume_from is None and bool(config.fit_start)
        self.rates = self._fit_start() if is_fitted else _rates(record)
        self.optimizer = DraftOptimizer(model, config, num_iterations=num_iterations, rates=self.rates)
        self.progress = Progress()
        self.since_log = self._nothing()
        self._counts_tokens = model.pg_collection.cp.rank() == 0
        self._newest_saved: int | None = None
        self.newest_entry: Entry | None = None
        if resume_from is not None:
            self._resume(resume_from)

    def _check_resumable(self, checkpoint: Checkpoint) -> None:
        """Refuse to go on with another run.

        Raises:
            CheckpointError: it holds no training state.
            ConfigError: the data is in another order now.
        """
        training = checkpoint.record.training
        if training is None:
            raise CheckpointError(f"{checkpoint.path} is no checkpoint of a run; give it as --load to begin one")
        for name, value in training["settings"].items():
            if self.data.settings.get(name) != value:
                raise ConfigError(
                    f"{name} = {self.data.settings.get(name)!r}, but the run in {checkpoint.path} began with {value!r}"
                    ": give the same to continue it, or another --save to begin anew"
                )

    def _resume(self, checkpoint: Checkpoint) -> None:
        training = checkpoint.record.training
        assert training is not None
        self.progress = Progress(**training["progress"])
        self.since_log.sums.copy_(torch.tensor(training["since_log"], dtype=torch.float64))
        state = model_state(self.model)
        loaded = load_optimizer_state(checkpoint, self.optimizer.sharded_state(state, is_loading=True))
        self.optimizer.load_sharded_state(state, loaded, num_steps=self.progress.num_updates)
        self._newest_saved = checkpoint.iteration

    def run(self, loggers: list[Logger]) -> Progress:
        """Train to the end, or until somebody asks to stop; the last state is saved either way.

        Args:
            loggers: of rank 0; empty on the others.

        Raises:
            TrainingError: gradients that stay without numbers; what was saved before is as it was.
        """
        bar = ProgressBar(
            num_iterations=self.num_iterations, iteration=self.progress.iteration, is_shown=is_rank_zero()
        )
        with stop_on_signal() as stop:
            try:
                self._loop(loggers, bar, stop)
            finally:
                bar.close()
                for logger in loggers:
                    logger.close()
        return self.progress

    def _fit_start(self) -> dict[str, float]:
        """The draft's first weights from the first batches; factors of the learning rate."""

        def batches(stop: StopRequest) -> Iterator[Batch]:
            for index in range(self.config.fit_start or 0):
                for batch in self.data.train.micro_batches(index):
                    yield batch.to(self.device)
                if stop.is_made_anywhere(self.device):
                    raise StoppedEarly

        with stop_on_signal() as stop:
            return fit_linear_start(self.model, self.step, batches(stop), seed=self.config.seed)

    def _loop(self, loggers: list[Logger], bar: ProgressBar, stop: StopRequest) -> None:
        clock, num_tokens, waited_s = _Clock(), self.progress.consumed_tokens, self._waited_s()
        if self.progress.is_validation_due:
            self._measure(loggers)
        while self.progress.iteration < self.num_iterations:
            result = self.train_step()
            bar.advance()
            if not result.is_finite:
                bar.note(f"iteration {self.progress.iteration}: the gradient is not finite; the step is skipped")
            iteration, is_last = self.progress.iteration, self.progress.iteration == self.num_iterations
            is_stopped = stop.is_made_anywhere(self.device)
            if is_last or iteration % self.config.log_interval == 0:
                elapsed_s = clock.take()
                entry = self._entry(result, speed=(self.progress.consumed_tokens - num_tokens) / elapsed_s)
                if self.data.waited_s is not None:
                    entry["data_wait"] = (self._waited_s() - waited_s) / elapsed_s
                num_tokens, waited_s = self.progress.consumed_tokens, self._waited_s()
                self.since_log.sums.zero_()
                self.newest_entry = entry
                bar.show(entry)
                _write(loggers, entry)
            clock.pause()
            self.progress.is_validation_due = is_stopped and not is_last
            if not self.progress.is_validation_due:
                self._measure(loggers)
            if is_stopped or _is_due(iteration, self.config.save_interval, is_last=is_last):
                self.save()
            clock.go_on()
            if is_stopped:
                return

    def _waited_s(self) -> float:
        return 0.0 if self.data.waited_s is None else self.data.waited_s()

    def _measure(self, loggers: list[Logger]) -> None:
        """Validation and acceptance, where they are due at this iteration."""
        iteration = self.progress.iteration
        self.progress.is_validation_due = False
        if _is_due(iteration, self.config.eval_interval, is_last=iteration == self.num_iterations):
            self._validate(loggers)
        if self.acceptance is not None and _is_due(iteration, self.config.eval_acceptance_interval, is_last=False):
            _write(loggers, {"iteration": iteration, **self.acceptance()})

    def train_step(self) -> StepResult:
        """One optimizer step on the next global batch."""
        progress = self.progress
        self.optimizer.schedule(progress.iteration)
        self.optimizer.zero_grad()
        totals = self._accumulate(self.data.train, progress.iteration, with_grad=True)
        self.optimizer.reduce_gradients(num_rows=totals.num_rows)
        result = self.optimizer.step()
        self.step.follow_base()
        finish_step(self.model)
        progress.iteration += 1
        progress.consumed_samples += self.global_batch_size
        progress.consumed_tokens += totals.num_tokens
        progress.num_updates = self.optimizer.num_steps
        if result.is_finite:
            self.since_log.add_totals(totals)
            progress.num_skipped_in_a_row = 0
            return result
        progress.num_skipped += 1
        progress.num_skipped_in_a_row += 1
        if progress.num_skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(self._describe_divergence())
        return result

    def _accumulate(self, batches: Batches, index: int, *, with_grad: bool) -> Totals:
        """Losses, and gradients, of one global batch; the same totals on every rank."""
        totals = self._nothing()

        def count(output: LossOutput, batch: Batch) -> None:
            totals.add(output, num_tokens=batch.num_tokens if self._counts_tokens else 0)

        if with_grad and self.step.task.trains_base:
            accumulate(self.step, self.optimizer.ddp, list(batches.micro_batches(index)), count)
        else:
            for batch in batches.micro_batches(index):
                with torch.set_grad_enabled(with_grad):
                    output = self.step(batch.to(self.device))
                if output is None:
                    continue
                count(output, batch)
                if with_grad:
                    output.loss.backward()
        groups = self.model.pg_collection
        totals.reduce(data_group=groups.dp_cp, pipeline_group=groups.pp)
        return totals

    def _figures(self, means: Means) -> dict[str, Any]:
        return means.figures(with_accuracy=self.step.task.reports_accuracy)

    def _nothing(self) -> Totals:
        task = self.step.task
        return Totals.zeros(
            task.num_steps,
            device=self.device,
            num_regressed=task.num_regressed,
            trains_base=task.trains_base,
        )

    def evaluate(self) -> Means | None:
        """Figures on the validation batches; ``None`` where there are none."""
        if self.data.valid is None or self.data.num_valid_batches == 0:
            return None
        totals = self._nothing()
        for index in range(self.data.num_valid_batches):
            totals.add_totals(self._accumulate(self.data.valid, index, with_grad=False))
        return totals.means()

    def _validate(self, loggers: list[Logger]) -> None:
        means = self.evaluate()
        if means is not None:
            figures = {f"{VALIDATION}{name}": value for name, value in self._figures(means).items()}
            _write(loggers, {"iteration": self.progress.iteration, **figures})

    def _entry(self, result: StepResult, *, speed: float) -> dict[str, Any]:
        means = self._figures(self.since_log.means())
        if self.since_log.num_rows == 0:
            # Every step since the last entry was skipped.
            means = dict.fromkeys(means)
        return {
            "iteration": self.progress.iteration,
            "consumed_samples": self.progress.consumed_samples,
            "consumed_tokens": self.progress.consumed_tokens,
            **means,
            "grad_norm": result.grad_norm if result.is_finite else None,
            "learning_rate": result.learning_rate,
            "skipped_iterations": self.progress.num_skipped,
            "tokens_per_second": speed,
        }

    def save(self) -> None:
        """Write a checkpoint of this iteration, once."""
        iteration = self.progress.iteration
        if self._newest_saved == iteration:
            return
        training = {
            "progress": asdict(self.progress),
            "since_log": self.since_log.sums.tolist(),
            "rates": self.rates,
            "settings": self.data.settings,
        }
        save_checkpoint(
            self.model,
            self.save_directory,
            self.record.model_copy(update={"training": training}),
            iteration=iteration,
            tokenizer_files=self.tokenizer_files,
            optimizer_state=self.optimizer.sharded_state(model_state(self.model)),
        )
        self._newest_saved = iteration

    def _describe_divergence(self) -> str:
        kept = "nothing was saved yet" if self._newest_saved is None else f"iteration {self._newest_saved} is intact"
        return (
            f"{MAX_SKIPPED_IN_A_ROW} steps in a row had gradients with NaN or infinity (iterations up to "
            f"{self.progress.iteration}); {kept}. Lower --lr {self.config.lr} or --clip-grad {self.config.clip_grad}, "
            "or look at the data"
        )


class _Clock:
    """Seconds of training since the last entry of the log, without validation and saving."""

    def __init__(self) -> None:
        self._seconds, self._since = 0.0, time.perf_counter()

    def pause(self) -> None:
        self._seconds += time.perf_counter() - self._since

    def go_on(self) -> None:
        self._since = time.perf_counter()

    def take(self) -> float:
        self.pause()
        seconds, self._seconds = self._seconds, 0.0
        self.go_on()
        return seconds


def _rates(record: CheckpointRecord) -> dict[str, float] | None:
    """Behind a least-squares start in the run that the draft was trained in before, if there was one."""
    rates: dict[str, float] | None = None if record.training is None else record.training.get("rates")
    return rates


def _is_due(iteration: int, interval: int | None, *, is_last: bool) -> bool:
    return is_last or (interval is not None and iteration % interval == 0)


def _write(loggers: list[Logger], entry: Entry) -> None:
    for logger in loggers:
        logger.write(entry)


def _check_finite(model: GPTModel) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"weight {name} holds NaN or infinity; training would follow. Load a checkpoint or base that is whole"
            )

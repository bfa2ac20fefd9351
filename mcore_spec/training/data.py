"""From stored conversations to the batches of a run: which train, which validate, how many steps that is."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from megatron.core.models.gpt import GPTModel

from mcore_spec.config import TrainingConfig
from mcore_spec.data.batch import DataParallelBatches
from mcore_spec.data.document import ConversationSource, Document
from mcore_spec.data.hidden_states.batches import StatesReader, StoredBatches
from mcore_spec.data.packing import SampleStream, Split, split_documents
from mcore_spec.errors import ConfigError
from mcore_spec.training.step import DraftStep
from mcore_spec.training.trainer import TrainingData

# From this rank's part of the model and its step.
ReadStates: TypeAlias = Callable[[GPTModel, DraftStep], StatesReader]


class Conversations:
    """The tokenised conversations of a run, shared out to training and validation."""

    def __init__(
        self,
        store: ConversationSource,
        config: TrainingConfig,
        *,
        global_batch_size: int,
        read_states: ReadStates | None = None,
    ) -> None:
        """Share the documents out.

        Args:
            store: all of them.
            config: of the run.
            global_batch_size: samples in an optimizer step.
            read_states: where the base does not run here, what reads its hidden states; called once for the batches of
                training and once for those of the validation, in this order.

        Raises:
            ConfigError: too few documents for the split, or for one step.
        """
        self.store, self.config, self.global_batch_size = store, config, global_batch_size
        self.read_states = read_states
        self.split: Split = split_documents(len(store), weights=config.split_weights, seed=config.seed)
        self.num_iterations = self._num_iterations()

    def _stream(self, *, is_train: bool, document_multiple: int = 1) -> SampleStream:
        config = self.config
        return SampleStream(
            self.store,
            self.split.train if is_train else self.split.valid,
            seq_length=config.seq_length,
            seed=config.seed,
            document_multiple=document_multiple,
            packing=config.packing,
            num_epochs=None if is_train else 1,
        )

    def _num_iterations(self) -> int:
        config, stream = self.config, self._stream(is_train=True)
        if config.train_iters is not None:
            return config.train_iters
        num_samples = config.train_samples
        if num_samples is None:
            assert config.num_epochs is not None
            num_samples = sum(stream.samples_per_epoch(epoch) for epoch in range(config.num_epochs))
        num_iterations = num_samples // self.global_batch_size
        if num_iterations == 0:
            raise ConfigError(
                f"{num_samples} samples make no step of global_batch_size = {self.global_batch_size}; give more data "
                "or epochs, or a smaller batch"
            )
        return num_iterations

    def num_fit_batches(self, *, num_rows: int) -> int:
        """Global batches that hold about so many rows to learn from; of the run's own, and of its first epoch."""
        samples = self._stream(is_train=True).samples_per_epoch(0)
        rows = self.store.num_masked_tokens * len(self.split.train) / len(self.store)
        rows_per_batch = rows / samples * self.global_batch_size
        wanted = math.ceil(num_rows / rows_per_batch)
        return min(wanted, self.num_iterations, math.ceil(samples / self.global_batch_size))

    def batches(self, model: GPTModel, step: DraftStep) -> TrainingData:
        """What this rank trains and validates on."""
        config, group = self.config, model.pg_collection.dp

        def share(stream: SampleStream, **seeds: int | None) -> DataParallelBatches:
            return DataParallelBatches(
                stream,
                global_batch_size=self.global_batch_size,
                micro_batch_size=config.micro_batch_size,
                data_rank=group.rank(),
                data_size=group.size(),
                num_steps=step.num_steps,
                row_multiple=step.row_multiple,
                **seeds,
            )

        multiple = step.document_multiple
        valid, num_valid = None, 0
        if len(self.split.valid) and config.eval_iters:
            valid = share(self._stream(is_train=False, document_multiple=multiple))
            assert valid.num_batches is not None
            num_valid = min(valid.num_batches, config.eval_iters)
        train = share(
            self._stream(is_train=True, document_multiple=multiple),
            mixing_seed=config.seed if step.task.mixes_hidden_states else None,
            noise_seed=config.seed if step.task.draws_noise else None,
        )
        stored = [self._with_states(each, model, step) for each in (train, valid)]
        return TrainingData(
            train=stored[0] or train,
            valid=stored[1] or valid,
            num_valid_batches=num_valid,
            settings=self._settings(),
            questions=self._questions(),
            waited_s=None if stored[0] is None else partial(_waited_s, stored[0]),
        )

    def _with_states(
        self, batches: DataParallelBatches | None, model: GPTModel, step: DraftStep
    ) -> StoredBatches | None:
        """Batches that come with the base's hidden states, where it does not run here and this rank needs them."""
        if batches is None or self.read_states is None or not step.base.is_last_stage:
            return None
        return StoredBatches(batches, self.read_states(model, step))

    def _questions(self) -> list[Document]:
        """The first validation conversations, where acceptance is measured on them."""
        if self.config.eval_acceptance_interval is None:
            return []
        return [self.store.document(int(index)) for index in self.split.valid[: self.config.eval_acceptance_samples]]

    def _settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "data": self.store.fingerprint,
            "split": config.split,
            "seq_length": config.seq_length,
            "packing": config.packing,
            "seed": config.seed,
            "global_batch_size": self.global_batch_size,
        }


def _waited_s(batches: StoredBatches) -> float:
    return batches.waited_s

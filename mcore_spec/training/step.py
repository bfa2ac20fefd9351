"""One micro-batch: the base's features, then the draft's objective. The caller runs backward and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from mcore_spec.bases.feature_sources import LiveFeatures
from mcore_spec.bases.features import Features, FeatureSource
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.conversion import conversion_of, find_algorithm, reads_tokens
from mcore_spec.data.batch import Batch
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.losses.outcome import LossOutput
from mcore_spec.objectives.language_model import outcome_of
from mcore_spec.objectives.objective import Objective, Task
from mcore_spec.parallel.collectives import Group
from mcore_spec.parallel.documents import Documents, document_multiple, row_multiple
from mcore_spec.parallel.sharding import sharded_tensors
from mcore_spec.quantization.installed import quantization_of
from mcore_spec.quantization.teacher import UnquantizedTeacher

Teacher: TypeAlias = Literal["as_loaded", "unquantized"]

MakeFeatures: TypeAlias = Callable[[MegatronBase, Sequence[int]], FeatureSource]


class BaseRun(NamedTuple):
    """The documents of a batch, seen from this rank, and the base's features of its rows, on the last stage."""

    documents: Documents
    features: Features | None


class DraftStep:
    """The loss of a converted model on a batch. Holds what does not change between batches."""

    def __init__(
        self,
        model: GPTModel,
        *,
        recompute: bool = False,
        make_features: MakeFeatures = LiveFeatures,
        teacher: Teacher = "as_loaded",
    ) -> None:
        """Look at the conversion.

        Args:
            model: this rank's part, converted.
            recompute: compute the activations of each step again in backward.
            make_features: ``make_features(base, aux_layer_ids)``, where the base's features come from.
            teacher: "unquantized": of a quantised base, what it was before is the teacher.

        Raises:
            ConfigError: a model without a draft, or an unquantised teacher of a base that is not quantised or does not
                run.
            UnsupportedError: a draft or an option whose training is not built, or a base that cannot be trained too.
        """
        conversion = conversion_of(model)
        if conversion is None:
            raise ConfigError("the model has no draft; attach one first (convert)")
        self.task = find_algorithm(conversion.algorithm).task(conversion.config)
        self.base = MegatronBase(model)
        self.features: FeatureSource = make_features(self.base, self.task.aux_layer_ids)
        if teacher == "unquantized":
            if self.task.trains_base:
                raise ConfigError(
                    "teacher = unquantized with eagle_freeze_base_model = false: the base changes; leave it out"
                )
            self.features = UnquantizedTeacher(self.base, self.features)
        self.context_group: Group = model.pg_collection.cp
        self.draft = self.base.draft()
        self.recompute = recompute
        self.objective: Objective | None = None
        self._make_objective()
        if self.task.trains_base and self.base.architecture.num_experts is not None:
            raise UnsupportedError(
                f"eagle_freeze_base_model = false on a base with {self.base.architecture.num_experts} experts: the "
                "balance of its routers is not trained here; keep it frozen"
            )
        if self.draft is not None:
            _mark_shards(self.draft)
            quantization = quantization_of(model)
            if quantization is not None:
                _mark_shards(quantization)

    @property
    def num_steps(self) -> int:
        """Tokens that a row proposes."""
        return self.task.num_steps

    @property
    def document_multiple(self) -> int:
        """What the span of each document must be a multiple of."""
        return document_multiple(self.context_group)

    @property
    def row_multiple(self) -> int:
        """What the number of rows must be a multiple of."""
        return row_multiple(self.context_group, self.base.tp)

    def __call__(self, batch: Batch) -> LossOutput | None:
        """Sums over the batch's rows on this context-parallel rank; ``None`` on all but the last stage.

        Every rank of the model must call with the same batch. The base runs without autograd: where it is trained too,
        this is for validation, and `run_stage` for training.
        """
        assert not (self.task.trains_base and torch.is_grad_enabled()), "a base that is trained runs by run_stage"
        documents, features = self.run_base(batch)
        return None if features is None else self._judge(batch, documents, features)

    def run_stage(self, batch: Batch) -> LossOutput | Tensor:
        """This stage's part of the training of both, under megatron-core's schedule.

        The schedule has handed what the stage before returned to the model (``set_input_tensor``).

        Returns:
            The sums on the last stage; on others what the next one needs.
        """
        documents = self._documents(batch)
        output = self.base.run_stage(
            batch.token_ids[None],
            self.base.model.decoder.input_tensor,
            aux_layer_ids=self.task.aux_layer_ids,
            documents=documents,
        )
        return self._judge(batch, documents, output) if isinstance(output, Features) else output

    def follow_base(self) -> None:
        """Take anew what was made from weights of the base; behind each of its updates, on every rank of the model."""
        if not self.task.trains_base:
            return
        if reads_tokens(self.base.model):
            self.base.copy_embedding_to_last_stage()
        self._make_objective()

    def _make_objective(self) -> None:
        if self.draft is not None:
            self.objective = self.task.make_objective(self.base, self.draft, recompute=self.recompute)

    def _judge(self, batch: Batch, documents: Documents, features: Features) -> LossOutput:
        assert self.objective is not None
        return outcome_of(self.task, self.objective, self.base, batch, documents, features)

    def run_base(self, batch: Batch) -> BaseRun:
        """The base alone; every stage of the model takes part."""
        documents = self._documents(batch)
        return BaseRun(documents, self.features(batch, documents))

    def _documents(self, batch: Batch) -> Documents:
        return Documents(batch.bounds, lengths=batch.lengths, group=self.context_group)


def check_trainable(record: CheckpointRecord) -> Task:
    """Refuse a checkpoint whose draft `DraftStep` would refuse, before any weight is read.

    Returns:
        What its training takes.

    Raises:
        ConfigError: there is no draft.
        UnsupportedError: a draft or an option whose training is not built.
    """
    if record.conversion is None:
        raise ConfigError(f"the checkpoint of {record.identity.source} has no draft; attach one first (convert)")
    algorithm = find_algorithm(record.conversion.algorithm)
    return algorithm.task(algorithm.config_class.parse(record.conversion.config))


def _mark_shards(module: nn.Module) -> None:
    """Tell megatron-core which parameters are cut over the tensor-parallel group.

    It counts every other parameter once, on the first rank, when its optimizer takes the gradient's norm.
    """
    for entry in sharded_tensors(module):
        if isinstance(entry.tensor, nn.Parameter) and "tensor_model_parallel" not in vars(entry.tensor):
            is_cut = entry.shard.dim is not None
            set_tensor_model_parallel_attributes(entry.tensor, is_cut, entry.shard.dim or 0, 1)

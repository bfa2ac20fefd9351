"""One micro-batch: base forward, then the draft's objective. The caller runs backward and the optimizer."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from mcore_spec.bases.features import Features, features_for
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.conversion import conversion_of, find_algorithm
from mcore_spec.data.batch import Batch
from mcore_spec.drafts.draft import Draft
from mcore_spec.errors import ConfigError
from mcore_spec.losses.outcome import LossOutput
from mcore_spec.objectives.objective import Objective, Task
from mcore_spec.objectives.rows import teacher_rows
from mcore_spec.parallel.collectives import Group, gather_without_grad
from mcore_spec.parallel.documents import Documents
from mcore_spec.parallel.sharding import sharded_tensors
from mcore_spec.parallel.tensor_parallel import SEQUENCE_DIM
from mcore_spec.quantization.installed import quantization_of, unquantized

Teacher: TypeAlias = Literal["as_loaded", "unquantized"]


class LinearRows(NamedTuple):
    """What the draft reads, [n, f + h], and the base's next last hidden state, [n, h]."""

    inputs: Tensor
    targets: Tensor


class BaseRun(NamedTuple):
    """The documents of a batch, seen from this rank, and the base's features of its rows, on the last stage."""

    documents: Documents
    features: Features | None


class DraftStep:
    """The loss of a converted model on a batch. Holds what does not change between batches."""

    def __init__(self, model: GPTModel, *, recompute: bool = False, teacher: Teacher = "as_loaded") -> None:
        """Look at the conversion.

        Args:
            model: this rank's part, converted.
            recompute: compute the activations of each step again in backward.
            teacher: "unquantized": of a quantised base, what it was before is the teacher.

        Raises:
            ConfigError: a model without a draft, or an unquantised teacher of a model that is not quantised.
            UnsupportedError: a draft or an option whose training is not built.
        """
        conversion = conversion_of(model)
        if conversion is None:
            raise ConfigError("the model has no draft; attach one first (convert)")
        if teacher == "unquantized" and quantization_of(model) is None:
            raise ConfigError("teacher = unquantized, but the model is not quantised; leave it out")
        self.task = find_algorithm(conversion.algorithm).task(conversion.config)
        self.base, self.teacher = MegatronBase(model), teacher
        self.context_group: Group = model.pg_collection.cp
        self.draft = self.base.draft()
        self.objective: Objective | None = None
        if self.draft is not None:
            self.objective = self.task.make_objective(self.base, self.draft, recompute=recompute)
            _mark_shards(self.draft)

    @property
    def num_steps(self) -> int:
        """Tokens that a row proposes."""
        return self.task.num_steps

    @property
    def document_multiple(self) -> int:
        """What the span of each document must be a multiple of."""
        size = dist.get_world_size(self.context_group)
        return 1 if size == 1 else 2 * size

    @property
    def row_multiple(self) -> int:
        """What the number of rows must be a multiple of: under sequence parallelism they are shared out too."""
        tp = self.base.tp
        return dist.get_world_size(self.context_group) * (tp.size if tp.sequence_parallel else 1)

    def __call__(self, batch: Batch) -> LossOutput | None:
        """Sums over the batch's rows on this context-parallel rank; ``None`` on all but the last stage.

        Every rank of the model must call with the same batch.
        """
        documents, features = self._run_base(batch)
        if features is None:
            return None
        assert self.objective is not None
        return self.objective(batch, documents, features)

    @torch.no_grad()
    def linear_rows(self, batch: Batch) -> LinearRows | None:
        """What a least-squares start learns from: this context-parallel rank's rows that count at step 0."""
        documents, features = self._run_base(batch)
        if features is None:
            return None
        assert self.draft is not None
        embedding = self.base.embed(documents.take(batch.step_token_ids, 1)[:1])
        inputs = self.draft.linear_inputs(features_for(self.draft, features), embedding)
        if self.base.tp.sequence_parallel:
            inputs = gather_without_grad(inputs, SEQUENCE_DIM, self.base.tp.group)
        rows = documents.take(batch.counted, 1)[0].nonzero()[:, 0]
        following = documents.row_index.to(rows.device)[rows] + 1
        return LinearRows(inputs[rows, 0], teacher_rows(features, documents, self.base.tp)[following])

    def _run_base(self, batch: Batch) -> BaseRun:
        """Every stage of the model takes part."""
        documents = Documents(batch.bounds, lengths=batch.lengths, group=self.context_group)
        token_ids = batch.token_ids[None]
        features = self.base.features(token_ids, aux_layer_ids=self.task.aux_layer_ids, documents=documents)
        if self.teacher == "unquantized":
            with unquantized(self.base.model):
                before = self.base.features(token_ids, documents=documents)
            if features is not None and before is not None:
                features = features._replace(teacher=before.last)
        return BaseRun(documents, features)


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


def _mark_shards(draft: Draft) -> None:
    """Tell megatron-core which parameters are cut over the tensor-parallel group.

    It counts every other parameter once, on the first rank, when its optimizer takes the gradient's norm.
    """
    for entry in sharded_tensors(draft):
        if isinstance(entry.tensor, nn.Parameter) and "tensor_model_parallel" not in vars(entry.tensor):
            is_cut = entry.shard.dim is not None
            set_tensor_model_parallel_attributes(entry.tensor, is_cut, entry.shard.dim or 0, 1)

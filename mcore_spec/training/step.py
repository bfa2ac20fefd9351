"""One micro-batch: base forward, draft forward, loss. The caller runs backward and the optimizer."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from mcore_spec.bases.features import Features
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.config import EagleConfig
from mcore_spec.conversion import conversion_of, find_algorithm
from mcore_spec.data.batch import Batch
from mcore_spec.drafts.draft import Draft, draft_to_target
from mcore_spec.drafts.eagle3 import Eagle3Draft
from mcore_spec.drafts.steps import Mixing
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.losses.fused import distillation_loss
from mcore_spec.losses.outcome import LossOutput
from mcore_spec.losses.vocabulary import Vocabulary
from mcore_spec.parallel.collectives import Group, gather_without_grad
from mcore_spec.parallel.documents import Documents
from mcore_spec.parallel.sharding import sharded_tensors
from mcore_spec.parallel.tensor_parallel import SEQUENCE_DIM


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

    def __init__(self, model: GPTModel, *, recompute: bool = False) -> None:
        """Look at the conversion.

        Args:
            model: this rank's part, converted.
            recompute: compute the activations of each TTT step again in backward.

        Raises:
            ConfigError: a model without a draft.
            UnsupportedError: a draft or an option whose training is not built.
        """
        conversion = conversion_of(model)
        if conversion is None:
            raise ConfigError("the model has no draft; attach one first (convert)")
        self.config = _trainable(conversion.config)
        self.base, self.recompute = MegatronBase(model), recompute
        self.context_group: Group = model.pg_collection.cp
        self.draft = self.base.draft()
        assert self.draft is None or isinstance(self.draft, Eagle3Draft)
        self.aux_layer_ids = self.config.eagle_architecture_config.eagle_aux_hidden_state_layer_ids
        self.vocabulary = None if self.draft is None else _vocabulary(self.base, self.draft)
        if self.draft is not None:
            _mark_shards(self.draft)

    @property
    def num_steps(self) -> int:
        """TTT steps."""
        return self.config.eagle_ttt_steps

    @property
    def mixes_hidden_states(self) -> bool:
        """Whether batches to train on must say which rows read the draft's own state."""
        return self.config.eagle_mix_hidden_states

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
        assert self.draft is not None
        assert self.vocabulary is not None
        step_token_ids = documents.take(batch.step_token_ids, 1)
        embeddings = [self.base.embed(token_ids[None]) for token_ids in step_token_ids]
        assert features.aux is not None
        mixing = self._mixing(batch, documents)
        outputs = self.draft(features.aux, embeddings, documents=documents, recompute=self.recompute, mixing=mixing)
        tp = self.base.tp
        return distillation_loss(
            [tp.enter(output.hidden)[:, 0] for output in outputs],
            self._teacher(features, documents),
            position=documents.row_index.to(batch.token_ids.device),
            counted=documents.take(batch.counted, 1),
            vocabulary=self.vocabulary,
            decay=self.config.eagle_loss_decay_factor,
            keep_out_of_vocabulary=self.config.eagle_keep_out_of_vocabulary,
            labels=None if self.config.eagle_self_logit_distillation else documents.take(batch.labels, 1),
        )

    @torch.no_grad()
    def linear_rows(self, batch: Batch) -> LinearRows | None:
        """What a least-squares start learns from: this context-parallel rank's rows that count at step 0."""
        documents, features = self._run_base(batch)
        if features is None:
            return None
        assert self.draft is not None
        assert features.aux is not None
        embedding = self.base.embed(documents.take(batch.step_token_ids, 1)[:1])
        inputs = self.draft.linear_inputs(features.aux, embedding)
        if self.base.tp.sequence_parallel:
            inputs = gather_without_grad(inputs, SEQUENCE_DIM, self.base.tp.group)
        rows = documents.take(batch.counted, 1)[0].nonzero()[:, 0]
        following = documents.row_index.to(rows.device)[rows] + 1
        return LinearRows(inputs[rows, 0], self._teacher(features, documents)[following])

    def _run_base(self, batch: Batch) -> BaseRun:
        """Every stage of the model takes part."""
        documents = Documents(batch.bounds, lengths=batch.lengths, group=self.context_group)
        features = self.base.features(batch.token_ids[None], aux_layer_ids=self.aux_layer_ids, documents=documents)
        return BaseRun(documents, features)

    def _mixing(self, batch: Batch, documents: Documents) -> Mixing | None:
        """How states are mixed; not in validation, which measures what an engine will compute."""
        if not (self.config.eagle_mix_hidden_states and torch.is_grad_enabled()):
            return None
        if batch.replaced is None:
            raise ConfigError(
                "eagle_mix_hidden_states = true, but the batch does not say which rows are mixed; give make_batch "
                "mixing = one random generator a document"
            )
        return Mixing(documents.take(batch.replaced, 1), documents, self.base.tp)

    def _teacher(self, features: Features, documents: Documents) -> Tensor:
        """The base's last hidden states of the whole row, [rows, h]; its logits are computed block by block."""
        last = features.last
        if self.base.tp.sequence_parallel:
            last = gather_without_grad(last, SEQUENCE_DIM, self.base.tp.group)
        return documents.join(last, with_grad=False)[:, 0]


def check_trainable(record: CheckpointRecord) -> None:
    """Refuse a checkpoint whose draft `DraftStep` would refuse, before any weight is read.

    Raises:
        ConfigError: there is no draft.
        UnsupportedError: a draft or an option whose training is not built.
    """
    if record.conversion is None:
        raise ConfigError(f"the checkpoint of {record.identity.source} has no draft; attach one first (convert)")
    config_class = find_algorithm(record.conversion.algorithm).config_class
    _trainable(config_class.parse(record.conversion.config))


def _trainable(config: object) -> EagleConfig:
    if not isinstance(config, EagleConfig) or config.algorithm != "eagle3":
        raise UnsupportedError("the draft is not EAGLE-3: training of other drafts is not built yet")
    if not config.eagle_freeze_base_model:
        raise UnsupportedError("eagle_freeze_base_model = false: training the base too is not built yet")
    return config


def _mark_shards(draft: Draft) -> None:
    """Tell megatron-core which parameters are cut over the tensor-parallel group.

    It counts every other parameter once, on the first rank, when its optimizer takes the gradient's norm.
    """
    for entry in sharded_tensors(draft):
        if isinstance(entry.tensor, nn.Parameter) and "tensor_model_parallel" not in vars(entry.tensor):
            is_cut = entry.shard.dim is not None
            set_tensor_model_parallel_attributes(entry.tensor, is_cut, entry.shard.dim or 0, 1)


@torch.no_grad()
def _vocabulary(base: MegatronBase, draft: Eagle3Draft) -> Vocabulary:
    """The heads of both sides; every rank of the last stage's tensor-parallel group must call."""
    head = base.head_weight()
    own = None if draft.lm_head is None else draft.lm_head.weight
    target = draft_to_target(draft) if draft.has_reduced_vocabulary else None
    teacher_rows = None
    if own is not None and base.tp.size > 1 and (target is not None or own.shape != head.shape):
        # The base's rows of these entries lie on other ranks.
        assert draft.lm_head is not None
        first, num_rows = draft.lm_head.first_row, draft.lm_head.num_valid_rows()
        teacher_rows = base.head_rows(draft.head_token_ids(), first=first, stop=first + num_rows)
    return Vocabulary(
        teacher_head=head,
        vocab_size=base.architecture.vocab_size,
        student_head=head if own is None else own,
        draft_to_target=target,
        teacher_rows=teacher_rows,
        tp=base.tp,
    )

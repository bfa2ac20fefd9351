"""The base's part of a call: its batch as documents behind each other, and the features of their rows.

What trains a draft (`mcore_spec.hosting.forward`) and what makes its start from data need the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mcore_spec.bases.features import Features
from mcore_spec.bases.transformers import TransformersBase
from mcore_spec.data.batch import Batch, make_batch
from mcore_spec.data.noise import draw_noise_key
from mcore_spec.data.seeds import RandomUse, random_state
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.hosting.key import QUANTIZATION_KEY
from mcore_spec.hosting.rows import TokenBatch, TokenRows, join_shards, read_rows
from mcore_spec.objectives.objective import Task
from mcore_spec.parallel.collectives import Group, group_size
from mcore_spec.parallel.documents import Documents, document_multiple, row_multiple

# Hidden states of the base, where it does not run, beside the arguments of the model's own forward.
LAST_STATES, AUX_STATES = "last_hidden_states", "aux_hidden_states"
# Options of a plain forward that change nothing about the draft's loss.
_WITHOUT_EFFECT = frozenset({"use_cache", "return_dict", "shift_labels"})
_TOKENS = ("input_ids", "labels", "attention_mask", "position_ids")
# What DataCollatorWithFlattening may add for flash attention; position_ids that restart say the same.
_SAID_BY_POSITIONS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})
_READ = frozenset({*_TOKENS, *_WITHOUT_EFFECT, LAST_STATES, AUX_STATES})
_SEED_BITS = 62
# How errors name a base that is trained with its draft.
TRAINS_BASE = "eagle_freeze_base_model = false"


class BaseRun(NamedTuple):
    """A batch, seen from this context-parallel rank, and what the base made of it.

    Attributes:
        tokens: as they were given.
        rows: documents of the whole rows.
        packed: the same behind each other.
        documents: bounds of `packed`, and which of its rows are this rank's.
        features: of this rank's rows, in the dtype of the draft's weights.
    """

    tokens: TokenBatch
    rows: TokenRows
    packed: Batch
    documents: Documents
    features: Features


def run_base(base: TransformersBase, task: Task, call: Mapping[str, Any], *, group: Group) -> BaseRun:
    """Read the batch, and run the base on it unless its hidden states are given.

    Args:
        base: with its draft attached.
        task: of the draft.
        call: arguments of the model's forward by name, labels among them, and `LAST_STATES` and `AUX_STATES`.
        group: ranks that share the rows of the batch.

    Raises:
        ConfigError: a batch that is not understood, or a vocabulary that changed.
        UnsupportedError: given states in a layout that follows the base's layers, or a base that cannot be trained too.
    """
    base.check_vocabulary()
    if task.trains_base:
        _check_trained_base(base, call, group)
    tokens = _token_batch(call)
    rows = _rows(base, join_shards(tokens, group))
    packed = _pack(base, rows, task, group).to(base.device)
    documents = Documents(packed.bounds, lengths=packed.lengths, group=group)
    states = {name: call[name] for name in (AUX_STATES, LAST_STATES) if call.get(name) is not None}
    if states:
        features = _stored(base, states, rows, tokens, task, group)
    else:
        with torch.set_grad_enabled(task.trains_base and torch.is_grad_enabled()):
            features = base.run_stage(packed.token_ids[None], aux_layer_ids=task.aux_layer_ids, documents=documents)
    # The draft computes in the dtype of its weights; autocast, where it is on, is the base's.
    dtype = base.head_weight().dtype
    aux = None if features.aux is None else features.aux.to(dtype)
    return BaseRun(tokens, rows, packed, documents, Features(aux=aux, last=features.last.to(dtype)))


def _check_trained_base(base: TransformersBase, call: Mapping[str, Any], group: Group) -> None:
    """Refuse what the training of a base is not built for.

    Raises:
        ConfigError: hidden states in its place.
        UnsupportedError: a layout that cuts it, or a quantised one.
    """
    given = [name for name in (LAST_STATES, AUX_STATES) if call.get(name) is not None]
    if given:
        raise ConfigError(
            f"{given[0]} given with {TRAINS_BASE}: the base would have to run where it trains; train on tokens alone"
        )
    if group_size(group) > 1 or isinstance(base.model, FSDPModule):
        raise UnsupportedError(
            f"{TRAINS_BASE} under FSDP or context parallelism; train with plain data parallelism, or on a GPTModel "
            "(mcore-spec finetune)"
        )
    if vars(base.model.config).get(QUANTIZATION_KEY) is not None:
        raise UnsupportedError(
            f"{TRAINS_BASE} on a quantised {type(base.model).__name__}, whose scales are those of weights that change; "
            "train first, and quantise then"
        )


def _rows(base: TransformersBase, batch: TokenBatch) -> TokenRows:
    config = base.model.config
    pad, end = config.pad_token_id, config.eos_token_id
    ends = frozenset(end if isinstance(end, list | tuple) else [] if end is None else [end])
    return read_rows(
        batch,
        vocab_size=base.architecture.vocab_size,
        pad_token_id=pad,
        end_token_ids=ends,
        max_positions=base.architecture.max_position_embeddings,
    )


def _pack(base: TransformersBase, rows: TokenRows, task: Task, group: Group) -> Batch:
    """One row of documents; what is drawn comes from torch's generator, whose state Trainer's checkpoints keep."""
    documents = rows.documents
    draws = base.model.training and torch.is_grad_enabled()
    mixing = noise_keys = None
    if draws and (task.mixes_hidden_states or task.draws_noise):
        seed = _draw_seed(group)
        numbers = range(len(documents))
        if task.mixes_hidden_states:
            mixing = [random_state(seed, RandomUse.MIXING, number) for number in numbers]
        if task.draws_noise:
            noise_keys = [draw_noise_key(random_state(seed, RandomUse.NOISE, number)) for number in numbers]
    return make_batch(
        documents,
        num_steps=task.num_steps,
        document_multiple=document_multiple(group),
        row_multiple=row_multiple(group, base.tp),
        num_samples=len(documents),
        mixing=mixing,
        noise_keys=noise_keys,
    )


def _stored(
    base: TransformersBase, given: Mapping[str, Tensor], rows: TokenRows, batch: TokenBatch, task: Task, group: Group
) -> Features:
    """States [b, s, ...] by name -> those of the documents' rows, [tokens, 1, ...].

    Raises:
        ConfigError: states that are missing, of another shape, or not read.
        UnsupportedError: a layout that follows the base's layers.
    """
    if group_size(group) > 1 or isinstance(base.model, FSDPModule):
        raise UnsupportedError(
            f"{LAST_STATES} under FSDP or context parallelism, which follow the base's layers; train on stored "
            "states with plain data parallelism"
        )
    sizes = {LAST_STATES: base.architecture.hidden_size}
    sizes[AUX_STATES] = len(task.aux_layer_ids) * sizes[LAST_STATES]
    places = torch.from_numpy(rows.places).to(base.device)

    if AUX_STATES in given and not task.aux_layer_ids:
        raise ConfigError(f"{AUX_STATES} is given, and this draft reads no aux layers; leave it out")

    def taken(name: str) -> Tensor:
        states, shape = given.get(name), [*batch.input_ids.shape, sizes[name]]
        if states is None or list(states.shape) != shape:
            found = "missing" if states is None else f"of shape {list(states.shape)}"
            raise ConfigError(f"{name} is {found}; this draft reads {shape}, a row for each token")
        return states.to(base.device).flatten(0, 1)[places][:, None]

    aux = taken(AUX_STATES) if task.aux_layer_ids else None
    return Features(aux=aux, last=taken(LAST_STATES))


def _token_batch(call: Mapping[str, Any]) -> TokenBatch:
    """The tokens of a call.

    Raises:
        ConfigError: no token ids, a mask of more than two dimensions, or an option that has no effect here.
    """
    known = _READ if call.get("position_ids") is None else _READ | _SAID_BY_POSITIONS
    ignored = [name for name, value in call.items() if name not in known and _is_set(value)]
    if call.get("input_ids") is None or ignored:
        what = f"{', '.join(ignored)} given beside labels" if ignored else "labels without input_ids"
        raise ConfigError(
            f"{what}: the draft's loss takes input_ids, labels, attention_mask [batch, sequence] and position_ids"
        )
    tokens: dict[str, Any] = {name: call.get(name) for name in _TOKENS}
    return TokenBatch(**tokens)


def _is_set(value: object) -> bool:
    """Whether an option differs from being left out."""
    return isinstance(value, Tensor) or (value is not None and value is not False and value != 0)


def _draw_seed(group: Group) -> int:
    """The same on every rank that shares the rows."""
    seed = torch.randint(2**_SEED_BITS, (1,))
    if group is not None and group_size(group) > 1:
        values: list[Any] = [int(seed)]
        dist.broadcast_object_list(values, src=dist.get_global_rank(group, 0), group=group)
        return int(values[0])
    return int(seed)

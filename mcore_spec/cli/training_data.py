"""What ``finetune`` learns from: conversations for a base that runs here or elsewhere, or stored hidden states."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from mcore_spec.bases.feature_sources import LiveFeatures, StoredFeatures
from mcore_spec.checkpoint.store import Checkpoint
from mcore_spec.cli.conversations import choose_tokenizer, read_conversations
from mcore_spec.cli.terminal import say
from mcore_spec.cli.training_arguments import FinetuneArguments
from mcore_spec.data.document import ConversationSource
from mcore_spec.data.hidden_states.batches import StoreReader
from mcore_spec.data.hidden_states.fit import check_tokenizer_of, open_states
from mcore_spec.data.store import TokenStore
from mcore_spec.errors import ConfigError
from mcore_spec.objectives.objective import Task
from mcore_spec.parallel.layout import run_on_every_rank, run_on_rank_zero
from mcore_spec.training.data import ReadStates
from mcore_spec.training.step import MakeFeatures


class Data(NamedTuple):
    """What a run learns from.

    Attributes:
        source: the conversations.
        make_features: see `DraftStep`.
        read_states: see `Conversations`; ``None``: the base runs, here or on other ranks.
    """

    source: ConversationSource
    make_features: MakeFeatures
    read_states: ReadStates | None = None


def conversations_of(arguments: FinetuneArguments, checkpoint: Checkpoint) -> TokenStore:
    """The tokenised conversations of --data-path, the same on both sides."""
    tokenizer = choose_tokenizer(checkpoint, arguments.tokenizer_model)
    cache_dir = Path(arguments.save) / "data_cache"
    return read_conversations(arguments, checkpoint.record.base, tokenizer, cache_dir=cache_dir)


def find_data(arguments: FinetuneArguments, checkpoint: Checkpoint, task: Task) -> Data:
    """Conversations for a base that runs, or the store of its hidden states.

    Args:
        arguments: of the command.
        checkpoint: that is loaded.
        task: of its draft.

    Raises:
        CheckpointError: a base that cannot run, or a store of another one.
        ConfigError: what `read_conversations` and `open_states` refuse, or a draft that cannot be trained so.
    """
    if arguments.extract_ranks is not None:
        return _streamed_data(arguments, checkpoint, task)
    if arguments.offline_distillation_data is None or arguments.eval_acceptance_interval is not None:
        what = "--data-path" if arguments.offline_distillation_data is None else "--eval-acceptance-interval"
        remedy = "give --offline-distillation-data; measure with validate --base HF_DIRECTORY --draft EXPORT"
        checkpoint.record.check_has_layers(what, remedy=remedy)
    if arguments.offline_distillation_data is None:
        return Data(conversations_of(arguments, checkpoint), LiveFeatures)
    path = Path(arguments.offline_distillation_data)
    name = "offline_distillation_data"
    _check_frozen(task, f"{name} = {path}")
    checkpoint.record.check_not_quantized(
        f"{name} = {path} has hidden states of a base that is not", remedy="train on --data-path"
    )
    base, identity = checkpoint.record.base, checkpoint.record.identity
    store = run_on_every_rank(lambda: open_states(path, base, identity, aux_layer_ids=task.aux_layer_ids, name=name))
    about = store.description
    if "seq_length" in arguments.model_fields_set and arguments.seq_length != about.seq_length:
        raise ConfigError(
            f"--seq-length {arguments.seq_length}, but {path} was extracted with {about.seq_length}; give that, or "
            "leave the flag out"
        )
    own = checkpoint.tokenizer_path if any(checkpoint.tokenizer_path.glob("*")) else None
    compared = arguments.tokenizer_model or own
    if compared is not None:
        run_on_rank_zero(lambda: check_tokenizer_of(store, compared, name=name))
    say(
        f"hidden states: {len(store):,} conversations, {int(store.lengths.sum()):,} tokens, {store.num_bytes:,} bytes; "
        f"by {about.backend} in {about.dtype}, aux layers {', '.join(map(str, about.aux_layer_ids)) or 'none'}"
    )
    return Data(
        store,
        partial(StoredFeatures, last_is_normed=about.last_is_normed),
        lambda _model, step: StoreReader(store, aux_layer_ids=step.task.aux_layer_ids),
    )


def _streamed_data(arguments: FinetuneArguments, checkpoint: Checkpoint, task: Task) -> Data:
    """Conversations for a base that runs on other ranks."""
    what = f"extract_ranks = {arguments.extract_ranks}"
    _check_frozen(task, what)
    remedy = "leave --extract-ranks out"
    checkpoint.record.check_not_quantized(f"{what} takes the states of a base that is not", remedy=remedy)
    return Data(conversations_of(arguments, checkpoint), partial(StoredFeatures, last_is_normed=True))


def _check_frozen(task: Task, what: str) -> None:
    if task.trains_base:
        raise ConfigError(
            f"{what}: the base would have to run where it trains, and this draft's configuration has "
            "eagle_freeze_base_model = false; train on --data-path alone"
        )

"""Whether a store of hidden states is one that a draft can learn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mcore_spec.config import BaseArchitecture, BaseIdentity
from mcore_spec.data.chat import ChatEncoder, load_tokenizer
from mcore_spec.data.hidden_states.store import StatesStore
from mcore_spec.errors import CheckpointError, ConfigError


def open_states(
    path: Path, base: BaseArchitecture, identity: BaseIdentity, *, aux_layer_ids: Sequence[int], name: str
) -> StatesStore:
    """The store that a draft is to learn from.

    Args:
        path: of its directory.
        base: that the draft is attached to.
        identity: of that base.
        aux_layer_ids: which the draft reads.
        name: what the user calls the path.

    Raises:
        CheckpointError: no store, a damaged one, or one of another base.
        ConfigError: layers that are not in it.
    """
    store = StatesStore(path)
    description, where = store.description, f"{name} = {path}"
    of_base = {
        "base_fingerprint": (description.base_fingerprint, identity.fingerprint),
        "hidden_size": (description.hidden_size, base.hidden_size),
        "vocab_size": (description.vocab_size, base.vocab_size),
    }
    for field, (there, here) in of_base.items():
        if there != here:
            raise CheckpointError(
                f"{where} was extracted from another base: its {field} is {there!r} ({description.source}), of the one "
                f"that the draft is attached to {here!r} ({identity.source}); extract with that"
            )
    missing = sorted(set(aux_layer_ids) - set(description.aux_layer_ids))
    if missing:
        raise ConfigError(
            f"{where} has aux layers {list(description.aux_layer_ids)}, the draft reads {list(aux_layer_ids)}; extract "
            "with --aux-layer-ids, or with a checkpoint that has the draft"
        )
    return store


def check_tokenizer_of(store: StatesStore, tokenizer: str | Path, *, name: str) -> None:
    """Refuse a store whose conversations another tokenizer or chat template made.

    Args:
        store: of hidden states.
        tokenizer: directory or hub id.
        name: what the user calls the store's path.

    Raises:
        CheckpointError: names both.
    """
    here, there = ChatEncoder(load_tokenizer(tokenizer)).fingerprint(), store.description.tokenizer_fingerprint
    if here != there:
        raise CheckpointError(
            f"{name} = {store.directory}: its conversations were made with another tokenizer or chat template: its "
            f"fingerprint is {there}, that of {tokenizer} {here}; extract with this one"
        )

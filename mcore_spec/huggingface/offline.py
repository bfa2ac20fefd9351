"""Stored hidden states for transformers' Trainer: a dataset that reads them, and a collator that hands them over."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from mcore_spec.bases.transformers import TransformersBase
from mcore_spec.data.document import Document
from mcore_spec.data.hidden_states import StatesStore
from mcore_spec.hosting.base_run import AUX_STATES, LAST_STATES
from mcore_spec.huggingface.data import DraftCollator


class StoredDocument(NamedTuple):
    """A conversation and what the base made of it.

    Attributes:
        document: tokens and mask.
        aux: outputs of the aux layers that the draft reads, joined, [tokens, n h]; ``None`` where it reads none.
        last: output of the last layer behind the final norm, [tokens, h].
    """

    document: Document
    aux: Tensor | None
    last: Tensor


class StatesDataset(Dataset[StoredDocument]):
    """Conversations of a store with their hidden states, by number. Workers of a DataLoader read ahead."""

    def __init__(self, store: StatesStore, base: TransformersBase, *, aux_layer_ids: Sequence[int]) -> None:
        """Take a store that fits (`open_states`).

        Args:
            store: of hidden states.
            base: has the final norm, which is copied where the states of the last layer did not go through it.
            aux_layer_ids: which the draft reads, ascending.
        """
        self.store, self._aux_layer_ids = store, tuple(aux_layer_ids)
        self._norm = None if store.description.last_is_normed else deepcopy(base.final_norm).cpu()

    def __len__(self) -> int:
        return len(self.store)

    @torch.no_grad()
    def __getitem__(self, index: int) -> StoredDocument:
        states = self.store.states(index, aux_layer_ids=self._aux_layer_ids)
        document = Document(states.token_ids.numpy(), states.loss_mask.numpy())
        aux = states.aux.flatten(1) if self._aux_layer_ids else None
        last = states.last if self._norm is None else self._norm(states.last)
        return StoredDocument(document, aux, last)


class StatesCollator:
    """What `DraftCollator` makes of the conversations, with their hidden states padded to the same length."""

    def __init__(self) -> None:
        """Nothing is kept between batches."""
        self._tokens = DraftCollator()

    def __call__(self, stored: Sequence[StoredDocument]) -> dict[str, Tensor]:
        """`DraftCollator`'s tensors, and states [documents, longest, ...] under the names that the forward takes."""
        batch = self._tokens([each.document for each in stored])
        batch[LAST_STATES] = pad_sequence([each.last for each in stored], batch_first=True)
        aux = [each.aux for each in stored if each.aux is not None]
        if aux:
            batch[AUX_STATES] = pad_sequence(aux, batch_first=True)
        return batch

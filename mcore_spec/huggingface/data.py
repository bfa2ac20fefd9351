"""Tokenised conversations for transformers' Trainer: a dataset of documents, and a collator that pads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mcore_spec.data.batch import make_batch
from mcore_spec.data.document import Document, DocumentSource
from mcore_spec.hosting.rows import NO_LABEL


class ConversationDataset(Dataset[Document]):
    """Documents of a store, by number."""

    def __init__(self, source: DocumentSource, indices: Sequence[int] | None = None) -> None:
        """Take some of the documents.

        Args:
            source: a `TokenStore`.
            indices: which; ``None``: all.
        """
        self.source = source
        self.indices = range(len(source.lengths)) if indices is None else [int(index) for index in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Document:
        return self.source.document(self.indices[index])


class DraftCollator:
    """Pads documents to one length, and marks what counts so that Trainer divides by exactly that.

    Trainer counts ``shift_labels`` where a batch has them. Here they are set at the rows that enter a draft's loss at
    its first step, so that the loss is the mean over them, over all micro-batches and ranks.
    """

    def __init__(self, *, multiple: int = 1) -> None:
        """Say what lengths are a multiple of.

        Args:
            multiple: twice the context-parallel size under context parallelism.
        """
        self.multiple = multiple

    def __call__(self, documents: Sequence[Document]) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels and shift_labels, int64 [documents, longest]."""
        longest = max(len(document.token_ids) for document in documents)
        width = -(-longest // self.multiple) * self.multiple
        batch = make_batch(documents, num_steps=1, num_samples=len(documents), pad_to=width)
        shape = (len(documents), width)
        mask, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, NO_LABEL)
        for row, (token_ids, is_label) in enumerate(documents):
            mask[row, : len(token_ids)] = 1
            own = torch.from_numpy(token_ids)
            labels[row, : len(token_ids)] = own.masked_fill(~torch.from_numpy(is_label), NO_LABEL)
        return {
            "input_ids": batch.token_ids.unflatten(0, shape),
            "attention_mask": mask,
            "labels": labels,
            "shift_labels": batch.labels[0].masked_fill(~batch.counted[0], NO_LABEL).unflatten(0, shape),
        }

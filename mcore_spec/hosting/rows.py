"""A batch as transformers' Trainer has it -> documents behind each other, without padding.

``labels[j] != -100`` marks token j as one that the base should produce; where it is set it is ``input_ids[j]``. What
row t reads and predicts follows from that in `mcore_spec.data.batch`, which owns every shift.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mcore_spec.data.document import Document, IntArray
from mcore_spec.errors import ConfigError
from mcore_spec.parallel.collectives import Group, gather_without_grad, group_size

# transformers' mark of a position without a label.
NO_LABEL = -100
SEQUENCE_DIM = 1


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """What the model's forward is given; each [b, s].

    Attributes:
        input_ids: tokens.
        labels: the same tokens where the base should produce them, `NO_LABEL` elsewhere.
        attention_mask: 0 in padding, at either end; ``None``: there is none.
        position_ids: 0 where a document begins; ``None``: each row is one document.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse shapes that do not fit.

        Raises:
            ConfigError: names the tensor.
        """
        shape = tuple(self.input_ids.shape)
        if len(shape) != 2:
            raise ConfigError(f"input_ids has shape {list(shape)}; give [batch, sequence]")
        for name in ("labels", "attention_mask", "position_ids"):
            tensor = vars(self)[name]
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ConfigError(
                    f"{name} has shape {list(tensor.shape)}, input_ids {list(shape)}; give one value a token"
                )


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """The documents of a batch.

    Attributes:
        documents: in the order of the batch.
        places: where each of their tokens stands in the batch laid flat, int64 [tokens].
    """

    documents: list[Document]
    places: IntArray


def read_rows(
    batch: TokenBatch,
    *,
    vocab_size: int,
    pad_token_id: int | None,
    end_token_ids: frozenset[int],
    max_positions: int,
) -> TokenRows:
    """Documents of a batch; its tensors are copied to the host once.

    Args:
        batch: whole rows.
        vocab_size: of the model.
        pad_token_id: of the model, to notice padding that nothing marks.
        end_token_ids: of the model; a sequence may end in one of them.
        max_positions: of the model.

    Raises:
        ConfigError: tokens that the model does not have, more of them than it has positions, padding without a mask, a
            mask with holes or of other numbers than 0 and 1, positions that neither go on nor restart, labels that are
            not the tokens, or nothing but padding.
    """
    token_ids, labels = (tensor.cpu().numpy().astype(np.int64) for tensor in (batch.input_ids, batch.labels))
    mask = None if batch.attention_mask is None else _read_mask(batch.attention_mask)
    positions = None if batch.position_ids is None else batch.position_ids.cpu().numpy()
    has_label = labels != NO_LABEL
    wrong = np.argwhere(has_label & (labels != token_ids))
    if len(wrong):
        row, place = wrong[0]
        raise ConfigError(
            f"labels[{row}, {place}] = {labels[row, place]} and input_ids[{row}, {place}] = {token_ids[row, place]}; "
            f"labels are the tokens themselves, not shifted, and {NO_LABEL} where nothing is learned"
        )
    unknown = np.argwhere(((token_ids < 0) | (token_ids >= vocab_size)) & (True if mask is None else mask))
    if len(unknown):
        row, place = unknown[0]
        raise ConfigError(
            f"input_ids[{row}, {place}] = {token_ids[row, place]}, and the model's vocabulary has {vocab_size} tokens; "
            "tokenise with the tokenizer of this model"
        )
    if mask is None:
        _refuse_unmarked_padding(token_ids, has_label, pad_token_id, end_token_ids)
    elif (has_label & ~mask).any():
        row, place = np.argwhere(has_label & ~mask)[0]
        raise ConfigError(f"labels[{row}, {place}] is set where attention_mask is 0; set it to {NO_LABEL}")
    documents, places = [], []
    for row in range(len(token_ids)):
        for start, stop in _documents_of(row, token_ids.shape[1], mask, positions):
            if stop - start > max_positions:
                raise ConfigError(
                    f"input_ids[{row}] has {stop - start} tokens in a document, and the model has {max_positions} "
                    "positions; cut them"
                )
            documents.append(Document(token_ids[row, start:stop], has_label[row, start:stop]))
            places.append(np.arange(start, stop) + row * token_ids.shape[1])
    if not documents:
        raise ConfigError("attention_mask is 0 everywhere: the batch is padding alone; leave such batches out")
    return TokenRows(documents=documents, places=np.concatenate(places))


def _read_mask(attention_mask: Tensor) -> np.ndarray:
    """Where a token is, bool [b, s]."""
    values = attention_mask.cpu().numpy()
    odd = np.argwhere((values != 0) & (values != 1))
    if len(odd):
        row, place = odd[0]
        raise ConfigError(
            f"attention_mask[{row}, {place}] = {values[row, place]}; give 1 for a token and 0 for padding, and "
            "position_ids that restart at 0 where a row holds several documents"
        )
    mask: np.ndarray = values != 0
    return mask


def _refuse_unmarked_padding(
    token_ids: IntArray, has_label: np.ndarray, pad_token_id: int | None, end_token_ids: frozenset[int]
) -> None:
    """Rows end in padding where they repeat the padding token, or an end token where the model names no other.

    A row's own end may be such a token once: an end token, or one that is to be learned.
    """
    candidates = end_token_ids if pad_token_id is None else {pad_token_id}
    name = "eos_token_id" if pad_token_id is None else "pad_token_id"
    for row, tokens in enumerate(token_ids):
        last = int(tokens[-1]) if len(tokens) else None
        if last not in candidates:
            continue
        filled = np.flatnonzero(tokens != last)
        num_padding = len(tokens) - (filled[-1] + 1 if len(filled) else 0)
        if num_padding > (1 if last in end_token_ids or has_label[row, -1] else 0):
            raise ConfigError(
                f"input_ids[{row}] ends in {num_padding} times {name} = {last}, and there is no attention_mask; give "
                "one (a collator with padding makes it), or leave the padding out"
            )


def _documents_of(
    row: int, length: int, mask: np.ndarray | None, positions: np.ndarray | None
) -> Iterator[tuple[int, int]]:
    """Bounds of the documents in one row."""
    start, stop = 0, length
    if mask is not None:
        filled = np.flatnonzero(mask[row])
        if len(filled) == 0:
            return
        start, stop = int(filled[0]), int(filled[-1]) + 1
        if len(filled) != stop - start:
            hole = start + int(np.flatnonzero(~mask[row, start:stop])[0])
            raise ConfigError(
                f"attention_mask[{row}, {hole}] = 0 between tokens: padding stands at the ends of a row; separate "
                "documents by position_ids that restart at 0"
            )
    if positions is None:
        yield start, stop
        return
    own = positions[row, start:stop]
    begins = np.flatnonzero(own[1:] == 0) + 1
    going_on = np.delete(np.diff(own), begins - 1)
    if (going_on != 1).any():
        place = start + 1 + int(np.flatnonzero((np.diff(own) != 1) & (own[1:] != 0))[0])
        raise ConfigError(
            f"position_ids[{row}, {place}] = {positions[row, place]} behind {positions[row, place - 1]}; positions go "
            "up by one, and are 0 where a document begins"
        )
    bounds = [start, *(start + begins).tolist(), stop]
    yield from zip(bounds[:-1], bounds[1:], strict=True)


def join_shards(batch: TokenBatch, group: Group) -> TokenBatch:
    """The whole rows of a batch whose columns are shared out over context-parallel ranks, in whatever order.

    Raises:
        ConfigError: positions that do not say where each column belongs.
    """
    if group_size(group) == 1:
        return batch
    if batch.position_ids is None:
        raise ConfigError(
            "position_ids are missing under context parallelism, where they say which tokens a rank has; Trainer "
            "makes them"
        )
    tensors = {name: tensor for name, tensor in vars(batch).items() if tensor is not None}
    whole = {name: gather_without_grad(tensor, SEQUENCE_DIM, group) for name, tensor in tensors.items()}
    order = whole["position_ids"].argsort(dim=SEQUENCE_DIM, stable=True)
    sorted_positions = whole["position_ids"].gather(SEQUENCE_DIM, order)
    expected = torch.arange(order.shape[1], device=order.device).expand_as(order)
    if not torch.equal(sorted_positions, expected):
        raise ConfigError(
            f"position_ids of the {group_size(group)} context-parallel ranks do not make up 0 to {order.shape[1] - 1}; "
            "give each rank its part of rows of one document each (Trainer does)"
        )
    return replace(batch, **{name: tensor.gather(SEQUENCE_DIM, order) for name, tensor in whole.items()})

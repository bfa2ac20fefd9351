"""The EAGLE-3 training objective, row by row, one document at a time, one process.

Rows, masks, teacher, vocabulary policy, decay and normalisation are spelled out for a single row; nothing is
packed, batched, chunked or sharded. The drafts are `tests.reference.drafts`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference.drafts import Shape, Weights, eagle3, eagle3_mixed


class Document(NamedTuple):
    """Tokens of a conversation, which of them the base should produce, and the base's hidden states."""

    token_ids: list[int]
    mask: list[bool]
    aux: Tensor
    """[s, n*h], outputs of the aux layers, joined."""
    last: Tensor
    """[s, h], after the final norm."""
    replaced: list[list[bool]]
    """[K - 1][s], which rows read the draft's own state after each step, where states are mixed."""


class Objective(NamedTuple):
    """Sums over every row of every document; `loss` is divided by the rows that count at step 0."""

    loss: Tensor
    rows: list[int]
    judged: list[int]
    correct: list[int]
    accepted: int


def eagle3_objective(
    documents: Sequence[Document],
    weights: Weights,
    shape: Shape,
    *,
    embedding: Tensor,
    head: Tensor,
    num_steps: int,
    decay: float,
    target_ids: list[int] | None = None,
    hard_labels: bool = False,
    keep_out_of_vocabulary: bool = False,
    mixes_states: bool = False,
) -> Objective:
    """Loss and statistics of one optimizer step.

    `target_ids` are the base ids of the draft vocabulary, in order; without them it is the base's, and the
    draft's head is the base's unless it has its own weights.
    """
    total: Tensor = head.new_zeros(())
    rows, judged, correct, accepted = [0] * num_steps, [0] * num_steps, [0] * num_steps, 0
    ids = list(range(head.shape[0])) if target_ids is None else target_ids
    own_head = None if "lm_head.weight" in weights else head
    for document in documents:
        tokens, mask, length = document.token_ids, document.mask, len(document.token_ids)
        inputs = [[tokens[t + 1 + k] if t + 1 + k < length else 0 for t in range(length)] for k in range(num_steps)]
        embeddings = [embedding[torch.tensor(step)][:, None] for step in inputs]
        aux = document.aux[:, None]
        if mixes_states:
            outputs = eagle3_mixed(weights, shape, aux, embeddings[0], own_head, document.replaced)
        else:
            outputs = eagle3(weights, shape, aux, embeddings, own_head)
        for t in range(length):
            is_alive = True
            for k in range(num_steps):
                target = t + 2 + k
                if target >= length or not (mask[t + 1] and mask[target]):
                    is_alive = False
                    continue
                teacher = F.linear(document.last[t + 1 + k], head)
                # Mixed, the row that reads x[t+1+k] is row t + k at every step.
                student = outputs[k].logits[t + k if mixes_states else t, 0]
                best = int(teacher.argmax())
                judged[k] += 1
                if ids[int(student.argmax())] == best:
                    correct[k] += 1
                    accepted += int(is_alive)
                else:
                    is_alive = False
                log_q = student.log_softmax(0)
                if hard_labels:
                    if tokens[target] not in ids:
                        continue
                    row_loss = -log_q[ids.index(tokens[target])]
                else:
                    if best not in ids and not keep_out_of_vocabulary:
                        continue
                    p = teacher[torch.tensor(ids)].softmax(0)
                    row_loss = -(p * log_q).sum()
                rows[k] += 1
                total = total + decay**k * row_loss
    return Objective(total / max(judged[0], 1), rows, judged, correct, accepted)

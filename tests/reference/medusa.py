"""The Medusa training objective, row by row, one document at a time, one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from tests.reference.drafts import Weights, medusa


class Document(NamedTuple):
    """Tokens of a conversation, which of them the base should produce, and the base's last hidden states."""

    token_ids: list[int]
    mask: list[bool]
    last: Tensor
    """[s, h], after the final norm."""


class Objective(NamedTuple):
    """Sums over every row of every document, by head; `loss` is divided by the rows that count at head 0."""

    loss: Tensor
    rows: list[int]
    correct: list[int]
    accepted: int


def medusa_objective(
    documents: Sequence[Document],
    weights: Weights,
    *,
    head: Tensor,
    num_heads: int,
    num_layers: int,
    decay: float,
    soft_labels: bool,
) -> Objective:
    """Loss and statistics of one optimizer step; head i of row t predicts token x[t+2+i]."""
    total: Tensor = head.new_zeros(())
    rows, correct, accepted = [0] * num_heads, [0] * num_heads, 0
    for document in documents:
        tokens, mask, length = document.token_ids, document.mask, len(document.token_ids)
        logits = medusa(weights, document.last[:, None], num_heads, num_layers)
        for t in range(length):
            is_alive = True
            for i in range(num_heads):
                target = t + 2 + i
                if target >= length or not (mask[t + 1] and mask[target]):
                    is_alive = False
                    continue
                teacher, student = F.linear(document.last[t + 1 + i], head), logits[i][t, 0]
                is_correct = int(student.argmax()) == int(teacher.argmax())
                is_alive = is_alive and is_correct
                rows[i] += 1
                correct[i] += int(is_correct)
                accepted += int(is_alive)
                log_q = student.log_softmax(0)
                row_loss = -(teacher.softmax(0) * log_q).sum() if soft_labels else -log_q[tokens[target]]
                total = total + decay**i * row_loss
    return Objective(total / max(rows[0], 1), rows, correct, accepted)

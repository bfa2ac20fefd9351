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
    """Sums over every row of every document, by head; `loss` is divided by the rows judged at head 0."""

    loss: Tensor
    rows: list[int]
    judged: list[int]
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
    draft_ids: list[int] | None = None,
) -> Objective:
    """Loss and statistics of one optimizer step; head i of row t predicts token x[t+2+i].

    `draft_ids` are the tokens that the heads' rows stand for. A row gives no loss if what it is to learn, the token of
    the data or the base's likeliest, is not among them; it is judged all the same.
    """
    known = list(range(head.shape[0])) if draft_ids is None else draft_ids
    total: Tensor = head.new_zeros(())
    rows, judged, correct, accepted = [0] * num_heads, [0] * num_heads, [0] * num_heads, 0
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
                best = int(teacher.argmax())
                is_correct = known[int(student.argmax())] == best
                is_alive = is_alive and is_correct
                judged[i] += 1
                correct[i] += int(is_correct)
                accepted += int(is_alive)
                if (best if soft_labels else tokens[target]) not in known:
                    continue
                rows[i] += 1
                log_q = student.log_softmax(0)
                soft = -(teacher[known].softmax(0) * log_q).sum()
                total = total + decay**i * (soft if soft_labels else -log_q[known.index(tokens[target])])
    return Objective(total / max(judged[0], 1), rows, judged, correct, accepted)

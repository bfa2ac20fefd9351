"""The training objectives of the EAGLE family, row by row, one document at a time, one process.

Rows, masks, teacher, vocabulary policy, decay and normalisation are spelled out for a single row; nothing is
packed, batched, chunked or sharded. The drafts are `tests.reference.drafts`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference.drafts import Shape, StepOutput, Weights, eagle3, eagle3_mixed, parallel_heads


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
    regression: list[float]


# A document and the embeddings of what its rows read at each step -> the steps' outputs.
Run = Callable[[Document, list[Tensor]], list[StepOutput]]


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
    detaches: bool = False,
) -> Objective:
    """Loss and statistics of one optimizer step.

    `target_ids` are the base ids of the draft vocabulary, in order; without them it is the base's, and the
    draft's head is the base's unless it has its own weights.
    """
    own_head = None if "lm_head.weight" in weights else head

    def run(document: Document, embeddings: list[Tensor]) -> list[StepOutput]:
        aux = document.aux[:, None]
        if mixes_states:
            return eagle3_mixed(weights, shape, aux, embeddings[0], own_head, document.replaced)
        return eagle3(weights, shape, aux, embeddings, own_head, detaches=detaches)

    return objective(
        documents,
        run,
        embedding=embedding,
        head=head,
        num_steps=num_steps,
        decay=decay,
        target_ids=target_ids,
        hard_labels=hard_labels,
        keep_out_of_vocabulary=keep_out_of_vocabulary,
        mixes_states=mixes_states,
        further=partial(parallel_heads, weights),
    )


def objective(
    documents: Sequence[Document],
    run: Run,
    *,
    embedding: Tensor,
    head: Tensor,
    num_steps: int,
    decay: float,
    target_ids: list[int] | None = None,
    hard_labels: bool = False,
    keep_out_of_vocabulary: bool = False,
    mixes_states: bool = False,
    entropy_factor: float = 1.0,
    regression_factor: float = 0.0,
    further: Callable[[Tensor], list[Tensor]] | None = None,
) -> Objective:
    """Loss and statistics of one optimizer step of the draft that `run` computes.

    A row's loss is its cross-entropy and, where `regression_factor` is not 0, the smooth L1 distance between what the
    head reads and the base's state at the teacher's position, each times its factor. `further`: logits of a step's
    other heads; head i of step k is judged where step k + i is. Served, and so counted, are the steps' own and the last
    step's others.
    """
    total: Tensor = head.new_zeros(())
    regression = [0.0] * num_steps
    ids = list(range(head.shape[0])) if target_ids is None else target_ids
    num_further = 0 if further is None else len(further(head[:1]))
    heads = range(1, num_further + 1)
    served = [(k, 0) for k in range(num_steps)] + [(num_steps - 1, i) for i in heads]
    states = served + [(k, i) for k in range(num_steps - 1) for i in heads]
    rows, judged, correct, accepted = [0] * len(states), [0] * len(states), [0] * len(states), 0
    for document in documents:
        tokens, mask, length = document.token_ids, document.mask, len(document.token_ids)
        inputs = [[tokens[t + 1 + k] if t + 1 + k < length else 0 for t in range(length)] for k in range(num_steps)]
        outputs = run(document, [embedding[torch.tensor(step)][:, None] for step in inputs])
        logits = [[each.logits, *(further(each.hidden) if further else [])] for each in outputs]
        for t in range(length):
            is_alive = True
            for place, (k, i) in enumerate(states):
                target = t + 2 + k + i
                if target >= length or not (mask[t + 1] and mask[target]):
                    is_alive = False
                    continue
                teacher = F.linear(document.last[t + 1 + k + i], head)
                # Mixed, the row that reads x[t+1+k] is row t + k at every step.
                row = t + k if mixes_states else t
                student = logits[k][i][row, 0]
                best = int(teacher.argmax())
                judged[place] += 1
                if ids[int(student.argmax())] == best:
                    correct[place] += 1
                    accepted += int(is_alive and place < len(served))
                else:
                    is_alive = False
                if regression_factor and i == 0:
                    apart = (outputs[k].hidden[row, 0] - document.last[t + 1 + k]).abs()
                    distance = torch.where(apart < 1, 0.5 * apart**2, apart - 0.5).mean()
                    regression[k] += float(distance.detach())
                    total = total + decay**k * regression_factor * distance
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
                rows[place] += 1
                total = total + decay ** (k + i) * entropy_factor * row_loss
    rows, judged, correct = rows[: len(served)], judged[: len(served)], correct[: len(served)]
    return Objective(total / max(judged[0], 1), rows, judged, correct, accepted, regression)

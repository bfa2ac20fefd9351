"""The base that runs for ranks which train: conversations are asked for by number, their hidden states are sent."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

import torch
from torch import Tensor

from mcore_spec.bases.extraction import DataShare, RunningBase, document_states
from mcore_spec.data.document import DocumentSource
from mcore_spec.data.hidden_states.streamed import RequestQueue, states_tag
from mcore_spec.parallel.sides import Sent


@torch.no_grad()
def serve_states(
    base: RunningBase,
    documents: DocumentSource,
    requests: RequestQueue,
    *,
    aux_layer_ids: Sequence[int],
    num_kept: int,
    share: DataShare,
) -> int:
    """Answer until every training rank has stopped.

    Args:
        base: a whole one.
        documents: the conversations that training knows by the same numbers.
        requests: of the training ranks.
        aux_layer_ids: which the draft reads, 0-based, by output, ascending.
        num_kept: answers to one training rank's stream that may lie here untaken; more than the batches that it asks
            for ahead, or both would wait for each other.
        share: of this rank.

    Returns:
        How many batches were computed.

    Raises:
        LostRankError: a training rank has ended.
        TrainingError: it ended with an error.
    """
    untaken: defaultdict[tuple[int, int], deque[list[Sent]]] = defaultdict(deque)
    count = 0
    while (request := requests.next()) is not None:
        given = [documents.document(number) for number in request.numbers]
        parts = document_states(base, given, aux_layer_ids=aux_layer_ids, share=share)
        rows: Tensor = torch.cat([torch.cat((each.aux, each.last[:, None]), dim=1) for each in parts]).cpu()
        tag = states_tag(request.kind)
        answers = untaken[request.sender, request.kind]
        answers.append([requests.bridge.send(rows, to, tag=tag) for to in request.receivers])
        while len(answers) > num_kept:
            for sent in answers.popleft():
                sent.wait()
        count += 1
    return count

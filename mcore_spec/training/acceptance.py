"""Acceptance in the middle of a run: the draft drafts for real, on questions of the validation conversations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.data.document import Document
from mcore_spec.errors import ConfigError
from mcore_spec.evaluation.decoding import Decoder, Request
from mcore_spec.evaluation.statistics import Acceptance
from mcore_spec.evaluation.tree import Topology

# Most new tokens of an answer, and sequences in a batch.
_OSL, _BATCH_SIZE = 64, 8


class AcceptanceCheck:
    """Speculative decoding of some questions, shared out over the data- and context-parallel ranks."""

    def __init__(
        self, model: GPTModel, documents: Sequence[Document], *, num_steps: int, end_ids: Sequence[int]
    ) -> None:
        """Take the questions: what stands before the first token that the model has to produce.

        Args:
            model: this rank's part, converted.
            documents: conversations, the same on every rank.
            num_steps: tokens that the draft proposes.
            end_ids: tokens that end an answer.

        Raises:
            ConfigError: none of the documents has a question that leaves positions for an answer.
            UnsupportedError: a model that cannot keep keys and values, or a draft that cannot be served.
        """
        positions = MegatronBase(model).architecture.max_position_embeddings
        self.requests = list(_requests(documents, num_positions=positions - num_steps))
        if not self.requests:
            raise ConfigError(
                "eval_acceptance_interval: no validation conversation has a question that leaves positions for an "
                "answer; give more validation data (--split), or leave the option out"
            )
        self.decoder = Decoder(model, topology=Topology.chain(num_steps), end_ids=end_ids)
        self.group: dist.ProcessGroup = model.pg_collection.dp_cp

    def __call__(self) -> dict[str, Any]:
        """Acceptance length and acceptance by position; every rank must call, and each has the result."""
        own = self.requests[self.group.rank() :: self.group.size()]
        answers = [
            answer
            for start in range(0, len(own), _BATCH_SIZE)
            for answer in self.decoder.decode(own[start : start + _BATCH_SIZE]).answers
        ]
        measured = Acceptance.of(answers, num_steps=self.decoder.topology.depth)
        parts = [measured] * self.group.size()
        dist.all_gather_object(parts, measured, group=self.group)
        total = Acceptance.total(parts)
        return {
            "acceptance_length": total.acceptance_length,
            "acceptance_by_position": total.acceptance_by_position,
            "acceptance_forwards": total.num_forwards,
        }


def _requests(documents: Sequence[Document], *, num_positions: int) -> Iterator[Request]:
    for number, document in enumerate(documents):
        question = document.token_ids[: int(document.mask.argmax())].tolist()
        num_new = min(_OSL, num_positions - len(question))
        if question and num_new > 1:
            yield Request(tuple(question), num_new, number, f"validation conversation {number + 1}")

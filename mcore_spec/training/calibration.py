"""Running base and draft on conversations, as training does, for a calibration that looks at what passes through."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.conversion import conversion_of
from mcore_spec.data.batch import make_batch
from mcore_spec.data.document import DocumentSource
from mcore_spec.parallel.documents import Documents, document_multiple, row_multiple
from mcore_spec.quantization.installed import quantization_of
from mcore_spec.training.step import DraftStep


class CalibrationLoop:
    """The base on each conversation, and behind it every step of the draft, if there is one."""

    def __init__(self, source: DocumentSource, *, num_conversations: int) -> None:
        """Take the conversations.

        Args:
            source: tokenised.
            num_conversations: how many of them, from the first, over all data-parallel ranks.
        """
        self.source, self.num_conversations = source, min(num_conversations, len(source.lengths))

    def __call__(self, model: GPTModel) -> None:
        """Run this rank's share of a model that is being quantised; every rank of the model must call."""
        step = None if conversion_of(model) is None else DraftStep(model)
        base, quantization = MegatronBase(model), quantization_of(model)
        assert quantization is not None, "called by quantize()"
        groups: Any = model.pg_collection
        try:
            for index in islice(range(self.num_conversations), groups.dp.rank(), None, groups.dp.size()):
                batch = make_batch(
                    [self.source.document(index)],
                    num_steps=1 if step is None else step.num_steps,
                    document_multiple=document_multiple(groups.cp),
                    row_multiple=row_multiple(groups.cp, base.tp),
                    num_samples=1,
                ).to(next(model.parameters()).device)
                documents = Documents(batch.bounds, lengths=batch.lengths, group=groups.cp)
                rows = torch.arange(batch.bounds[-1], device=batch.token_ids.device)
                quantization.counted = documents.take(rows < batch.lengths[0])
                if step is None:
                    base.features(batch.token_ids[None], documents=documents)
                else:
                    step(batch)
        finally:
            quantization.counted = None

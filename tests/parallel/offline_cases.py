"""What the ranks do for `test_offline.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mcore_spec.bases.extraction import DataShare, RunningBase, extract_states
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.config import BaseArchitecture, BaseIdentity
from mcore_spec.data.document import Document, IntArray
from mcore_spec.data.hidden_states.plan import ExtractionPlan
from mcore_spec.parallel.layout import Layout, parallel_runtime
from tests.parallel.training_cases import CASES, converted, documents

CPU = torch.device("cpu")
# More than any of the cases reads.
AUX_LAYERS = (0, 1, 2, 4, 5)
# Several documents of a forward pass beside each other.
SEQ_LENGTH = 16


class Kept:
    """The documents of `training_cases` as an extraction takes them."""

    fingerprint = "the documents"
    seq_length = SEQ_LENGTH

    def __init__(self) -> None:
        self._documents = documents()
        self.lengths: IntArray = np.array([len(each.token_ids) for each in self._documents])

    def __len__(self) -> int:
        return len(self._documents)

    def document(self, index: int) -> Document:
        return self._documents[index]


def plan(architecture: BaseArchitecture, aux_layer_ids: Sequence[int] = AUX_LAYERS, **changes: Any) -> ExtractionPlan:
    source: Any = Kept()
    values = {
        "architecture": architecture,
        "identity": BaseIdentity(source="a base", fingerprint="a base"),
        "conversations": source,
        "tokenizer_fingerprint": "a tokenizer",
        "num_documents": len(source),
        "aux_layer_ids": tuple(aux_layer_ids),
        "dtype": "float64",
        "documents": source,
    }
    return ExtractionPlan(**{**values, **changes})


def extract_with(base: RunningBase, made: ExtractionPlan, store: Path, share: DataShare, **changes: Any) -> int:
    options: dict[str, Any] = {
        "backend": "megatron",
        "share": share,
        "rows_at_once": SEQ_LENGTH,
        "is_stopped": lambda: False,
        "advance": lambda _number: None,
        "max_shard_bytes": 2000,
    }
    return extract_states(base, made, store, **{**options, **changes}).num_computed


def extract(*, layout: Layout, directory: Path, store: Path, case: str = "whole vocabulary") -> int:
    """Of the tiny base of the training tests, in some layout; returns how many documents were computed."""
    with parallel_runtime(layout):
        model = converted(directory, layout, CASES[case])
        base, groups = MegatronBase(model), model.pg_collection
        share = DataShare(rank=groups.dp.rank(), size=groups.dp.size(), context_group=groups.cp, device=CPU)
        return extract_with(base, plan(base.architecture), store, share)


def extract_with_transformers(*, directory: Path, store: Path) -> int:
    """The same of the base as transformers runs it, a whole one on each rank."""
    from mcore_spec.bases.transformers import load_base
    from tests.parity.hf_models import norm_in_float64

    with parallel_runtime(Layout()):
        base = load_base(directory, "float64", device=CPU)
        norm_in_float64(base.model)
        share = DataShare(rank=dist.get_rank(), size=dist.get_world_size(), context_group=None, device=CPU)
        return extract_with(base, plan(base.architecture), store, share, backend="transformers")

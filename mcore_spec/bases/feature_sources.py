"""Features of a batch: from the base that runs beside the draft, or from a store of hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mcore_spec.bases.features import Features
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.data.batch import Batch
from mcore_spec.parallel.documents import Documents


class LiveFeatures:
    """Runs the base; see `FeatureSource`."""

    def __init__(self, base: MegatronBase, aux_layer_ids: Sequence[int]) -> None:
        """Take the base.

        Args:
            base: this rank's part.
            aux_layer_ids: layers (0-based, by output) that the draft reads.
        """
        self.base, self.aux_layer_ids = base, aux_layer_ids

    def __call__(self, batch: Batch, documents: Documents) -> Features | None:
        """Every stage of the model takes part."""
        return self.base.features(batch.token_ids[None], aux_layer_ids=self.aux_layer_ids, documents=documents)


class StoredFeatures:
    """Takes this rank's rows of what was read with the batch; see `FeatureSource`."""

    def __init__(self, base: MegatronBase, _aux_layer_ids: Sequence[int], *, last_is_normed: bool) -> None:
        """Take what remains of the base.

        Args:
            base: this rank's part; its last stage has the final norm.
            _aux_layer_ids: those that were read with the batch.
            last_is_normed: whether the stored states of the last layer went through it.
        """
        self.base, self.last_is_normed = base, last_is_normed

    @torch.no_grad()
    def __call__(self, batch: Batch, documents: Documents) -> Features | None:
        """The last stage alone reads."""
        if not self.base.is_last_stage:
            return None
        assert batch.states is not None, "batches of a store have states"
        head = self.base.head_weight()

        def own(rows: Tensor) -> Tensor:
            taken = self.base.tp.own_rows(documents.take(rows))
            return taken.to(device=head.device, dtype=head.dtype)[:, None]

        aux, last = batch.states
        normed = own(last) if self.last_is_normed else self.base.final_norm(own(last))
        return Features(aux=None if aux is None else own(aux), last=normed)

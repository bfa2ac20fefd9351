"""transformers as what runs the base: any model that drafts are attached to, on one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mcore_spec.bases.transformers import load_base
from mcore_spec.engines.extract import Captured


class TransformersEngine:
    """A transformers model that gives hidden states of prompts.

    Attributes:
        last_is_normed: as it was asked for.
    """

    def __init__(
        self,
        base: Path,
        *,
        num_layers: int,
        aux_layer_ids: Sequence[int],
        norm_last: bool = True,
        dtype: str = "auto",
        device: torch.device | None = None,
    ) -> None:
        """Load the base.

        Args:
            base: its Hugging Face directory.
            num_layers: of the base.
            aux_layer_ids: 0-based, by output, ascending.
            norm_last: give the last layer's output behind the final norm.
            dtype: of the base and of its states: float64, float32, bfloat16, float16, or auto.
            device: where it runs; by default CUDA's where there is one.

        Raises:
            UnsupportedError: a model that drafts cannot be attached to.
        """
        if device is None:
            is_cuda = torch.cuda.is_available()
            device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")
        self._base = load_base(base, dtype, device=device)
        self._device = device
        self._num_aux = len(aux_layer_ids)
        # The last layer's own output stands before the norm.
        self._layers = tuple(sorted({*aux_layer_ids, *(() if norm_last else (num_layers - 1,))}))
        self.last_is_normed = norm_last

    def capture(self, conversations: Sequence[list[int]]) -> Iterator[Captured]:
        """See `Engine`."""
        for token_ids in conversations:
            row = torch.tensor([token_ids], device=self._device)
            features = self._base.features(row, aux_layer_ids=self._layers)
            hidden_size = self._base.architecture.hidden_size
            assert features.aux is not None, "there is always a layer"
            states = features.aux[:, 0].unflatten(-1, (len(self._layers), hidden_size)).cpu()
            last = features.last[:, 0].cpu() if self.last_is_normed else states[:, -1]
            yield Captured(states[:, : self._num_aux], last)

    def close(self) -> None:
        """Nothing is held besides memory."""

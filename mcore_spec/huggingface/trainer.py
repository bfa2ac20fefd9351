"""transformers' Trainer, with the draft's accuracy in its log. Any Trainer trains a draft; this one says how well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer


class DraftTrainer(Trainer):
    """Logs top-1 accuracy by step and the simulated acceptance length, means over this rank's micro-batches."""

    _sums: Tensor | None = None
    _num_batches = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's; keeps the figures beside the loss."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            figures = torch.cat((outputs["accuracy"], outputs["acceptance_length"].reshape(1))).detach()
            self._sums = figures if self._sums is None else self._sums + figures
            self._num_batches += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the figures since the last one beside a training loss."""
        if "loss" in logs and self._sums is not None:
            *accuracy, length = (self._sums / self._num_batches).tolist()
            logs = {**logs, **{f"accuracy_{step}": value for step, value in enumerate(accuracy)}}
            logs["acceptance_length"] = length
            self._sums, self._num_batches = None, 0
        super().log(logs, start_time)

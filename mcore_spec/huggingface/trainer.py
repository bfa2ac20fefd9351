"""transformers' Trainer, with a draft's start from data and its figures in the log. Any Trainer trains a draft."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from mcore_spec.bases.transformers import TransformersBase
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.hosting.key import CONFIG_KEY, RATES
from mcore_spec.huggingface.linear_start import LinearStart, fit_start


class DraftTrainer(Trainer):
    """Logs top-1 accuracy by step, the simulated acceptance length and the base's own loss.

    They are means over this rank's micro-batches.

    Each matrix of the draft has a parameter group of its own: behind a start from data all of them change by the same
    share of their size.
    """

    _sums: Tensor | None = None
    _num_batches = 0

    def fit_start(self, num_batches: int | None = None) -> LinearStart | None:
        """Start the draft from the first batches of the run, see `mcore_spec.fit_start`; before `train`, on every rank.

        Args:
            num_batches: optimizer steps whose batches are learned from; ``None``: as many as the solution needs, at
                most those of the run and of its first epoch; none with FSDP.

        Returns:
            What it was made from; ``None`` where none was made.

        Raises:
            ConfigError: the optimizer exists already, and what `mcore_spec.fit_start` refuses.
            UnsupportedError: a draft without such a start, or a run whose ranks do not have the whole model.
        """
        if self.optimizer is not None:
            raise ConfigError(
                "fit_start behind the making of the optimizer, whose rates it decides; call it before train()"
            )
        if self.is_fsdp_enabled:
            if num_batches:
                raise UnsupportedError(
                    f"fit_start = {num_batches} with FSDP: no process has the whole model before; leave it out"
                )
            return None
        model: Any = self.model
        loader: Any = self.get_train_dataloader()
        steps, size = self.args.gradient_accumulation_steps, len(loader)
        limit = size if self.args.max_steps <= 0 else min(size, self.args.max_steps * steps)
        wanted = None if num_batches is None else num_batches * steps
        # Iterating draws the workers' seeds; nothing but the draft's weights is to differ from a run without a start.
        with torch.random.fork_rng(devices=[]):
            try:
                batches = islice(loader, limit)
                start = fit_start(model, batches, num_batches=wanted, seed=self.args.seed)
            finally:
                # accelerate takes a loader that was left early for the one that the run is in.
                loader.end()
        if start is not None:
            vars(model.config)[CONFIG_KEY][RATES] = start.rates
        return start

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's, with the groups described above, also without a start: a resumed run has the same groups."""
        is_made = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        whole: Any = self.accelerator.unwrap_model(self.model)
        draft = None if is_made else TransformersBase(whole).draft()
        named = [] if draft is None else [(name, p) for name, p in draft.named_parameters() if p.dim() > 1]
        rates = vars(whole.config)[CONFIG_KEY].get(RATES, {}) if named else {}
        factors = {id(matrix): rates.get(name, 1.0) for name, matrix in named}
        for group in list(optimizer.param_groups):
            matrices = [parameter for parameter in group["params"] if id(parameter) in factors]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in factors]
            for matrix in matrices:
                rate = group["lr"] * factors[id(matrix)]
                optimizer.add_param_group({**group, "params": [matrix], "lr": rate})
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

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
            others = (outputs[name].reshape(1) for name in ("acceptance_length", "lm_loss"))
            figures = torch.cat((outputs["accuracy"], *others)).detach()
            self._sums = figures if self._sums is None else self._sums + figures
            self._num_batches += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the figures since the last one beside a training loss."""
        if "loss" in logs and self._sums is not None:
            *accuracy, length, own = (self._sums / self._num_batches).tolist()
            logs = {**logs, **{f"accuracy_{step}": value for step, value in enumerate(accuracy)}}
            logs["acceptance_length"], logs["lm_loss"] = length, own
            self._sums, self._num_batches = None, 0
        super().log(logs, start_time)

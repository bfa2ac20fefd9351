"""megatron-core's optimizer over what is trained: gradients summed over ranks, clipped, checkpointed.

Gradients are sums over tokens. They are added over the micro-batches in megatron-core's buffers, over the
data- and context-parallel ranks by its `DistributedDataParallel`, and divided once by the number of tokens
(Megatron-Bridge found gradients 37 % off where each micro-batch was divided by its own).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    ParamWithNamePredicate,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.config import TrainingConfig
from mcore_spec.parallel import cpu_runtime
from mcore_spec.quantization.scales import LEARNED

# Width of the models for which learning rates of drafts are published (Llama-3.1-8B and its like).
REFERENCE_WIDTH = 4096
# Parts of AdamW's state that have the parameter's shape.
_MOMENTS = ("exp_avg", "exp_avg_sq")


class StepResult(NamedTuple):
    """What one optimizer step did.

    Attributes:
        grad_norm: norm of the whole gradient before clipping.
        learning_rate: that was used.
        is_finite: whether there was a step: a gradient with infinities or NaNs changes nothing.
    """

    grad_norm: float
    learning_rate: float
    is_finite: bool


def _overrides(
    model: GPTModel, config: TrainingConfig, optimizer_config: OptimizerConfig, *, rates: Mapping[str, float] | None
) -> dict[ParamKey, ParamGroupOverride]:
    """megatron-core's own (no decay on norms and biases), none on scales, and the learning rate of matrices.

    Adam's step of a matrix entry is as large as the learning rate, and a product sums over as many entries as the
    model is wide: the rate that moves outputs equally far falls with the width (Yang et al., arXiv 2203.03466). A head
    of the draft's own starts as the base's rows and is left at the rate for vectors.

    A least-squares start is near a solution already, which such rates would leave: behind one, `rates` are factors of
    its matrices, by name.
    """
    overrides = get_standard_config_overrides(optimizer_config)
    overrides[ParamKey(name=f"*.{LEARNED}_*")] = ParamGroupOverride(wd_mult=0.0)
    draft = MegatronBase(model).draft()
    if config.lr_scaling == "none" or draft is None:
        return overrides
    if config.lr_scaling == "auto" and rates is not None:
        factors = {id(draft.get_parameter(name)): factor for name, factor in rates.items()}
    else:
        heads = {id(head.weight) for head in draft.own_heads()}
        matrices = {id(parameter) for parameter in draft.parameters() if parameter.dim() > 1} - heads
        factors = dict.fromkeys(matrices, REFERENCE_WIDTH / model.config.hidden_size)
    for factor in sorted(set(factors.values())):
        members = {parameter for parameter, of_it in factors.items() if of_it == factor}
        key = _matrices(f"matrices at {factor} times the rate", members)
        overrides[key] = ParamGroupOverride(max_lr=factor * config.lr, min_lr=factor * config.min_lr)
    return overrides


def _matrices(name: str, members: Set[int]) -> ParamKey:
    """Of parameters by identity."""
    is_member = ParamWithNamePredicate(name=name, fn=lambda parameter, _: id(parameter) in members)
    return ParamKey(with_name_predicate=is_member)


class DraftOptimizer:
    """AdamW on this rank's trainable parameters; with a frozen base all but the last pipeline stage have none."""

    def __init__(
        self, model: GPTModel, config: TrainingConfig, *, num_iterations: int, rates: Mapping[str, float] | None = None
    ) -> None:
        """Wrap the model and allocate gradient buffers and moments.

        Args:
            model: this rank's part, converted.
            config: rates and decay.
            num_iterations: steps of the whole run, at the end of which the learning rate is the lowest.
            rates: factors of the draft's matrices behind a least-squares start; ``None``: there was none.
        """
        self.model, self.config, self.num_steps = model, config, 0
        self.is_distributed = (
            torch.cuda.is_available() if config.use_distributed_optimizer is None else config.use_distributed_optimizer
        )
        self.ddp = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=config.bf16, use_distributed_optimizer=self.is_distributed
            ),
            model,
        )
        optimizer_config = OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            bf16=config.bf16,
            params_dtype=model.config.params_dtype,
            clip_grad=config.clip_grad,
            use_distributed_optimizer=self.is_distributed,
        )
        with nullcontext() if torch.cuda.is_available() else cpu_runtime.tensor_types_of_cuda():
            self.optimizer = get_megatron_optimizer(
                optimizer_config,
                [self.ddp],
                config_overrides=_overrides(model, config, optimizer_config, rates=rates),
            )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=min(config.lr_warmup_iters, num_iterations - 1),
            lr_decay_steps=num_iterations,
            lr_decay_style=config.lr_decay_style,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=num_iterations,
            wd_incr_style="constant",
        )
        self.schedule(0)

    def zero_grad(self) -> None:
        """Forget the gradients; before the first micro-batch of a step."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def reduce_gradients(self, *, num_rows: int) -> None:
        """Sum the gradients over the ranks that saw other rows, and divide.

        Args:
            num_rows: over which the loss was summed, on all ranks and micro-batches.
        """
        # Of a base that is trained too also norms under sequence parallelism, and embeddings that two stages share.
        finalize_model_grads([self.ddp])
        self.ddp.scale_gradients(1.0 / max(num_rows, 1))

    def step(self) -> StepResult:
        """Clip and update, behind `reduce_gradients`; every rank must call."""
        self.optimizer.prepare_grads()
        grad_norm = self._grad_norm()
        is_finite = math.isfinite(grad_norm)
        learning_rate = self.scheduler.get_lr({})
        if is_finite:
            self._clip(grad_norm)
            self.optimizer.step_with_ready_grads()
            self.num_steps += 1
        return StepResult(grad_norm, learning_rate, is_finite)

    def _grad_norm(self) -> float:
        """Norm over every parameter of every rank, float64.

        megatron-core's own is float32 and, with tensor parallelism, rounded differently in each layout.
        """
        grads = self._only.get_main_grads_for_grad_norm()
        squares = [torch.linalg.vector_norm(grad, dtype=torch.float64).square() for grad in grads]
        device = next(self.model.parameters()).device
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self._only.get_grad_stats_parallel_group())
        return math.sqrt(float(total))

    def _clip(self, grad_norm: float) -> None:
        if self.config.clip_grad > 0 and grad_norm > self.config.clip_grad:
            for parameter in self._only.get_parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.config.clip_grad / grad_norm)

    def schedule(self, iteration: int) -> None:
        """Set the learning rate for the step behind `iteration` steps, skipped ones included."""
        # megatron-core's warm-up begins with a rate of zero, a step that does nothing.
        is_warming_up = iteration < self.scheduler.lr_warmup_steps
        self.scheduler.num_steps = 0
        self.scheduler.step(increment=iteration + 1 if is_warming_up else iteration)

    # --- checkpoint -----------------------------------------------------------------------------------

    def sharded_state(self, model_state: dict[str, Any], *, is_loading: bool = False) -> dict[str, Any]:
        """Moments and main weights, cut like the parameters they belong to, under Megatron-LM's names.

        Args:
            model_state: the model's sharded state, whose entries hold the parameters themselves.
            is_loading: values do not matter, they are about to be read.
        """
        if self.is_distributed:
            nested = self._distributed_state(model_state, is_loading=is_loading)
            return {f"{i}.{name}": entry for i, entries in nested.items() for name, entry in entries.items()}
        names = _names_of_parameters(model_state)
        state: dict[str, Any] = {}
        for parameter, main in self._parameters():
            name_of_model = names[id(parameter)]
            entry = model_state[name_of_model]
            tensors = {name: self._moments(main)[name] for name in _MOMENTS}
            if main is not parameter:
                tensors["fp32_param"] = main
            for name, tensor in tensors.items():
                prefix = f"optimizer.state.{name}"
                # Layers of a base share one key, of which each is a part.
                state[f"{prefix}.{name_of_model}"] = make_sharded_optimizer_tensor(entry, tensor, prefix=prefix)
        return state

    def load_sharded_state(self, model_state: dict[str, Any], loaded: dict[str, Tensor], *, num_steps: int) -> None:
        """Take what `sharded_state` saved.

        Args:
            model_state: the model's sharded state.
            loaded: tensors by the keys of `sharded_state`.
            num_steps: updates that were made.
        """
        if self.is_distributed:
            nested = self._distributed_state(model_state, is_loading=True)
            tensors = {i: {name: loaded[f"{i}.{name}"] for name in entries} for i, entries in nested.items()}
            self._only.load_parameter_state_from_fully_reshardable(tensors)
        else:
            names = _names_of_parameters(model_state)
            for parameter, main in self._parameters():
                name_of_model = names[id(parameter)]
                for name in _MOMENTS:
                    self._moments(main)[name].copy_(loaded[f"optimizer.state.{name}.{name_of_model}"])
                if main is not parameter:
                    main.data.copy_(loaded[f"optimizer.state.fp32_param.{name_of_model}"])
        self.num_steps = num_steps
        self._set_step(num_steps)

    def _set_step(self, num_steps: int) -> None:
        """AdamW's own counter: torch keeps it beside the moments, Apex and Transformer Engine in the group."""
        inner = self._only.optimizer
        for group in [] if inner is None else inner.param_groups:
            if isinstance(inner, torch.optim.AdamW):
                for main in group["params"]:
                    inner.state[main]["step"] = torch.tensor(float(num_steps))
            else:
                group["step"] = num_steps

    @property
    def _only(self) -> Any:
        """The one optimizer in megatron-core's chain; others are for experts."""
        (optimizer,) = self.optimizer.chained_optimizers
        return optimizer

    def _distributed_state(self, model_state: dict[str, Any], *, is_loading: bool) -> dict[int, dict[str, Any]]:
        """The distributed optimizer's whole state, by parameter; every data-parallel rank takes part."""
        if self._only.is_stub_optimizer:
            return {}
        if is_loading:
            # torch's AdamW makes its moments in the first step only.
            self._only.init_state_fn(self._only.optimizer, self._only.config)
        state: dict[int, dict[str, Any]] = self._only.sharded_param_state_fully_reshardable(
            model_state, is_loading, metadata={}
        )
        return state

    def _parameters(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Each trainable parameter, and the float32 one that the optimizer updates in its place."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                yield parameter, getattr(parameter, "main_param", parameter)

    def _moments(self, main: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._only.optimizer.state[main]
        for name in _MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(main)
        return state


def _names_of_parameters(model_state: dict[str, Any]) -> dict[int, str]:
    """Where the model's sharded state holds each parameter, by its identity."""
    return {id(entry.data): name for name, entry in model_state.items() if isinstance(entry.data, nn.Parameter)}

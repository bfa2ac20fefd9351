"""Quantisers in their places: a model that computes as an engine with its quantised weights would.

Modules keep their classes, parameters and names. Where one is quantised an object stands in the place of its forward;
what it needs is in one child of the model, the `Quantization`, which is saved and printed with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from mcore_spec.bases.megatron_cache import CacheParams
from mcore_spec.bases.megatron_layers import CausalAttention
from mcore_spec.bases.transformers import TransformersBase
from mcore_spec.config.quantization import QuantizationRecord
from mcore_spec.conversion import Quantized, as_base
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.hosting.install import record_quantization
from mcore_spec.layers.attention import KeyValue, Places, Rows
from mcore_spec.layers.linear import ShardedLinear
from mcore_spec.parallel.collectives import Group
from mcore_spec.parallel.float8 import Float8Product
from mcore_spec.parallel.layout import run_on_every_rank
from mcore_spec.parallel.sharding import sharded_state_dict
from mcore_spec.parallel.tensor_parallel import TensorParallel
from mcore_spec.quantization.emulated import rounded_linear
from mcore_spec.quantization.gradients import gradient_quantizer
from mcore_spec.quantization.learned import add_learned_scales
from mcore_spec.quantization.products import multiply
from mcore_spec.quantization.quantizers import (
    ActivationQuantizer,
    KeyValueQuantizer,
    LinearQuantizer,
    WeightQuantizer,
)
from mcore_spec.quantization.targets import (
    AttentionTarget,
    Target,
    attention_targets,
    declarable,
    linear_targets,
    select,
)

# Begins the names of the scales where weights are saved.
CHILD = "quantization"


class Quantization(Quantized):
    """Everything that a model's quantisation is.

    Attributes:
        is_on: whether values are quantised; off, the model computes as it did before.
        has_rounded_weights: whether weights were rounded for good (see `round_weights`).
        product: multiplies FP8 numbers; ``None``: rounded values are multiplied in the model's dtype.
        counted: which rows a calibration looks at, bool over this context-parallel rank's rows; ``None``: all. Padding
            is another one in each layout.
    """

    def __init__(self, record: QuantizationRecord, *, tp: TensorParallel) -> None:
        """Nothing is quantised yet.

        Args:
            record: for checkpoints.
            tp: the model's tensor-parallel ranks.
        """
        super().__init__(record)
        self.tp, self.is_on = tp, True
        self.has_rounded_weights = False
        self.product: Float8Product | None = None
        self.linears, self.attentions = nn.ModuleDict(), nn.ModuleDict()
        self.targets: dict[str, Target] = {}
        self.attention_targets: dict[str, AttentionTarget] = {}
        self.replaced: list[tuple[nn.Module, dict[str, Any]]] = []
        self.counted: Tensor | None = None

    def linear_quantizers(self) -> Iterator[tuple[Target, LinearQuantizer]]:
        """Each quantised linear map of this rank, with its quantisers."""
        for target in self.targets.values():
            yield target, self.of(target.name)

    def of(self, name: str) -> LinearQuantizer:
        """The quantisers of a linear map."""
        found = self.linears[_key(name)]
        assert isinstance(found, LinearQuantizer)
        return found

    @property
    def attention_names(self) -> set[str]:
        """Quantised attentions of this rank."""
        return {name for name, _ in self.key_value_quantizers()}

    def key_values_of(self, name: str) -> KeyValueQuantizer:
        """The quantisers of an attention's keys and values."""
        return dict(self.key_value_quantizers())[name]

    def key_value_quantizers(self) -> Iterator[tuple[str, KeyValueQuantizer]]:
        """Each quantised attention of this rank, by name."""
        for key, found in self.attentions.items():
            assert isinstance(found, KeyValueQuantizer)
            yield key.replace("/", "."), found

    def attention_quantizers(self) -> Iterator[tuple[AttentionTarget, KeyValueQuantizer]]:
        """Each quantised attention of this rank, with its quantisers."""
        for name, pair in self.key_value_quantizers():
            yield self.attention_targets[name], pair

    def static_quantizers(self) -> Iterator[tuple[str, ActivationQuantizer]]:
        """What a calibration finds scales for, by the name of its place."""
        for target, quantizer in self.linear_quantizers():
            if not quantizer.activation.scheme.is_dynamic:
                yield f"the input of {target.name}", quantizer.activation
        for name, pair in self.key_value_quantizers():
            yield f"the keys of {name}", pair.key
            yield f"the values of {name}", pair.value

    def seen(self, x: Tensor) -> Tensor:
        """The rows of `x`, [rows, ...] or this tensor-parallel rank's share of them, that are looked at."""
        if self.counted is None:
            return x
        is_share = x.shape[0] != self.counted.shape[0]
        return x[self.counted.chunk(self.tp.size)[self.tp.rank] if is_share else self.counted]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's protocol: every scale as a `ShardedTensor`, under its place in the whole model."""
        assert not sharded_offsets, "names tell the stages apart"
        return sharded_state_dict(self, prefix, tp=self.tp, metadata=metadata)

    def extra_repr(self) -> str:
        """The recipe, and what it left alone."""
        recipe = self.record.recipe
        described = f"{recipe.name}, include={list(recipe.include)}, exclude={list(recipe.exclude)}"
        return described if self.product is None else f"{described}, FP8 products, gradients {recipe.gradient}"


def _key(name: str) -> str:
    """Names of children have no dots."""
    return name.replace(".", "/")


def quantization_of(model: nn.Module) -> Quantization | None:
    """The model's quantisation, if it was quantised."""
    found = [child for child in model.children() if isinstance(child, Quantization)]
    return found[0] if found else None


def install(model: nn.Module, record: QuantizationRecord) -> Quantization:
    """Put quantisers in their places, their scales one until they are measured or loaded; every rank must call.

    Args:
        model: a `GPTModel`, this rank's part, or a transformers model; with its draft, if it is to have one.
        record: the recipe, and how scales are found.

    Raises:
        ConfigError: a model that is quantised already, or what `select` refuses.
        UnsupportedError: layers that cannot be quantised.
    """
    existing = quantization_of(model)
    if existing is not None:
        raise ConfigError(
            f"the model is quantised already ({existing.record.recipe.name}); quantise the one that it was made from"
        )
    recipe = record.recipe
    found = run_on_every_rank(lambda: linear_targets(model))
    attentions = [] if recipe.kv_cache is None else run_on_every_rank(lambda: attention_targets(model))
    chosen = select(found, recipe)
    attentions = declarable(attentions, chosen, as_base(model).draft())
    quantizers = run_on_every_rank(lambda: [_linear_quantizer(target, record) for target in chosen])
    base = as_base(model)
    quantization = Quantization(record, tp=base.tp)
    for target, quantizer in zip(chosen, quantizers, strict=True):
        quantization.linears[_key(target.name)] = quantizer
        quantization.targets[target.name] = target
        _replace_forward(quantization, target.module, QuantizedLinear(target.module, quantizer, quantization))
    for attention in attentions:
        assert recipe.kv_cache is not None
        pair = KeyValueQuantizer(recipe.kv_cache, device=next(model.parameters()).device)
        quantization.attentions[_key(attention.name)] = pair
        quantization.attention_targets[attention.name] = attention
        _replace_forward(quantization, attention.module, _quantized_attention(attention, pair, quantization))
    model.add_module(CHILD, quantization)
    if record.has_learned_scales:
        draft = base.draft()
        if draft is not None:
            add_learned_scales(draft, quantization.linear_quantizers(), quantization.attention_quantizers())
            # Until `learn_scales` says that they go on.
            quantization.requires_grad_(False)
    if isinstance(base, TransformersBase):
        record_quantization(base, record)
    return quantization


def _linear_quantizer(target: Target, record: QuantizationRecord) -> LinearQuantizer:
    weight, name, recipe = target.weight, target.name, record.recipe
    if weight.is_meta:
        raise UnsupportedError(
            f"{name} is offloaded, and its scales lie with its weight; load the model without offloading"
        )
    activation = ActivationQuantizer(
        recipe.activation,
        device=weight.device,
        group=target.tp.group if target.cut == 1 else None,
        columns=weight.shape[1],
        name=name,
    )
    of_weight = WeightQuantizer(recipe.weight, weight, cut=target.cut, tp=target.tp, parts=target.parts, name=name)
    return LinearQuantizer(of_weight, activation, gradient_quantizer(target, record))


def remove(model: nn.Module) -> None:
    """Take out what `install` put in."""
    quantization = quantization_of(model)
    assert quantization is not None, "the model is quantised"
    for module, before in quantization.replaced:
        del module.__dict__["forward"]
        # Somebody else's object may have been in this place already.
        module.__dict__.update(before)
    delattr(model, CHILD)
    base = as_base(model)
    if isinstance(base, TransformersBase):
        record_quantization(base, None)


def _replace_forward(quantization: Quantization, module: nn.Module, forward: Callable[..., Any]) -> None:
    own = vars(module)
    quantization.replaced.append((module, {"forward": own["forward"]} if "forward" in own else {}))
    module.forward = forward


@contextmanager
def unquantized(model: nn.Module) -> Iterator[None]:
    """Let a quantised model compute as it did before, during the block."""
    quantization = quantization_of(model)
    assert quantization is not None, "the model is quantised"
    assert not quantization.has_rounded_weights, "its weights are as they were"
    before, quantization.is_on = quantization.is_on, False
    try:
        yield
    finally:
        quantization.is_on = before


class _Product(Protocol):
    """[..., in] times [out, in], quantised, plus a bias [out] -> [..., out]."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...


class QuantizedLinear:
    """Stands in the place of a linear map's ``forward``: quantised input, quantised weight, for the call alone."""

    def __init__(self, module: nn.Module, quantizer: LinearQuantizer, quantization: Quantization) -> None:
        """Take the place.

        Args:
            module: the linear map.
            quantizer: of it.
            quantization: of the whole model, which says whether it is on.
        """
        self.module, self.quantizer, self.quantization = module, quantizer, quantization
        self.original: Callable[..., Any] = module.forward

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """The original's arguments and result; `x` is [..., in] or this rank's part of it."""
        if not self.quantization.is_on:
            self.quantizer.activation.observe(self.quantization.seen(x))
            return self.original(x, *args, **options)
        quantizer, product = self.quantizer, self.quantization.product
        if product is not None:
            return self._with(partial(multiply, quantizer=quantizer, product=product), x, *args, **options)
        x = quantizer.activation(x)
        if self.quantization.has_rounded_weights:
            return self.original(x, *args, **options)
        return self._with(partial(rounded_linear, quantizer=quantizer.weight), x, *args, **options)

    def _with(self, product: _Product, x: Tensor, *args: Any, **options: Any) -> Any:
        """The same with this product; entering and leaving the parallel region stay the original's."""
        module = self.module
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
            bias = module.applied_bias if isinstance(module, ShardedLinear) else _parameter(module, "bias")
            return product(x, module.get_parameter("weight"), bias)
        module._forward_impl = _InRegion(product)
        try:
            return self.original(x, *args, **options)
        finally:
            del module._forward_impl


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    return module._parameters[name]


class _InRegion:
    """Stands in the place of megatron-core's product of a linear map, which sums the input's gradient over ranks."""

    def __init__(self, product: _Product) -> None:
        self.product = product

    def __call__(
        self,
        *,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Group,
        **options: Any,
    ) -> Tensor:
        """megatron-core's arguments; those of how weights' gradients are overlapped and added up do not matter here."""
        if allreduce_dgrad or sequence_parallel:
            input = TensorParallel(group=tp_group, sequence_parallel=sequence_parallel).enter(input)
        return self.product(input, weight, bias)


class _KeysAndValues:
    """Quantises keys and values, or shows them to their observers."""

    def __init__(self, pair: KeyValueQuantizer, quantization: Quantization) -> None:
        self.pair, self.quantization = pair, quantization

    def __call__(self, key: Tensor, value: Tensor) -> KeyValue:
        if self.quantization.is_on:
            return KeyValue(self.pair.key(key), self.pair.value(value))
        self.pair.key.observe(self.quantization.seen(key))
        self.pair.value.observe(self.quantization.seen(value))
        return KeyValue(key, value)


def _quantized_attention(
    target: AttentionTarget, pair: KeyValueQuantizer, quantization: Quantization
) -> Callable[..., Any]:
    of_base = isinstance(target.module, CausalAttention)
    kind = QuantizedBaseAttention if of_base else QuantizedDraftAttention
    return kind(target.module.forward, _KeysAndValues(pair, quantization))


class QuantizedBaseAttention:
    """Stands in the place of `CausalAttention.forward`."""

    def __init__(self, original: Callable[..., Tensor], quantize: _KeysAndValues) -> None:
        """Take the place."""
        self.original, self.quantize = original, quantize

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Tensor:
        """The original's; keys are rotated, but for a cache, which rotates them before it keeps them."""
        params = options.get("packed_seq_params")
        if isinstance(params, CacheParams):
            cache: Any = _QuantizedCache(params.cache, self.quantize)
            options["packed_seq_params"] = replace(params, cache=cache)
        else:
            key, value = self.quantize(key, value)
        return self.original(query, key, value, attention_mask, **options)


class _QuantizedCache:
    """A cache that keeps quantised rows."""

    def __init__(self, cache: Any, quantize: _KeysAndValues) -> None:
        self.cache, self.quantize = cache, quantize

    def write(self, layer: int, rows: Any, own: KeyValue) -> KeyValue:
        kept: KeyValue = self.cache.write(layer, rows, self.quantize(*own))
        return kept


class QuantizedDraftAttention:
    """Stands in the place of `TTTAttention.forward`."""

    def __init__(self, original: Callable[..., Tensor], quantize: _KeysAndValues) -> None:
        """Take the place."""
        self.original, self.quantize = original, quantize

    def __call__(self, x: Tensor, *, rows: Rows) -> Tensor:
        """The original's."""
        return self.original(x, rows=_QuantizedRows(rows, self.quantize))


class _QuantizedRows:
    """Rows that keep, and see, quantised keys and values."""

    def __init__(self, rows: Rows, quantize: _KeysAndValues) -> None:
        self.rows, self.quantize = rows, quantize

    def places(self, num_rows: int, device: Any) -> Places:
        return self.rows.places(num_rows, device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.rows.attend(query, *self.quantize(key, value))

"""A quantised weight as engines' files have it: its numbers, their scales, the scale of its input.

ModelOpt and compressed-tensors differ in shapes of scales and in what the scales of keys and values are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mcore_spec.config.quantization import QuantFormat
from mcore_spec.parallel.sharding import gather_whole
from mcore_spec.quantization.installed import Quantization
from mcore_spec.quantization.numbers import FORMATS, encode
from mcore_spec.quantization.quantizers import LinearQuantizer, expand_scale
from mcore_spec.weights.encoding import Encoding
from mcore_spec.weights.safetensors_io import TensorSpec


@dataclass(frozen=True)
class QuantizedWeight:
    """How one weight of the files is written.

    Attributes:
        form: whose files they are.
        quantizer: of the linear map; ``None``: the weight is written as it is.
        parts: which of the linear map's parts the weight consists of.
        scalars: further scales beside it, by name.
    """

    form: QuantFormat
    quantizer: LinearQuantizer | None = None
    parts: tuple[int, ...] = (0,)
    scalars: Mapping[str, Tensor] = field(default_factory=dict)

    def specs(self, spec: TensorSpec) -> list[TensorSpec]:
        """See `Encoding`."""
        written = [spec]
        if self.quantizer is not None:
            storage = FORMATS[self.quantizer.weight.scheme.number].storage
            written = [
                TensorSpec(spec.name, storage, spec.shape),
                TensorSpec(f"{spec.name}_scale", torch.float32, self._scale_shape()),
            ]
        return [*written, *(TensorSpec(name, torch.float32, self._scalar_shape) for name in self._scalars(spec.name))]

    def tensors(self, name: str, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """See `Encoding`."""
        if self.quantizer is None:
            yield name, whole
        else:
            weight = self.quantizer.weight
            scale = self._whole_scale()
            yield name, encode(whole, expand_scale(scale, (whole.shape[0], whole.shape[1])), weight.scheme.number)
            yield f"{name}_scale", scale.reshape(self._scale_shape())
        for scalar, value in self._scalars(name).items():
            yield scalar, value.reshape(self._scalar_shape)

    @property
    def _scalar_shape(self) -> tuple[int, ...]:
        return () if self.form == "modelopt" else (1,)

    def _scalars(self, name: str) -> dict[str, Tensor]:
        scalars = dict(self.scalars)
        if self.quantizer is not None and not self.quantizer.activation.scheme.is_dynamic:
            scalars[f"{name.removesuffix('.weight')}.input_scale"] = self.quantizer.activation.scales()[0].detach()
        return scalars

    def _whole_scale(self) -> Tensor:
        """[1], [out, 1] or that of blocks; parts below each other."""
        assert self.quantizer is not None
        weight = self.quantizer.weight
        shards, scales = weight.shards(), weight.scales()
        if weight.num_scales == 1:
            return gather_whole(scales[0], shards[weight.names()[0]], weight.tp)
        return torch.cat([gather_whole(scales[part], shards[weight.names()[part]], weight.tp) for part in self.parts])

    def _scale_shape(self) -> tuple[int, ...]:
        """As the files have it."""
        assert self.quantizer is not None
        weight = self.quantizer.weight
        if weight.scheme.granularity == "tensor":
            return self._scalar_shape
        parts = self.parts if weight.num_scales > 1 else (0,)
        shapes = [
            whole_shape_of(weight.scales()[part].shape, weight.shards()[weight.names()[part]].dim, weight.tp.size)
            for part in parts
        ]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        if self.form == "modelopt":
            return (rows,) if weight.scheme.granularity == "channel" else (rows, 1, columns, 1)
        return (rows, columns)


def whole_shape_of(local: torch.Size, dim: int | None, size: int) -> tuple[int, ...]:
    """Shape of the whole of `size` equal parts along `dim`."""
    return tuple(length * (size if axis == dim else 1) for axis, length in enumerate(local))


def encodings_of(
    quantization: Quantization, stored: Mapping[str, tuple[str, ...]], *, form: QuantFormat
) -> dict[str, Encoding]:
    """How the weights of this rank's linear maps are written.

    Args:
        quantization: of the model.
        stored: linear map -> the weights in the files that it stands for.
        form: whose files they are.
    """
    encodings: dict[str, Encoding] = {}
    for name, names in stored.items():
        quantizer = quantization.of(name) if name in quantization.targets else None
        all_parts = range(quantizer.weight.num_parts) if quantizer is not None else range(len(names))
        for index, weight in enumerate(names):
            parts = (index,) if len(names) > 1 else tuple(all_parts)
            scalars = _key_value_scales(quantization, name, weight, form=form, is_joined=len(names) == 1)
            if quantizer is not None or scalars:
                encodings[weight] = QuantizedWeight(form, quantizer, parts, scalars)
    return encodings


def _key_value_scales(
    quantization: Quantization, name: str, weight: str, *, form: QuantFormat, is_joined: bool
) -> dict[str, Tensor]:
    """Scales of keys and values that are written beside the projections which make them."""
    parent, _, own = name.rpartition(".")
    attention = next((key for key in (f"{parent}.core_attention", parent) if key in quantization.attention_names), None)
    if attention is None or own not in ("linear_qkv", "k_proj", "v_proj"):
        return {}
    pair = quantization.key_values_of(attention)
    block, _, file_own = weight.removesuffix(".weight").rpartition(".")
    scales = {}
    for letter, quantizer in (("k", pair.key), ("v", pair.value)):
        if file_own == f"{letter}_proj" or (is_joined and own == "linear_qkv"):
            prefix = f"{block}.{letter}_proj" if form == "modelopt" else block
            scales[f"{prefix}.{letter}_scale"] = quantizer.scales()[0].detach()
    return scales

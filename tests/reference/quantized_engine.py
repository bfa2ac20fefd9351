"""What a quantised directory means to who reads it: numbers times scales, and inputs rounded as the declaration says.

Nothing of `mcore_spec` is used. A scale without a declaration, a declaration without scales, and a weight that the
declaration calls quantised and is not, are errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.reference.quantization import block_amax, nearest_of_many, quantize_rows, whole_scale

MODELOPT = {"FP8": "tensor", "FP8_PER_CHANNEL_PER_TOKEN": "token", "FP8_PB_WO": "block"}
NUMBERS = (torch.float8_e4m3fn, torch.int8)
SCALES = ("weight_scale", "input_scale", "k_scale", "v_scale")


class Directory(NamedTuple):
    """A directory, with its weights as they are meant.

    Attributes:
        weights: dequantised; no scales.
        inputs: linear map -> what becomes of its input.
        scales: every scale, by name.
    """

    weights: dict[str, Tensor]
    inputs: dict[str, Callable[[Tensor], Tensor]]
    scales: dict[str, Tensor]


def read(directory: Path) -> Directory:
    """The directory; tensors in float64."""
    config = json.loads((directory / "config.json").read_text())
    # Each pipeline stage has a file of its own.
    files = sorted(directory.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(SCALES)}
    declared = config.get("quantization_config")
    if (declared is None) != (not scales):
        raise ValueError(f"declaration: {declared}, scales: {sorted(scales)[:3]}")
    weights, inputs = {}, {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if name in scales:
            continue
        is_quantized = tensor.dtype in NUMBERS
        if declared is not None and name.endswith("proj.weight") and is_quantized == (module in declared["ignore"]):
            raise ValueError(f"{name}: {tensor.dtype}, but ignore = {declared['ignore']}")
        if is_quantized != (f"{module}.weight_scale" in scales):
            raise ValueError(f"{name}: {tensor.dtype} and its scale do not belong together")
        weights[name] = tensor
        if is_quantized:
            scale = whole_scale(scales[f"{module}.weight_scale"].numpy(), (tensor.shape[0], tensor.shape[1]))
            weights[name] = tensor.to(torch.float64) * torch.from_numpy(np.ascontiguousarray(scale))
            inputs[module] = rounding(declared, scales.get(f"{module}.input_scale"))
    return Directory(weights, inputs, scales)


def rounding(declared: dict[str, Any], static: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What an engine does to the input of a linear map before it multiplies."""
    if declared["quant_method"] == "modelopt":
        number, granularity = "e4m3", MODELOPT[declared["quant_algo"]]
    else:
        arguments = declared["config_groups"]["group_0"]["input_activations"]
        number = {"float": "e4m3", "int": "int8"}[arguments["type"]]
        granularity = {"group": "block"}.get(arguments["strategy"], arguments["strategy"])
    if (granularity == "tensor") != (static is not None):
        raise ValueError(f"input_scale = {static} for activations per {granularity}")

    def apply(x: Tensor) -> Tensor:
        rows = x.detach().numpy().reshape(-1, x.shape[-1])
        if static is not None:
            found = nearest_of_many(rows / float(static)) * float(static)
        elif granularity == "token":
            found = quantize_rows(rows, np.abs(rows).max(axis=1, keepdims=True) + np.zeros_like(rows), number)
        else:
            found = quantize_rows(rows, block_amax(rows, (1, 128)), number)
        return torch.from_numpy(found.reshape(x.shape))

    return apply


def write_plain(directory: Path, read_as: Directory, target: Path) -> Path:
    """The directory without quantisation, its weights as they are meant, for who reads plain ones."""
    target.mkdir()
    config = json.loads((directory / "config.json").read_text())
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in read_as.weights.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target

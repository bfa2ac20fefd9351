"""A base and drafts small enough for float64 on every layout, their weights fixed by names.

A weight is drawn whole from a generator seeded by its name, and each rank keeps its cut: whatever the
layout, the logical tensor is the same, and a test can say what each rank must hold.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mcore_spec.bases.megatron_build import BaseGPTModel, build_gpt_model
from mcore_spec.config import BaseArchitecture, EagleAlgorithm, eagle_preset
from mcore_spec.conversion import Mode
from mcore_spec.parallel.layout import Layout
from mcore_spec.parallel.sharding import Shard, sharded_tensors, whole_shape
from mcore_spec.parallel.tensor_parallel import TensorParallel
from mcore_spec.weights.hf_config import describe_hf, read_hf_config
from mcore_spec.weights.hf_import import import_hf
from mcore_spec.weights.safetensors_io import WeightDirectory

# Odd, so that it is padded wherever it is sharded.
VOCAB_SIZE = 103
DRAFT_VOCAB_SIZE = 37

BASE: dict[str, Any] = {
    "family": "llama",
    "num_layers": 6,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope": {"theta": 10000.0},
    "dtype": "float64",
}


def base_architecture(**changes: Any) -> BaseArchitecture:
    return BaseArchitecture.parse({**BASE, **changes})


def draft_to_target(size: int = DRAFT_VOCAB_SIZE, *, vocab_size: int = VOCAB_SIZE) -> Tensor:
    """d2t of ascending ids spread over the whole vocabulary, its first and last entry included."""
    ids = torch.linspace(0, vocab_size - 1, size, dtype=torch.float64).round().to(torch.int64)
    return ids - torch.arange(size)


def drawn(name: str, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float64) -> Tensor:
    """A whole tensor that depends on its name and shape: norms near one, everything else small.

    Small enough that attention which reads states without a norm (EAGLE-1) does not sharpen from step to
    step: there a rounding error of 1e-16 grew to 1e-9, which says nothing about the code.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    is_norm = len(shape) == 1 and name.endswith("weight")
    return (1 + 0.2 * values if is_norm else 0.2 * values).to(dtype)


def cut(whole: Tensor, shard: Shard, tp: TensorParallel) -> Tensor:
    """This rank's part, padded with zeros where the cut is padded. Not the package's own arithmetic."""
    if shard.dim is None:
        return whole
    size = whole.shape[shard.dim]
    if shard.size is not None:
        assert shard.size == size
        missing = -size % tp.size
        padding = list(whole.shape)
        padding[shard.dim] = missing
        whole = torch.cat((whole, whole.new_zeros(padding)), shard.dim)
    local = whole.shape[shard.dim] // tp.size
    return whole.narrow(shard.dim, tp.rank * local, local)


def expected_shards(draft: nn.Module, tp: TensorParallel) -> dict[str, Tensor]:
    """What this rank must hold of every floating-point tensor of a draft filled by `fill`."""
    return {
        entry.name: cut(drawn(entry.name, whole_shape(entry, tp), dtype=entry.tensor.dtype), entry.shard, tp)
        for entry in sharded_tensors(draft)
        if entry.tensor.is_floating_point()
    }


@torch.no_grad()
def fill(draft: nn.Module, tp: TensorParallel) -> None:
    """Give every weight of a draft its drawn value: matrices, norms, biases and Medusa's blocks."""
    state = draft.state_dict(keep_vars=True)
    for name, values in expected_shards(draft, tp).items():
        state[name].copy_(values)


def write_hf_model(
    directory: Path, model_type: str, *, tied: bool, dtype: torch.dtype = torch.float64, **changes: int
) -> Path:
    """A Hugging Face directory of the tiny base with drawn weights, by transformers' own classes; sizes may change."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "llama": {"head_dim": 8},
        "qwen3": {"head_dim": 8},
        "qwen2": {"hidden_size": 32},  # its heads are hidden_size / heads wide
    }[model_type]
    config = AutoConfig.for_model(
        model_type,
        **{
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            **sizes,
            **changes,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn(f"base/{name}", tuple(parameter.shape)))
    model.save_pretrained(directory)
    return directory


def joint_mode(member: EagleAlgorithm, **options: Any) -> Mode:
    """Of a draft whose base is trained too."""
    return [("eagle", {**eagle_preset(member)["config"], "eagle_freeze_base_model": False, **options})]


class ImportedBase(NamedTuple):
    """A base read from a Hugging Face directory in some layout."""

    model: BaseGPTModel
    raw_config: dict[str, Any]


def import_base(directory: Path, layout: Layout, *, dtype: str | None = None) -> ImportedBase:
    raw = read_hf_config(directory)
    architecture = describe_hf(raw, where=str(directory))
    if dtype is not None:
        architecture = architecture.model_copy(update={"dtype": dtype})
    model = build_gpt_model(architecture, layout)
    with WeightDirectory(directory) as weights:
        import_hf(model, weights, cast=dtype is not None)
    return ImportedBase(model, raw)

"""Tiny random models of every family, made, run and saved by transformers: what an import must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

# 103 is odd: at TP2 the vocabulary is padded. Four layers: two on each of two stages, or three and one.
SIZES: dict[str, Any] = {
    "vocab_size": 103,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LENGTH = 16
WINDOW = 7
# The length up to which LongRoPE takes its short table; a longer sequence takes the long one.
SHORT_LENGTH, BEYOND_SHORT = 16, 18
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.5, 4.0, 9.0],
    "original_max_position_embeddings": SHORT_LENGTH,
}
# With theta 500000 and heads of 8 the wavelengths are 6, 167, 4443 and 118144: below, between (128 and
# 512) and above the bounds.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}
ALTERNATING = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


class TinyConfig(NamedTuple):
    """One model: its configuration class, what differs from `SIZES`, and the lengths it is run at."""

    config_class: Callable[..., PreTrainedConfig]
    changes: dict[str, Any]
    lengths: tuple[int, ...] = (LENGTH,)


TINY_CONFIGS: dict[str, TinyConfig] = {
    # MHA, untied.
    "llama2": TinyConfig(LlamaConfig, {"num_key_value_heads": 4, "rope_parameters": _rope(1e4)}),
    "llama31": TinyConfig(LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama32_tied": TinyConfig(LlamaConfig, {"rope_parameters": LLAMA3, "head_dim": 16, "tie_word_embeddings": True}),
    "smollm2_tied": TinyConfig(LlamaConfig, {"rope_parameters": _rope(1e5), "tie_word_embeddings": True}),
    "llama_linear": TinyConfig(
        LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
    ),
    "llama_yarn": TinyConfig(LlamaConfig, {"rope_parameters": YARN, "head_dim": 16}),
    "llama_yarn_attention_factor": TinyConfig(
        LlamaConfig, {"rope_parameters": {**YARN, "attention_factor": 1.3, "truncate": True}, "head_dim": 16}
    ),
    "llama_longrope": TinyConfig(
        LlamaConfig,
        {"rope_parameters": {**LONGROPE, "factor": 4.0, "attention_factor": 1.2}, "tie_word_embeddings": True},
        (SHORT_LENGTH, BEYOND_SHORT),
    ),
    "mistral": TinyConfig(
        MistralConfig,
        {"rope_parameters": _rope(1e6), "sliding_window": None, "head_dim": 16, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "mistral_window": TinyConfig(MistralConfig, {"rope_parameters": _rope(1e4), "sliding_window": WINDOW}),
    "phi3": TinyConfig(Phi3Config, {"rope_parameters": _rope(1e4), "hidden_act": "gelu"}),
    "phi3_longrope_window": TinyConfig(
        Phi3Config,
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": SHORT_LENGTH,
            "sliding_window": WINDOW,
            "num_key_value_heads": 4,
        },
        (SHORT_LENGTH, BEYOND_SHORT),
    ),
    "qwen15": TinyConfig(Qwen2Config, {"num_key_value_heads": 4, "rope_parameters": _rope(1e6)}),
    "qwen2_tied_window": TinyConfig(
        Qwen2Config,
        {
            "rope_parameters": _rope(1e6),
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
    "qwen25_yarn": TinyConfig(
        Qwen2Config,
        {
            "rope_parameters": {
                **YARN,
                "mscale": 0.7,
                "mscale_all_dim": 0.4,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "truncate": False,
            },
            "head_dim": 16,
        },
    ),
    "qwen3": TinyConfig(Qwen3Config, {"rope_parameters": _rope(1e6), "head_dim": 16}),
    "qwen3_tied_window": TinyConfig(
        Qwen3Config,
        {
            "rope_parameters": _rope(1e6),
            "head_dim": 16,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
        },
    ),
}


class Run(NamedTuple):
    """One forward pass of transformers: [b, s] in; logits [b, s, v], and [b, s, h] of each layer's output.

    The last of `hidden_states` is after the final norm, as in transformers' `output_hidden_states`.
    """

    token_ids: Tensor
    logits: Tensor
    hidden_states: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A model in float64, where it is saved, and what it computes."""

    name: str
    model: PreTrainedModel
    directory: Path
    runs: list[Run]

    def save(self, directory: Path, dtype: torch.dtype) -> Path:
        """Save a copy of another dtype."""
        copy.deepcopy(self.model).to(dtype).save_pretrained(directory)
        return directory


def make_tiny_model(name: str, directory: Path) -> TinyModel:
    """Make, randomise, save and run one of `TINY_CONFIGS`."""
    config_class, changes, lengths = TINY_CONFIGS[name]
    config = config_class(**copy.deepcopy({**SIZES, **changes}))
    # Eager attention computes its softmax in float32, whatever the model's dtype.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    generator = torch.Generator().manual_seed(list(TINY_CONFIGS).index(name))
    randomise(model, generator)
    model.save_pretrained(directory)
    norm_in_float64(model)
    ids = [torch.randint(config.vocab_size, (2, length), generator=generator) for length in lengths]
    return TinyModel(name=name, model=model, directory=directory, runs=[run(model, batch) for batch in ids])


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight, norms and biases too: at their defaults a forgotten one would not show."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if "norm" in name:
            parameter.copy_(1 + 0.3 * noise)
        else:
            parameter.copy_(noise * (1.0 if "embed" in name or name.endswith("bias") else 0.25))


def norm_in_float64(model: nn.Module) -> None:
    """Replace every RMSNorm's forward by the same formula in the dtype of its input.

    transformers' computes in float32 whatever it is given, which leaves 1e-7; the import is to be
    compared at 1e-10.
    """
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    assert len(norms) > model.config.num_hidden_layers, "transformers' norms have another name now"
    for norm in norms:
        norm.forward = MethodType(_rms_norm, norm)


def _rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))


@torch.no_grad()
def run(model: PreTrainedModel, token_ids: Tensor) -> Run:
    """transformers' logits and outputs of every layer (not the embedding)."""
    output = model(input_ids=token_ids, output_hidden_states=True, use_cache=False)
    assert output.logits.abs().max() > 1, "a model that says nothing would equal anything"
    return Run(token_ids, output.logits, tuple(output.hidden_states[1:]))

"""What cannot be imported exactly is refused, by the name of the field or tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_spec.bases.megatron_build import check_layout
from mcore_spec.errors import ConfigError, McoreSpecError, UnsupportedError
from mcore_spec.parallel.layout import Layout
from mcore_spec.weights.hf_config import describe_hf, read_hf_config
from tests.parity.hf_models import LLAMA3, YARN, TinyModel
from tests.parity.import_cases import describe
from tests.pool import RankPool

REFUSAL = "tests.parity.import_cases:refusal"
SINGLE = "model.safetensors"
Tensors = dict[str, torch.Tensor]


# --- config.json --------------------------------------------------------------------------------------

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What is changed in the configuration of a tiny model, and what must be said about it.
CONFIGS: dict[str, tuple[str, dict[str, Any], type[McoreSpecError], str]] = {
    "attention_bias": ("llama31", {"attention_bias": True}, UnsupportedError, "attention_bias = True"),
    "mlp_bias": ("llama31", {"mlp_bias": True}, UnsupportedError, "mlp_bias = True"),
    "attention_bias_qwen3": ("qwen3", {"attention_bias": True}, UnsupportedError, "attention_bias = True"),
    "quantization_config": (
        "llama31",
        {"quantization_config": {"quant_method": "fp8"}},
        UnsupportedError,
        "quantization_config = {'quant_method': 'fp8'}",
    ),
    "partial_rotary": (
        "phi3",
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
        UnsupportedError,
        "partial_rotary_factor = 0.5",
    ),
    "partial_rotary_outside": (
        "llama2",
        {"partial_rotary_factor": 0.75},
        UnsupportedError,
        "partial_rotary_factor = 0.75",
    ),
    "dynamic_rope": (
        "llama31",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        UnsupportedError,
        "rope_type = 'dynamic'",
    ),
    "rope_key_unknown": (
        "llama31",
        {"rope_parameters": {**LLAMA3, "mid_freq_factor": 2.0}},
        ConfigError,
        "unknown ['mid_freq_factor']",
    ),
    "rope_key_missing": (
        "llama_yarn",
        {"rope_parameters": {key: YARN[key] for key in YARN if key != "factor"}},
        ConfigError,
        "factor",
    ),
    "mixtral": (
        "mistral",
        {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
        UnsupportedError,
        "architectures = 'MixtralForCausalLM'",
    ),
    "gemma": (
        "llama31",
        {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
        UnsupportedError,
        "architectures = 'Gemma2ForCausalLM'",
    ),
    "no_architecture": ("llama31", {"architectures": None}, UnsupportedError, "architectures = None"),
    "hidden_act": ("llama31", {"hidden_act": "gelu_new"}, ConfigError, "hidden_act = 'gelu_new'"),
    "no_dtype": ("llama31", {"dtype": None}, ConfigError, "no dtype"),
    "dtype": ("llama31", {"dtype": "float8_e4m3fn"}, ConfigError, "dtype = 'float8_e4m3fn'"),
    "heads": ("llama31", {"num_key_value_heads": 3}, ConfigError, "num_key_value_heads = 3"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configuration(tiny_models: dict[str, TinyModel], case: str) -> None:
    """The class of the error, and field and value in its message."""
    model, changes, error_class, message = CONFIGS[case]
    raw = {**read_hf_config(tiny_models[model].directory), **changes}
    with pytest.raises(McoreSpecError) as caught:
        describe_hf(raw, where="here/config.json")
    assert type(caught.value) is error_class
    assert message in str(caught.value)
    assert "here/config.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '"llama"'])
def test_no_configuration(tmp_path: Path, text: str) -> None:
    """An unreadable config.json is named."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json"):
        describe(tmp_path)


def test_missing_configuration(tmp_path: Path) -> None:
    """And so is one that is not there."""
    with pytest.raises(ConfigError, match="no config.json"):
        describe(tmp_path)


def test_a_field_of_another_class_means_nothing(tiny_models: dict[str, TinyModel]) -> None:
    """transformers' Llama has no windows and Mistral no windows by layer, whatever config.json carries along."""
    llama, mistral = (read_hf_config(tiny_models[name].directory) for name in ("llama31", "mistral_window"))
    kinds = ["sliding_attention", "full_attention"] * 2
    assert describe_hf({**llama, "sliding_window": 7}, where="") == describe_hf(llama, where="")
    assert describe_hf({**mistral, "layer_types": kinds}, where="") == describe_hf(mistral, where="")


def test_spelling_of_older_transformers(tiny_models: dict[str, TinyModel]) -> None:
    """rope_theta and rope_scaling apart, type for rope_type, torch_dtype for dtype: the same base."""
    for name in ("llama31", "llama_linear", "llama_yarn", "phi3_longrope_window", "qwen3"):
        raw = read_hf_config(tiny_models[name].directory)
        old = {key: value for key, value in raw.items() if key not in ("rope_parameters", "dtype")}
        rope = dict(raw["rope_parameters"])
        rope.pop("partial_rotary_factor", None)
        old |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": raw["dtype"]}
        kind = rope.pop("rope_type")
        old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
        assert describe_hf(old, where=name) == describe_hf(raw, where=name), name


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tensor=4), "num_key_value_heads = 2"),
        (Layout(tensor=3), "num_attention_heads = 4"),
        (Layout(pipeline=3), "does not divide 4 decoder layers over 3 stages"),
        (Layout(pipeline=3, last_stage_layers=1), "does not divide 3 decoder layers over 2 stages"),
        (Layout(pipeline=2, last_stage_layers=4), "decoder_last_pipeline_num_layers = 4"),
        (Layout(last_stage_layers=1), "decoder_last_pipeline_num_layers = 1"),
    ],
)
def test_layout(tiny_models: dict[str, TinyModel], layout: Layout, message: str) -> None:
    """Sizes that do not divide are named."""
    with pytest.raises(ConfigError, match=message):
        check_layout(describe(tiny_models["llama31"].directory), layout)


# --- weights ------------------------------------------------------------------------------------------


def _rewrite(directory: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / SINGLE)


def _reconfigure(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _narrow(name: str, dim: int, size: int) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: tensors[name].narrow(dim, 0, size)})


LAYER = "model.layers.2."
TENSORS: dict[str, tuple[str, Callable[[Tensors], Any], list[str]]] = {
    "missing": (
        "llama31",
        lambda tensors: tensors.pop(f"{LAYER}self_attn.k_proj.weight"),
        [f"missing {LAYER}self_attn.k_proj.weight; not known nothing"],
    ),
    "missing_bias": (
        "qwen15",
        lambda tensors: tensors.pop(f"{LAYER}self_attn.k_proj.bias"),
        [f"missing {LAYER}self_attn.k_proj.bias"],
    ),
    "missing_head": ("llama31", lambda tensors: tensors.pop("lm_head.weight"), ["missing lm_head.weight"]),
    "left_over": (
        "llama31",
        lambda tensors: tensors.update({f"{LAYER}self_attn.q_norm.weight": torch.ones(8)}),
        [f"missing nothing; not known {LAYER}self_attn.q_norm.weight"],
    ),
    "another_layer": (
        "llama31",
        lambda tensors: tensors.update({"model.layers.4.input_layernorm.weight": torch.ones(32)}),
        ["not known model.layers.4.input_layernorm.weight"],
    ),
    "tied_head": (
        "smollm2_tied",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1e-9}),
        ["tie_word_embeddings", "lm_head.weight"],
    ),
    "tied_head_short": (
        "smollm2_tied",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"][:100].clone()}),
        ["tie_word_embeddings", "lm_head.weight"],
    ),
    "vocabulary_short": ("llama31", _narrow("lm_head.weight", 0, 102), ["lm_head.weight", "102", "103"]),
    "norm_short": ("llama31", _narrow("model.norm.weight", 0, 31), ["model.norm.weight", "31", "32"]),
    "query_short": (
        "llama31",
        _narrow(f"{LAYER}self_attn.q_proj.weight", 0, 24),
        [f"{LAYER}self_attn.q_proj.weight", "24", "32"],
    ),
    "query_narrow": (
        "llama31",
        _narrow(f"{LAYER}self_attn.q_proj.weight", 1, 31),
        [f"{LAYER}self_attn.q_proj.weight", "31", "32"],
    ),
    "projection_narrow": (
        "llama31",
        _narrow(f"{LAYER}self_attn.o_proj.weight", 1, 30),
        [f"{LAYER}self_attn.o_proj.weight", "30", "32"],
    ),
    "stacked_short": ("phi3", _narrow(f"{LAYER}mlp.gate_up_proj.weight", 0, 95), ["gate_up_proj.weight", "95", "96"]),
    "one_dimension": (
        "llama31",
        lambda tensors: tensors.update({f"{LAYER}mlp.down_proj.weight": torch.ones(32, dtype=torch.float64)}),
        [f"{LAYER}mlp.down_proj.weight", "(32,)"],
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(rank_pool: RankPool, copy_of: Callable[[str], Path], case: str) -> None:
    """Names and shapes must be those of the configuration, all of them."""
    model, change, messages = TENSORS[case]
    directory = copy_of(model)
    _rewrite(directory, change)
    error = rank_pool.run(REFUSAL, world_size=1, directory=directory)[0]
    assert error is not None and error[0] == "CheckpointError", error
    for message in [str(directory), *messages]:
        assert message in error[1]


@pytest.mark.parametrize(
    ("model", "changes", "name"),
    [
        ("llama31", {"vocab_size": 96}, "model.embed_tokens.weight"),
        ("llama31", {"intermediate_size": 40}, "mlp.gate_proj.weight"),
        ("llama31", {"num_key_value_heads": 1}, "self_attn.k_proj.weight"),
        ("phi3", {"intermediate_size": 40}, "mlp.gate_up_proj.weight"),
        ("phi3", {"num_key_value_heads": 4}, "self_attn.qkv_proj.weight"),
        ("qwen3", {"head_dim": 8}, "self_attn.q_proj.weight"),
    ],
)
def test_a_configuration_that_asks_for_less(
    rank_pool: RankPool, copy_of: Callable[[str], Path], model: str, changes: dict[str, Any], name: str
) -> None:
    """Part of a tensor would fill the model; that must not pass for the whole."""
    directory = copy_of(model)
    _reconfigure(directory, **changes)
    error = rank_pool.run(REFUSAL, world_size=1, directory=directory)[0]
    assert error is not None and error[0] == "CheckpointError", error
    assert name in error[1] and str(directory) in error[1]


def test_another_dtype(rank_pool: RankPool, copy_of: Callable[[str], Path]) -> None:
    """Refused with both dtypes, unless a conversion is asked for."""
    directory = copy_of("llama31")
    _reconfigure(directory, dtype="bfloat16")
    kind, message = rank_pool.run(REFUSAL, world_size=1, directory=directory)[0]
    assert kind == "ConfigError"
    for part in ("model.embed_tokens.weight", "torch.float64", "torch.bfloat16", "params_dtype"):
        assert part in message
    assert rank_pool.run(REFUSAL, world_size=1, directory=directory, cast_to="bfloat16")[0] is None


def test_what_is_not_refused(rank_pool: RankPool, copy_of: Callable[[str], Path]) -> None:
    """A tied head that is stored all the same, and the frequencies that old files carry."""
    directory = copy_of("smollm2_tied")

    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    _rewrite(directory, add)
    assert rank_pool.run(REFUSAL, world_size=1, directory=directory)[0] is None

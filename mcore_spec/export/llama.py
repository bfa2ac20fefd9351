"""What the exports of drafts made of Llama layers share: their configuration, and how they are served."""

from __future__ import annotations

import json
import math
from typing import Any

from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.config import BaseArchitecture, EagleArchitectureConfig, RopeConfig
from mcore_spec.drafts.resolve import resolve_rope
from mcore_spec.errors import UnsupportedError
from mcore_spec.export.plan import token_ids
from mcore_spec.layers.rotary import rotary_frequencies
from mcore_spec.weights.draft_names import Table

# Tensors of one decoder layer, in the draft as in engines' files.
LAYER = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_proj.bias",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.bias",
    "self_attn.o_proj.bias",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "mlp.gate_proj.bias",
    "mlp.up_proj.bias",
    "mlp.down_proj.bias",
)
LAYERS: Table = [(f"layers.{{i}}.{name}", f"layers.{{i}}.{name}") for name in LAYER]
# Tokens that the written serving commands propose.
NUM_DRAFT_TOKENS = 3


def llama_config(architecture: EagleArchitectureConfig, record: CheckpointRecord, *, num_layers: int) -> dict[str, Any]:
    """The part of ``config.json`` that describes a draft's decoder layers.

    Raises:
        UnsupportedError: a layer that engines' Llama would refuse, or would build otherwise.
    """
    base = record.base
    rope = resolve_rope(architecture, base)
    _check_llama(architecture, rope, base)
    scaling = None if rope.rope_type == "default" else {"rope_type": rope.rope_type, **rope.scaling}
    return {
        "model_type": "llama",
        "hidden_size": base.hidden_size,
        "intermediate_size": architecture.intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_key_value_heads,
        "head_dim": architecture.head_dim,
        "hidden_act": architecture.hidden_act,
        "rms_norm_eps": architecture.rms_norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": rope.to_hf(),
        # It sizes the engines' table of angles: anything shorter than the base's fails on long prompts.
        "max_position_embeddings": base.max_position_embeddings,
        "vocab_size": base.vocab_size,
        "attention_bias": architecture.attention_bias,
        "attention_dropout": 0.0,
        "mlp_bias": architecture.mlp_bias,
        "initializer_range": architecture.initializer_range,
        "tie_word_embeddings": False,
        "torch_dtype": base.dtype,
        "dtype": base.dtype,
        "use_cache": True,
        **token_ids(record),
    }


def _check_llama(architecture: EagleArchitectureConfig, rope: RopeConfig, base: BaseArchitecture) -> None:
    """Refuse a layer that engines' Llama would refuse, or would build otherwise.

    Raises:
        UnsupportedError: heads, an activation or a rotary embedding that a Llama configuration cannot say.
    """
    heads, head_dim = architecture.num_attention_heads, architecture.head_dim
    assert heads is not None
    assert head_dim is not None
    if base.hidden_size % heads:
        raise UnsupportedError(
            f"num_attention_heads = {heads} does not divide hidden_size = {base.hidden_size}: engines read the draft "
            "as a Llama configuration, which must divide; convert again with a number of heads that does"
        )
    if architecture.hidden_act != "silu":
        raise UnsupportedError(
            f"hidden_act = {architecture.hidden_act!r}: engines' Llama layers know silu only; convert again with "
            "hidden_act = silu in the draft's configuration"
        )
    if rope.rope_type == "longrope":
        # Engines know no attention_factor here: they compute it from the two lengths.
        original = rope.scaling["original_max_position_embeddings"]
        ratio = {**rope.scaling, "factor": base.max_position_embeddings / original, "attention_factor": None}
        expected = rotary_frequencies(rope.model_copy(update={"scaling": ratio}), head_dim, beyond_original=False)
        actual = rotary_frequencies(rope, head_dim, beyond_original=False)
        if not math.isclose(actual.attention_scaling, expected.attention_scaling):
            raise UnsupportedError(
                f"rope_scaling of type 'longrope' with a factor of {actual.attention_scaling} on cos and sin: engines "
                f"compute {expected.attention_scaling} from max_position_embeddings = {base.max_position_embeddings} "
                f"and original_max_position_embeddings = {original}; no field says another one"
            )


def serving_commands(vllm_method: str) -> dict[str, str]:
    """Engine -> command, for a draft directory beside its base."""
    speculative = json.dumps({"method": vllm_method, "model": "{draft}", "num_speculative_tokens": NUM_DRAFT_TOKENS})
    commands = {"vLLM": f"vllm serve {{base}} --speculative-config '{speculative}'"}
    if vllm_method == "eagle3":
        commands["SGLang"] = (
            "python -m sglang.launch_server --model-path {base} --speculative-algorithm EAGLE3 "
            f"--speculative-draft-model-path {{draft}} --speculative-num-steps {NUM_DRAFT_TOKENS} "
            f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {NUM_DRAFT_TOKENS + 1}"
        )
        # The file names the draft relatively, so that the directory can move.
        commands["TensorRT-LLM"] = "cd {draft} && trtllm-serve {base} --extra_llm_api_options extra_llm_api.yaml"
    return commands

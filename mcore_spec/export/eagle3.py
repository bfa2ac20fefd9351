"""EAGLE-3 for vLLM, SGLang and TensorRT-LLM (one directory), and in the form of `speculators`.

Conventions differ in one place that no engine checks: which number means which layer. Ours count
*outputs* (0 = output of the first layer). At the top level of the configuration vLLM reads *boundaries*
(0 = embedding, output + 1); the nested list is read as outputs by SGLang and TensorRT-LLM.
"""

from __future__ import annotations

import json
from typing import Any

from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.config import BaseArchitecture, EagleArchitectureConfig, RopeConfig
from mcore_spec.drafts.eagle3 import Eagle3Draft
from mcore_spec.drafts.resolve import resolve_rope
from mcore_spec.errors import UnsupportedError
from mcore_spec.export.plan import ExportFormat, ExportPlan, target_to_draft, token_ids
from mcore_spec.weights.draft_names import EAGLE3, EAGLE3_SEVERAL_LAYERS

# Tokens that the written serving commands propose.
NUM_DRAFT_TOKENS = 3
_SPECULATORS_VERSION = "0.9.0"
# RoPE scalings that an engine's Llama model reads from a draft's configuration.
_LLAMA_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def plan_eagle3(draft: Eagle3Draft, record: CheckpointRecord, export_format: ExportFormat) -> ExportPlan:
    """What to write.

    Args:
        draft: this rank's part.
        record: base and conversion.
        export_format: whose form.

    Raises:
        UnsupportedError: a draft that would load and serve wrongly.
    """
    check_servable(draft, record.base)
    return _plan_hf(draft, record) if export_format == "hf" else _plan_speculators(draft, record)


def check_servable(draft: Eagle3Draft, base: BaseArchitecture) -> None:
    """Refuse what an engine would load and get wrong.

    Raises:
        UnsupportedError: no valid d2t, unsorted aux layers, or a rope that the format cannot say.
    """
    if list(draft.aux_layer_ids) != sorted(set(draft.aux_layer_ids)):
        raise UnsupportedError(
            f"eagle_aux_hidden_state_layer_ids = {list(draft.aux_layer_ids)} is not sorted: engines join the "
            "hidden states in layer order; convert again with sorted layers"
        )
    if draft.has_reduced_vocabulary:
        targets = draft.head_token_ids()
        in_range = bool((targets >= 0).all()) and bool((targets < base.vocab_size).all())
        if not in_range or bool((targets.diff() <= 0).any()):
            raise UnsupportedError(
                f"the draft vocabulary of {targets.shape[0]} entries has no valid d2t: an engine would propose the "
                "wrong ids; convert again with --draft-vocab-cache"
            )
    check_heads(draft.architecture, base)
    check_rope(resolve_rope(draft.architecture, base))


def check_heads(architecture: EagleArchitectureConfig, base: BaseArchitecture) -> None:
    """Refuse heads that transformers' Llama configuration, which engines read with, does not take.

    Raises:
        UnsupportedError: a number of heads that does not divide the hidden size, whatever the head_dim.
    """
    heads = architecture.num_attention_heads
    assert heads is not None
    if base.hidden_size % heads:
        raise UnsupportedError(
            f"num_attention_heads = {heads} does not divide hidden_size = {base.hidden_size}: engines read the draft "
            "as a Llama configuration, which must divide; convert again with a number of heads that does"
        )


def check_rope(rope: RopeConfig) -> None:
    """Refuse a rotary embedding that a Llama-type configuration cannot carry.

    Raises:
        UnsupportedError: a type of scaling that is not in the format.
    """
    if rope.rope_type not in _LLAMA_ROPE_TYPES:
        raise UnsupportedError(
            f"rope_scaling of type {rope.rope_type!r} cannot be said in a Llama configuration; "
            f"it can be {', '.join(_LLAMA_ROPE_TYPES)}"
        )


def llama_config(architecture: EagleArchitectureConfig, record: CheckpointRecord, *, num_layers: int) -> dict[str, Any]:
    """The part of ``config.json`` that describes a draft's decoder layers, for drafts that are Llama layers."""
    base = record.base
    rope = resolve_rope(architecture, base)
    check_rope(rope)
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


def _flags(architecture: EagleArchitectureConfig) -> dict[str, bool]:
    """Explicit even when false: the readers' defaults differ."""
    return {
        "norm_before_residual": architecture.norm_before_residual,
        "norm_before_fc": architecture.norm_before_fc,
        "fc_norm": architecture.fc_norm,
        "norm_output": architecture.norm_output,
    }


def boundary_ids(output_ids: tuple[int, ...]) -> list[int]:
    """Output ids in vLLM's and speculators' convention: boundary i + 1 is the output of layer i."""
    return [layer + 1 for layer in output_ids]


def _plan_hf(draft: Eagle3Draft, record: CheckpointRecord) -> ExportPlan:
    architecture = draft.architecture
    num_layers = architecture.num_hidden_layers
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **llama_config(architecture, record, num_layers=num_layers),
        "draft_vocab_size": architecture.draft_vocab_size,
        **_flags(architecture),
        "eagle_aux_hidden_state_layer_ids": boundary_ids(draft.aux_layer_ids),
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": list(draft.aux_layer_ids),
        },
    }
    remarks = []
    if draft.aux_layer_ids[0] != 1:
        remarks.append(
            f"The aux layers {list(draft.aux_layer_ids)} do not start at 1. Newer SGLang adds 1 to the list only if it "
            "does, and would read the wrong layers: serve this draft with vLLM or TensorRT-LLM."
        )
    if num_layers > 1:
        remarks.append(f"The draft has {num_layers} layers; SGLang's EAGLE-3 does not read `layers.{{i}}` names.")
    return ExportPlan(
        config=config,
        table=EAGLE3 if num_layers == 1 else EAGLE3_SEVERAL_LAYERS,
        base_head="lm_head.weight" if draft.lm_head is None else None,
        serve=serving_commands("eagle3"),
        extra_files={"extra_llm_api.yaml": _TENSORRT_LLM_YAML},
        remarks=tuple(remarks),
    )


def _plan_speculators(draft: Eagle3Draft, record: CheckpointRecord) -> ExportPlan:
    architecture = draft.architecture
    layers = llama_config(architecture, record, num_layers=architecture.num_hidden_layers)
    computed = {}
    if draft.has_reduced_vocabulary:
        computed["t2d"] = target_to_draft(draft.d2t, record.base.vocab_size)
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": NUM_DRAFT_TOKENS,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    verifier = {
        "name_or_path": record.identity.source,
        "architectures": record.identity.hf_config.get("architectures", []),
    }
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": _SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": verifier,
        },
        "transformer_layer_config": layers,
        "draft_vocab_size": architecture.draft_vocab_size,
        **_flags(architecture),
        "eagle_aux_hidden_state_layer_ids": boundary_ids(draft.aux_layer_ids),
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "torch_dtype": record.base.dtype,
        "dtype": record.base.dtype,
    }
    return ExportPlan(
        config=config,
        table=EAGLE3_SEVERAL_LAYERS,
        base_head="lm_head.weight" if draft.lm_head is None else None,
        base_embedding="embed_tokens.weight",
        computed=computed,
        serve={"vLLM": "vllm serve {draft}"},
        remarks=("The base is named in `speculators_config.verifier`; change it if the base moves.",),
    )


_TENSORRT_LLM_YAML = f"""\
# From this directory: trtllm-serve BASE --extra_llm_api_options extra_llm_api.yaml
speculative_config:
  decoding_type: Eagle
  max_draft_len: {NUM_DRAFT_TOKENS}
  speculative_model_dir: .
"""


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

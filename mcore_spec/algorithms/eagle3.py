"""EAGLE-3 for vLLM, SGLang and TensorRT-LLM (one directory), and in the form of `speculators`.

Conventions differ in one place that no engine checks: which number means which layer. Ours count
*outputs* (0 = output of the first layer). At the top level of the configuration vLLM reads *boundaries*
(0 = embedding, output + 1); the nested list is read as outputs by SGLang and TensorRT-LLM.
"""

from __future__ import annotations

from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.config import BaseArchitecture, EagleArchitectureConfig
from mcore_spec.drafts.eagle3 import Eagle3Draft
from mcore_spec.drafts.resolve import resolve_aux_layers
from mcore_spec.drafts.vocab_map import check_is_filled
from mcore_spec.errors import UnsupportedError
from mcore_spec.export.llama import LAYER, LAYERS, NUM_DRAFT_TOKENS, llama_config, serving_commands
from mcore_spec.export.plan import ExportFormat, ExportPlan, check_format, target_to_draft
from mcore_spec.weights.draft_names import Table

_OUTER: Table = [
    ("fc.weight", "fc.weight"),
    ("input_norm.weight", "input_norm.weight"),
    ("fc_norm.{i}.weight", "fc_norm.{i}.weight"),
    ("norm.weight", "norm.weight"),
    ("lm_head.weight", "lm_head.weight"),
    ("d2t", "d2t"),
]
# The one layer of a draft, under the name that every engine knows: SGLang drops "layers.0." without a word.
# Several layers are known as "layers.{i}." only.
NAMES: Table = [*_OUTER, *((f"layers.0.{name}", f"midlayer.{name}") for name in ("hidden_norm.weight", *LAYER))]
NAMES_OF_SEVERAL_LAYERS: Table = [
    *_OUTER,
    ("layers.0.hidden_norm.weight", "layers.0.hidden_norm.weight"),
    *LAYERS,
]

_SPECULATORS_VERSION = "0.9.0"


def plan_eagle3(draft: Eagle3Draft, record: CheckpointRecord, export_format: ExportFormat) -> ExportPlan:
    """What to write.

    Args:
        draft: this rank's part.
        record: base and conversion.
        export_format: whose form.

    Raises:
        UnsupportedError: a format that does not know EAGLE-3, or a draft that would load and serve wrongly.
    """
    check_format(export_format, draft, ("hf", "speculators"))
    check_servable(draft, record.base)
    return _plan_hf(draft, record) if export_format == "hf" else _plan_speculators(draft, record)


def check_servable(draft: Eagle3Draft, base: BaseArchitecture) -> None:
    """Refuse what an engine would load and get wrong.

    Raises:
        UnsupportedError: no valid d2t, or unsorted aux layers.
    """
    if list(draft.aux_layer_ids) != sorted(set(draft.aux_layer_ids)):
        raise UnsupportedError(
            f"eagle_aux_hidden_state_layer_ids = {list(draft.aux_layer_ids)} is not sorted: engines join the "
            "hidden states in layer order; convert again with sorted layers"
        )
    if draft.has_reduced_vocabulary:
        check_is_filled(draft.head_token_ids(), vocab_size=base.vocab_size)


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
    serve = serving_commands("eagle3")
    if draft.aux_layer_ids[0] != 1:
        del serve["SGLang"]
        remarks.append(
            f"The aux layers {list(draft.aux_layer_ids)} do not start at 1. Newer SGLang adds 1 to the list only if it "
            "does, and would read the wrong layers: serve this draft with vLLM or TensorRT-LLM."
        )
    if num_layers > 1 or any(_flags(architecture).values()) or architecture.attention_bias or architecture.mlp_bias:
        serve.pop("SGLang", None)
        remarks.append(
            "Several layers, norm flags and biases are known to be read by vLLM only; SGLang drops tensors that it "
            "does not know without a word."
        )
    return ExportPlan(
        config=config,
        table=NAMES if num_layers == 1 else NAMES_OF_SEVERAL_LAYERS,
        base_head="lm_head.weight" if draft.lm_head is None else None,
        serve=serve,
        extra_files={"extra_llm_api.yaml": _tensorrt_llm_yaml(draft, record.base)},
        can_be_quantized=True,
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
        table=NAMES_OF_SEVERAL_LAYERS,
        base_head="lm_head.weight" if draft.lm_head is None else None,
        base_embedding="embed_tokens.weight",
        computed=computed,
        serve={"vLLM": "vllm serve {draft}"},
        remarks=("The base is named in `speculators_config.verifier`; change it if the base moves.",),
    )


def _tensorrt_llm_yaml(draft: Eagle3Draft, base: BaseArchitecture) -> str:
    """Options of ``trtllm-serve``; layers other than its default three are named, in its convention (outputs)."""
    lines = [
        "# From this directory: trtllm-serve BASE --extra_llm_api_options extra_llm_api.yaml",
        "speculative_config:",
        "  decoding_type: Eagle",
        f"  max_draft_len: {NUM_DRAFT_TOKENS}",
        "  speculative_model_dir: .",
    ]
    default = resolve_aux_layers(EagleArchitectureConfig(use_aux_hidden_state=True), base)
    if tuple(draft.aux_layer_ids) != default:
        lines.append(f"  eagle3_layers_to_capture: {list(draft.aux_layer_ids)}")
    return "\n".join(lines) + "\n"

"""EAGLE-MTP: as a directory of its own with DeepSeek-V3's names, or with its base as one model in MiMo's layout.

The first is read by no engine. vLLM serves the second (method "mtp"): a Qwen2 model whose configuration says that it
has a layer for multi-token prediction.
"""

from __future__ import annotations

import json
from typing import Any

from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.drafts.mtp import MiMoDraft, MTPDraft
from mcore_spec.drafts.resolve import resolve_rope
from mcore_spec.errors import UnsupportedError
from mcore_spec.export.llama import LAYER, LAYERS, NUM_DRAFT_TOKENS, llama_config
from mcore_spec.export.plan import ExportFormat, ExportPlan, check_hf
from mcore_spec.weights.draft_names import Table

NAMES: Table = [
    ("enorm.weight", "enorm.weight"),
    ("hnorm.weight", "hnorm.weight"),
    ("eh_proj.weight", "eh_proj.weight"),
    ("norm.weight", "norm.weight"),
    *LAYERS,
]
_MIMO = "model.mtp_layers.0"
MIMO_NAMES: Table = [
    ("enorm.weight", f"{_MIMO}.token_layernorm.weight"),
    ("hnorm.weight", f"{_MIMO}.hidden_layernorm.weight"),
    ("eh_proj.weight", f"{_MIMO}.input_proj.weight"),
    ("norm.weight", f"{_MIMO}.final_layernorm.weight"),
    *((f"layers.0.{name}", f"{_MIMO}.{name}") for name in LAYER),
]


def plan_mtp(draft: MTPDraft, record: CheckpointRecord, export_format: ExportFormat) -> ExportPlan:
    """What to write.

    Raises:
        UnsupportedError: a format that does not know this kind of draft, or layers that engines could not follow.
    """
    if export_format == "mimo":
        return _plan_mimo(draft, record)
    check_hf(export_format, draft)
    architecture, base = draft.architecture, record.base
    is_mimo = isinstance(draft, MiMoDraft)
    config = {
        "architectures": ["EagleMTPModel"],
        **llama_config(architecture, record, num_layers=architecture.num_hidden_layers),
        # The layer is the base's own, which a plain Llama configuration does not say.
        "model_type": "eagle_mtp",
        "base_family": base.family,
        "qkv_bias": base.qkv_bias or architecture.attention_bias,
        "qk_norm": base.qk_norm,
        "num_nextn_predict_layers": 1,
        "reads_before_final_norm": is_mimo,
    }
    order = "[hidden ; embedding]" if is_mimo else "[embedding ; hidden]"
    remark = (
        "No engine loads this directory by itself: engines read multi-token-prediction layers from the base's "
        f"own checkpoint. The names are DeepSeek-V3's; the input of `eh_proj` is {order}."
    )
    return ExportPlan(config=config, table=NAMES, remarks=(remark,))


def _plan_mimo(draft: MTPDraft, record: CheckpointRecord) -> ExportPlan:
    """Beside the base's tensors; the configuration is what changes in the base's."""
    _check_mimo(draft, record)
    speculative = json.dumps({"method": "mtp", "num_speculative_tokens": NUM_DRAFT_TOKENS})
    return ExportPlan(
        config={"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1},
        table=MIMO_NAMES,
        # The engine gives its MTP layer a head of its own, which it fills from the files.
        base_head="lm_head.weight" if record.base.tie_word_embeddings else None,
        serve={"vLLM": f"vllm serve {{draft}} --speculative-config '{speculative}'"},
        remarks=("Base and draft are one model here, in the layout of MiMo: the engine needs no other directory.",),
    )


def _check_mimo(draft: MTPDraft, record: CheckpointRecord) -> None:
    """Refuse what MiMo's configuration, which is its base's, cannot say of the draft.

    Raises:
        UnsupportedError: names what it is.
    """
    architecture, base = draft.architecture, record.base
    if not isinstance(draft, MiMoDraft) or not base.qkv_bias or base.qk_norm:
        raise UnsupportedError(
            f"export_format = 'mimo' with a base of the family {base.family}: the layout is that of bases like Qwen2 "
            "(biases on q, k and v, no q/k norms); choose hf"
        )
    own: dict[str, Any] = {
        "num_hidden_layers": architecture.num_hidden_layers,
        "attention_bias": architecture.attention_bias,
        "mlp_bias": architecture.mlp_bias,
        "rope": resolve_rope(architecture, base),
        "window_size": base.window_size,
    }
    needed: dict[str, Any] = {
        "num_hidden_layers": 1,
        "attention_bias": False,
        "mlp_bias": False,
        "rope": base.rope,
        "window_size": None,
    }
    for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"):
        own[name], needed[name] = architecture.model_dump()[name], base.model_dump()[name]
    own["rms_norm_eps"], needed["rms_norm_eps"] = architecture.rms_norm_eps, base.rms_norm_eps
    for name, value in own.items():
        if value != needed[name]:
            raise UnsupportedError(
                f"export_format = 'mimo' needs {name} = {needed[name]}, this draft has {value}: the engine builds the "
                "layer as the base's; convert again without it, or choose hf"
            )

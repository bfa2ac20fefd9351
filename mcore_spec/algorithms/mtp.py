"""EAGLE-MTP: as a directory of its own with DeepSeek-V3's names, or with its base as one model in MiMo's layout.

The first is read by no engine. vLLM serves the second (method "mtp"): a Qwen2 model whose configuration says that it
has a layer for multi-token prediction.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.conversion import as_base, conversion_of
from mcore_spec.drafts.draft import Draft
from mcore_spec.drafts.mtp import MiMoDraft, MTPDraft
from mcore_spec.drafts.resolve import resolve_rope
from mcore_spec.errors import CheckpointError, ConfigError, UnsupportedError
from mcore_spec.export.llama import LAYER, LAYERS, NUM_DRAFT_TOKENS, llama_config
from mcore_spec.export.plan import ExportFormat, ExportPlan, check_hf
from mcore_spec.export.reader import read_shard
from mcore_spec.parallel.layout import run_on_every_rank
from mcore_spec.parallel.sharding import sharded_tensors, whole_shape
from mcore_spec.parallel.tensor_parallel import TensorParallel
from mcore_spec.weights.draft_names import Table, stored_name
from mcore_spec.weights.hf_config import MIMO_LAYERS
from mcore_spec.weights.safetensors_io import BESIDE_BASE_NAME, WeightDirectory

NAMES: Table = [
    ("enorm.weight", "enorm.weight"),
    ("hnorm.weight", "hnorm.weight"),
    ("eh_proj.weight", "eh_proj.weight"),
    ("norm.weight", "norm.weight"),
    *LAYERS,
]
_MIMO = f"{MIMO_LAYERS}0"
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


@torch.no_grad()
def start_as_base_mtp(model: nn.Module, directory: Path) -> None:
    """Fill an EAGLE-MTP draft with the base's own layer for multi-token prediction; every rank must call.

    Args:
        model: converted; its draft's other weights are replaced.
        directory: the base's files, in MiMo's layout.

    Raises:
        CheckpointError: tensors missing, left over or of another shape, or several such layers.
        ConfigError: a draft of another kind.
    """
    base = as_base(model)
    draft, conversion = base.draft(), conversion_of(model)
    if conversion is None or not issubclass(conversion.draft_class, MTPDraft):
        raise ConfigError("draft_init = mtp is for EAGLE-MTP drafts; give --export-eagle-algorithm eagle-mtp")
    run_on_every_rank(lambda: None if draft is None else _read_base_mtp(draft, base.tp, directory))
    conversion.config = conversion.config.model_copy(update={"eagle_reuse_base_mtp": True})


def _read_base_mtp(draft: Draft, tp: TensorParallel, directory: Path) -> None:
    if not isinstance(draft, MiMoDraft):
        raise ConfigError(
            "draft_init = mtp: the draft reads the base's state behind the final norm, the base's own layer before it; "
            "leave eagle_aux_hidden_state_layer_ids out"
        )
    with WeightDirectory(directory, below=MIMO_LAYERS, beside=BESIDE_BASE_NAME) as weights:
        entries = {stored_name(MIMO_NAMES, entry.name): entry for entry in sharded_tensors(draft)}
        entries = {name.removeprefix(MIMO_LAYERS): entry for name, entry in entries.items()}
        found = {name: info.shape for name, info in weights.tensors.items()}
        wanted = {name: whole_shape(entry, tp) for name, entry in entries.items()}
        if found != wanted:
            different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            raise CheckpointError(
                f"{directory}: {MIMO_LAYERS}* is not one layer of this draft's sizes: {', '.join(different[:8])}; "
                "leave the draft's sizes to follow the base, or choose draft_init = random"
            )
        for name, entry in entries.items():
            entry.tensor.copy_(read_shard(weights, name, entry, tp))


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

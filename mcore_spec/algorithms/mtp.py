"""EAGLE-MTP as a directory of its own, with DeepSeek-V3's names (enorm, hnorm, eh_proj)."""

from __future__ import annotations

from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.drafts.mtp import MTPDraft
from mcore_spec.export.llama import LAYERS, llama_config
from mcore_spec.export.plan import ExportFormat, ExportPlan, check_hf
from mcore_spec.weights.draft_names import Table

NAMES: Table = [
    ("enorm.weight", "enorm.weight"),
    ("hnorm.weight", "hnorm.weight"),
    ("eh_proj.weight", "eh_proj.weight"),
    ("norm.weight", "norm.weight"),
    *LAYERS,
]


def plan_mtp(draft: MTPDraft, record: CheckpointRecord, export_format: ExportFormat) -> ExportPlan:
    """What to write.

    Raises:
        UnsupportedError: a format that does not know this kind of draft, or layers that engines could not follow.
    """
    check_hf(export_format, draft)
    architecture, base = draft.architecture, record.base
    config = {
        "architectures": ["EagleMTPModel"],
        **llama_config(architecture, record, num_layers=architecture.num_hidden_layers),
        # The layer is the base's own, which a plain Llama configuration does not say.
        "model_type": "eagle_mtp",
        "base_family": base.family,
        "qkv_bias": base.qkv_bias or architecture.attention_bias,
        "qk_norm": base.qk_norm,
        "num_nextn_predict_layers": 1,
    }
    remark = (
        "No engine loads this directory by itself: engines read multi-token-prediction layers from the base's "
        "own checkpoint. The names are DeepSeek-V3's; the input of `eh_proj` is [embedding ; hidden]."
    )
    return ExportPlan(config=config, table=NAMES, remarks=(remark,))

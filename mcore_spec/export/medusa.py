"""Medusa for vLLM: residual blocks and one head for each position."""

from __future__ import annotations

from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.drafts.medusa import MedusaDraft
from mcore_spec.export.plan import ExportPlan, token_ids
from mcore_spec.weights.draft_names import MEDUSA


def plan_medusa(draft: MedusaDraft, record: CheckpointRecord) -> ExportPlan:
    """What to write."""
    config, base = draft.config, record.base
    values = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": base.hidden_size,
        "vocab_size": base.vocab_size,
        "num_heads": config.medusa_num_heads,
        "num_hidden_layers": config.medusa_num_layers,
        "medusa_fc_bias": True,
        "max_paths": 64,
        "topk": 10,
        "max_position_embeddings": base.max_position_embeddings,
        "torch_dtype": base.dtype,
        "dtype": base.dtype,
        **token_ids(record),
    }
    speculative = f'{{"method": "medusa", "model": "{{draft}}", "num_speculative_tokens": {config.medusa_num_heads}}}'
    serve = {"vLLM": f"vllm serve {{base}} --speculative-config '{speculative}'"}
    return ExportPlan(config=values, table=MEDUSA, serve=serve)

"""EAGLE-1 for vLLM (method "eagle"): Llama layers without the first input norm, the base's embedding and head."""

from __future__ import annotations

from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.drafts.eagle1 import Eagle1Draft
from mcore_spec.export.llama import llama_config, serving_commands
from mcore_spec.export.plan import ExportPlan
from mcore_spec.weights.draft_names import EAGLE1


def plan_eagle1(draft: Eagle1Draft, record: CheckpointRecord) -> ExportPlan:
    """What to write."""
    architecture = draft.architecture
    config = {
        "architectures": ["LlamaForCausalLM"],
        **llama_config(architecture, record, num_layers=architecture.num_hidden_layers),
    }
    return ExportPlan(config=config, table=EAGLE1, serve=serving_commands("eagle"))

"""EAGLE-1 for vLLM (method "eagle"): Llama layers without the first input norm, the base's embedding and head."""

from __future__ import annotations

from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.drafts.eagle1 import Eagle1Draft
from mcore_spec.export.llama import LAYERS, llama_config, serving_commands
from mcore_spec.export.plan import ExportFormat, ExportPlan, check_hf
from mcore_spec.weights.draft_names import Table

NAMES: Table = [("fc.weight", "fc.weight"), *LAYERS]


def plan_eagle1(draft: Eagle1Draft, record: CheckpointRecord, export_format: ExportFormat) -> ExportPlan:
    """What to write.

    Raises:
        UnsupportedError: a format that does not know this kind of draft, or layers that engines could not follow.
    """
    check_hf(export_format, draft)
    architecture = draft.architecture
    config = {
        "architectures": ["LlamaForCausalLM"],
        **llama_config(architecture, record, num_layers=architecture.num_hidden_layers),
    }
    return ExportPlan(config=config, table=NAMES, serve=serving_commands("eagle"), can_be_quantized=True)

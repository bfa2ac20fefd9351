"""The model card beside an exported draft."""

from __future__ import annotations

from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.export.plan import ExportPlan

_TEMPLATE = """\
---
library_name: mcore_spec
base_model: {base}
tags: [speculative-decoding, {algorithm}]
---
# {algorithm} draft for {base}

Made with mcore_spec. {num_parameters:,} parameters, {dtype}.

{serving}{remarks}"""


def model_card(
    plan: ExportPlan, record: CheckpointRecord, *, algorithm: str, num_parameters: int, is_quantized: bool = False
) -> str:
    """Markdown: what the draft is, how to serve it, what to know."""
    quantized = ""
    if is_quantized and record.quantization is not None:
        quantized = f"; quantised by the recipe {record.quantization.recipe.name}"
    # A base from a Megatron-LM checkpoint has no directory yet that an engine could load.
    base = record.identity.source if record.identity.hf_config else "BASE_AS_HUGGING_FACE_DIRECTORY"
    commands = []
    for engine, command in plan.serve.items():
        text = command.replace("{base}", base).replace("{draft}", "DIRECTORY_OF_THIS_FILE")
        commands.append(f"## {engine}\n\n```\n{text}\n```\n")
    return _TEMPLATE.format(
        base=base,
        algorithm=algorithm,
        num_parameters=num_parameters,
        dtype=record.base.dtype + quantized,
        serving="\n".join(commands),
        remarks="".join(f"\n{remark}\n" for remark in plan.remarks),
    )

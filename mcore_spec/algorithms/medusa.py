"""Medusa: residual blocks and one head for each position; exported for vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.config import MedusaConfig
from mcore_spec.config.files import ConfigFile
from mcore_spec.conversion import Algorithm
from mcore_spec.drafts.medusa import MedusaDraft
from mcore_spec.errors import ConfigError
from mcore_spec.export.plan import ExportFormat, ExportPlan, check_hf, token_ids
from mcore_spec.weights.draft_names import Table

NAMES: Table = [
    ("heads.{i}.blocks.{j}.linear.weight", "blocks.{i}.layers.{j}.weight"),
    ("heads.{i}.blocks.{j}.linear.bias", "blocks.{i}.layers.{j}.bias"),
    ("heads.{i}.lm_head.weight", "lm_heads.{i}.weight"),
]
# Flag -> the field that it sets.
_FLAGS = {"export_num_medusa_heads": "medusa_num_heads", "export_num_medusa_layers": "medusa_num_layers"}


def configure_medusa(flags: Mapping[str, Any], file: ConfigFile) -> MedusaConfig:
    """The file and the flags together.

    Raises:
        ConfigError: they contradict each other.
    """
    for flag, field in _FLAGS.items():
        if flag in flags and file.values.get(field, flags[flag]) != flags[flag]:
            raise ConfigError(
                f"{file.where} has {field} = {file.values[field]!r}, --{flag.replace('_', '-')} says {flags[flag]}; "
                "make the two agree"
            )
    given = {field: flags[flag] for flag, field in _FLAGS.items() if flag in flags}
    return MedusaConfig.parse({**file.values, **given}, where=file.where)


def plan_medusa(draft: MedusaDraft, record: CheckpointRecord, export_format: ExportFormat) -> ExportPlan:
    """What to write.

    Raises:
        UnsupportedError: a format that does not know this kind of draft.
    """
    check_hf(export_format, draft)
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
    return ExportPlan(config=values, table=NAMES, serve=serve)


MEDUSA = Algorithm(
    config_class=MedusaConfig,
    child_name="medusa_heads",
    build=MedusaDraft,
    plan=plan_medusa,
    configure=configure_medusa,
)

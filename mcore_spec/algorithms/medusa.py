"""Medusa: residual blocks and one head for each position; exported for vLLM, TensorRT-LLM and FasterDecoding."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.config import BaseArchitecture, MedusaConfig
from mcore_spec.config.files import ConfigFile
from mcore_spec.conversion import Algorithm
from mcore_spec.drafts.medusa import MedusaDraft
from mcore_spec.drafts.vocab_map import agree_on_size, check_has_mapping, check_is_filled
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.export.plan import ExportFormat, ExportPlan, check_format, token_ids
from mcore_spec.objectives.medusa import medusa_task
from mcore_spec.weights.draft_names import Table, stored_name
from mcore_spec.weights.safetensors_io import INDEX_NAME

# vLLM's names.
NAMES: Table = [
    ("heads.{i}.blocks.{j}.linear.weight", "blocks.{i}.layers.{j}.weight"),
    ("heads.{i}.blocks.{j}.linear.bias", "blocks.{i}.layers.{j}.bias"),
    ("heads.{i}.lm_head.weight", "lm_heads.{i}.weight"),
    ("d2t", "d2t"),
]
# FasterDecoding's file, which TensorRT-LLM and text-generation-inference look for by name too.
HEADS_FILE = "medusa_lm_head.safetensors"
_NO_ENGINE = (
    "No engine serves Medusa heads of a draft vocabulary: vLLM 0.32 maps tokens only where all share one "
    "lm_head. `mcore-spec validate --draft` and `generate` read this directory."
)
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


def resolve_medusa(config: MedusaConfig, base: BaseArchitecture, d2t: Tensor | None) -> MedusaConfig:
    """The size of the heads' vocabulary, filled in.

    Raises:
        ConfigError: it has another size than its mapping, or no mapping.
    """
    size = agree_on_size(config.draft_vocab_size, d2t) or base.vocab_size
    check_has_mapping(size, d2t, vocab_size=base.vocab_size)
    return config.model_copy(update={"draft_vocab_size": size})


def names_of_fasterdecoding(num_layers: int) -> Table:
    """A head is a sequence: its residual blocks are numbered, and behind them its own head goes on counting."""
    return [
        ("heads.{i}.blocks.{j}.linear.weight", "{i}.{j}.linear.weight"),
        ("heads.{i}.blocks.{j}.linear.bias", "{i}.{j}.linear.bias"),
        ("heads.{i}.lm_head.weight", f"{{i}}.{num_layers}.weight"),
    ]


def plan_medusa(draft: MedusaDraft, record: CheckpointRecord, export_format: ExportFormat) -> ExportPlan:
    """What to write.

    Raises:
        UnsupportedError: a format that does not know this kind of draft, or whose reader would build another one.
    """
    check_format(export_format, draft, ("hf", "tensorrt-llm", "fasterdecoding"))
    if draft.has_reduced_vocabulary:
        check_is_filled(draft.head_token_ids(), vocab_size=record.base.vocab_size)
        if export_format != "hf":
            raise UnsupportedError(
                f"export_format = {export_format!r} with draft_vocab_size = {draft.config.draft_vocab_size}: its "
                "readers know no draft vocabulary; choose hf, or convert without one"
            )
    if export_format != "hf":
        return _plan_fasterdecoding(draft, record, export_format)
    config = draft.config
    values = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        **_sizes(record),
        "num_heads": config.medusa_num_heads,
        "num_hidden_layers": config.medusa_num_layers,
        "medusa_fc_bias": True,
        "max_paths": 64,
        "topk": 10,
    }
    if draft.has_reduced_vocabulary:
        return ExportPlan(
            config={**values, "draft_vocab_size": config.draft_vocab_size}, table=NAMES, remarks=(_NO_ENGINE,)
        )
    return ExportPlan(config=values, table=NAMES, serve={"vLLM": _vllm_command(config.medusa_num_heads)})


def _vllm_command(num_heads: int) -> str:
    speculative = f'{{"method": "medusa", "model": "{{draft}}", "num_speculative_tokens": {num_heads}}}'
    return f"vllm serve {{base}} --speculative-config '{speculative}'"


def _sizes(record: CheckpointRecord) -> dict[str, Any]:
    """What the base decides."""
    base = record.base
    return {
        "hidden_size": base.hidden_size,
        "vocab_size": base.vocab_size,
        "max_position_embeddings": base.max_position_embeddings,
        "torch_dtype": base.dtype,
        "dtype": base.dtype,
        **token_ids(record),
    }


def _plan_fasterdecoding(draft: MedusaDraft, record: CheckpointRecord, export_format: ExportFormat) -> ExportPlan:
    """FasterDecoding's names and file, with its own configuration or with TensorRT-LLM's.

    Raises:
        UnsupportedError: several layers for FasterDecoding itself, which builds one block and runs it for each.
    """
    num_heads, num_layers = draft.config.medusa_num_heads, draft.config.medusa_num_layers
    is_tensorrt_llm = export_format == "tensorrt-llm"
    if num_layers > 1 and not is_tensorrt_llm:
        raise UnsupportedError(
            f"export_format = {export_format!r} with medusa_num_layers = {num_layers}: FasterDecoding's model has one "
            "block in a head and runs it that many times; choose hf or tensorrt-llm"
        )
    values = {
        "architectures": ["MedusaForCausalLM" if is_tensorrt_llm else "MedusaModel"],
        "model_type": "medusa",
        "base_model_name_or_path": record.identity.source,
        **_sizes(record),
        # TensorRT-LLM reads the number of heads by its own name and that of layers by FasterDecoding's.
        "num_medusa_heads": num_heads,
        "num_medusa_layers": num_layers,
        "medusa_num_heads": num_heads,
        "medusa_num_layers": num_layers,
        "medusa_fc_bias": True,
    }
    table = names_of_fasterdecoding(num_layers)
    names = [stored_name(table, name) for name, _ in draft.named_parameters()]
    index = {"metadata": {}, "weight_map": {name: HEADS_FILE for name in sorted(names)}}
    serve: dict[str, str] = {}
    remarks: tuple[str, ...] = ()
    if is_tensorrt_llm:
        serve["TensorRT-LLM"] = (
            "python examples/medusa/convert_checkpoint.py --model_dir {base} --medusa_model_dir {draft} "
            f"--num_medusa_heads {num_heads} --num_medusa_layers {num_layers} --output_dir CHECKPOINT"
        )
    else:
        # vLLM knows the names too.
        serve |= {
            "FasterDecoding": "python -m medusa.inference.cli --model {draft}",
            "vLLM": _vllm_command(num_heads),
        }
        remarks = (
            f"Readers that look for medusa_lm_head.pt alone: `torch.save(safetensors.torch.load_file('{HEADS_FILE}'), "
            "'medusa_lm_head.pt')`.",
        )
    return ExportPlan(
        config=values,
        table=table,
        weights_file=HEADS_FILE,
        extra_files={INDEX_NAME: json.dumps(index, indent=2) + "\n"},
        serve=serve,
        remarks=remarks,
    )


MEDUSA = Algorithm(
    config_class=MedusaConfig,
    child_name="medusa_heads",
    build=MedusaDraft,
    resolve=resolve_medusa,
    plan=plan_medusa,
    configure=configure_medusa,
    task=medusa_task,
)

"""What each command takes. A field is a flag, its description is the line in ``--help``.

Names are Megatron-LM's: `tensor_model_parallel_size` is ``--tensor-model-parallel-size``. Where a default is
None, the description says what that means. An option that the rest of the command line makes meaningless is
an error, never ignored. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from mcore_spec.config import (
    ALGORITHMS,
    EagleAlgorithm,
    ExportFormat,
    MedusaConfig,
    StrictConfig,
    suggest,
)
from mcore_spec.config.quantization import QuantFormat
from mcore_spec.planning.hardware import GPUS

_MEDUSA = MedusaConfig()
# Of `convert()`, and from a layer in the base's files.
DraftStart = Literal["auto", "random", "base", "mtp"]
ParamsDtype = Literal["bf16", "fp16", "fp32", "fp64", "auto"]
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64", "auto": "auto"}
# In the place of an algorithm: the base alone.
NO_DRAFT = "none"


@dataclass(frozen=True)
class OneOf:
    """Annotation of a string field with choices that are looked up when a value is read: a registry may grow.

    Attributes:
        known: the choices.
    """

    known: Callable[[], Sequence[str]]

    def __get_pydantic_core_schema__(self, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        """pydantic's protocol: check behind the type."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        known = self.known()
        if value not in known:
            hint = suggest(value, known, otherwise=f"choose one of {', '.join(known)}")
            raise ValueError(f"not known; {hint}")
        return value


def _algorithms() -> list[str]:
    return [*ALGORITHMS, NO_DRAFT]


def _readers_of(field: str) -> list[str]:
    """The algorithms that read an option; empty for one that has nothing to do with the algorithm."""
    if field == "algorithm_config":
        return list(ALGORITHMS)
    return [name for name, registered in ALGORITHMS.items() if field in registered.flags]


def flag_of(field: str) -> str:
    """Megatron-LM's spelling of a field on the command line."""
    return "--" + field.replace("_", "-")


def _gpus() -> list[str]:
    return list(GPUS)


class MachineArguments(StrictConfig):
    """The GPUs that a run is planned for."""

    num_gpus: int | None = Field(
        None, ge=1, description="GPUs of the whole run, data-parallel copies included. Default: one copy of the model."
    )
    gpu: Annotated[str, OneOf(_gpus)] = Field("h100", description="Kind of GPU.")
    utilization: float = Field(
        0.4, gt=0, le=1, description="Share of the GPU's bfloat16 arithmetic that the estimate of the speed assumes."
    )


class DryRunArguments(MachineArguments):
    """A rehearsal."""

    dry_run: bool = Field(
        False, description="Check everything, build base and draft without memory, say what they need, write nothing."
    )

    @model_validator(mode="after")
    def _check_rehearsal(self) -> Self:
        ignored = sorted(self.model_fields_set & MachineArguments.model_fields.keys())
        if ignored and not self.dry_run:
            flags = ", ".join(flag_of(name) for name in ignored)
            raise ValueError(f"{flags} would be ignored without --dry-run: give it, or drop the others")
        return self


class ParallelArguments(StrictConfig):
    """How the model is spread over ranks."""

    tensor_model_parallel_size: int = Field(1, ge=1, description="Ranks that share each layer.")
    pipeline_model_parallel_size: int = Field(1, ge=1, description="Pipeline stages.")
    sequence_parallel: bool = Field(
        False,
        description="Split activations between layers along the sequence, over the tensor-parallel ranks.",
    )
    decoder_last_pipeline_num_layers: int | None = Field(
        None,
        ge=1,
        description="Decoder layers on the last stage, which also holds the draft. Default: an even split.",
    )
    transformer_impl: Literal["local", "transformer_engine"] = Field(
        "local", description="Layers of the base model: Megatron-core's own, or Transformer Engine's."
    )

    @model_validator(mode="after")
    def _check_layout(self) -> Self:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError(
                "--sequence-parallel splits over tensor-parallel ranks, --tensor-model-parallel-size is 1: "
                "raise the size or drop --sequence-parallel"
            )
        if self.decoder_last_pipeline_num_layers is not None and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                "--decoder-last-pipeline-num-layers has no effect while --pipeline-model-parallel-size is 1: "
                "raise the size or drop it"
            )
        return self


class BaseArguments(StrictConfig):
    """The base model, and how it is read."""

    pretrained_model_path: str | None = Field(
        None,
        min_length=1,
        description="Hugging Face directory or hub id of the base model. Either this or --load.",
    )
    load: str | None = Field(
        None,
        min_length=1,
        description="Megatron-core checkpoint of the base model. Either this or --pretrained-model-path.",
    )
    ckpt_step: int | None = Field(None, ge=0, description="Iteration of --load. Default: the newest.")
    params_dtype: ParamsDtype = Field("auto", description="Dtype of the weights; auto: as stored.")
    seed: int = Field(1234, ge=0, description="Seed of the draft's initial weights.")

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.pretrained_model_path is None) == (self.load is None):
            given = "neither is" if self.load is None else "both are"
            raise ValueError(f"give either --pretrained-model-path or --load: {given} given")
        if self.ckpt_step is not None and self.load is None:
            raise ValueError("--ckpt-step chooses an iteration of --load, which is not given: drop it")
        return self


class ConvertArguments(BaseArguments, ParallelArguments, DryRunArguments):
    """The draft, and where the result goes."""

    export_algorithm: Annotated[str, OneOf(_algorithms)] = Field(
        description="Kind of draft to attach; none: only write the base model as a Megatron-core checkpoint."
    )
    save: str = Field(min_length=1, description="Directory of the Megatron-core checkpoint to write.")
    algorithm_config: Path | None = Field(
        None, description="JSON file with the draft's configuration. Default: the algorithm's defaults."
    )
    export_eagle_algorithm: EagleAlgorithm = Field("eagle3", description="Member of the EAGLE family (eagle).")
    eagle_config: Path | None = Field(None, description="The same as --algorithm-config, by ModelOpt's name (eagle).")
    export_offline_model: bool = Field(
        False,
        description="Keep only embedding, final norm and head of the base, for finetune --offline-distillation-data; "
        "its layers are not read. Off: the whole base.",
    )
    draft_vocab_cache: Path | None = Field(
        None, description="File with the draft vocabulary, where the draft may have one. Default: the base's."
    )
    draft_init: DraftStart = Field(
        "auto",
        description="What the draft starts as: random, or EAGLE-3's layer as the base's last one (base); auto: base "
        "where it then is the base's layer, random where sizes, norms or biases differ, or with "
        "--export-offline-model; mtp: EAGLE-MTP as the base's own layer for multi-token prediction, of a base in "
        "MiMo's layout (eagle).",
    )
    export_num_medusa_heads: int | None = Field(
        None, ge=1, description=f"Heads; head i predicts token t+2+i (medusa). Default: {_MEDUSA.medusa_num_heads}."
    )
    export_num_medusa_layers: int | None = Field(
        None, ge=1, description=f"Residual blocks in each head (medusa). Default: {_MEDUSA.medusa_num_layers}."
    )

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        given = self.model_dump(include=self.model_fields_set, exclude_none=True)
        readers = {name: _readers_of(name) for name in given}
        ignored = [name for name in given if readers[name] and self.export_algorithm not in readers[name]]
        if ignored:
            problems = [f"{flag_of(name)} (for {' or '.join(readers[name])})" for name in ignored]
            raise ValueError(
                f"{', '.join(problems)} would be ignored with --export-algorithm {self.export_algorithm}: "
                "drop what does not apply, or choose another algorithm"
            )
        if self.eagle_config is not None and self.algorithm_config is not None:
            raise ValueError("--eagle-config and --algorithm-config are two names of one option: keep one")
        if self.export_offline_model and self.draft_init == "base":
            raise ValueError(
                "--draft-init base takes the base's last layer, --export-offline-model leaves it out: drop one"
            )
        return self

    def algorithm_flags(self) -> dict[str, Any]:
        """The options that the algorithm reads, by field name, without those that are left open."""
        return self.model_dump(include=set(ALGORITHMS[self.export_algorithm].flags), exclude_none=True)


class ExportArguments(ParallelArguments):
    """What is exported, and where it goes."""

    load: str = Field(min_length=1, description="Megatron-core checkpoint with the draft.")
    ckpt_step: int | None = Field(None, ge=0, description="Iteration of --load. Default: the newest.")
    export_dir: str = Field(min_length=1, description="Directory to write.")
    export_format: ExportFormat = Field(
        "hf",
        description="Form of the draft. mimo: base and EAGLE-MTP layer as one model that vLLM serves (bases like "
        "Qwen2). tensorrt-llm, fasterdecoding: Medusa's heads under FasterDecoding's names.",
    )
    export_extra_modules: bool = Field(
        False, description="Write the draft alone; off: the base model, and the draft below it in draft/."
    )
    export_quant_format: QuantFormat | None = Field(
        None,
        description="Of a quantised checkpoint: whose form scales and their declaration have. Default: modelopt.",
    )
    overwrite: bool = Field(False, description="Replace an earlier export in --export-dir.")

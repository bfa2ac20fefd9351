"""What each command takes. A field is a flag, its description is the line in ``--help``.

Names are Megatron-LM's: `tensor_model_parallel_size` is ``--tensor-model-parallel-size``. Where a default is
None, the description says what that means. An option that the rest of the command line makes meaningless is
an error, never ignored. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Self

from pydantic import Field, model_validator

from mcore_spec.config import EagleAlgorithm, StrictConfig

Algorithm = Literal["eagle", "medusa", "none"]
ParamsDtype = Literal["bf16", "fp16", "fp32", "fp64", "auto"]

# Options of one algorithm only -> the algorithms that read them.
_APPLIES_TO: Mapping[str, tuple[Algorithm, ...]] = MappingProxyType(
    {
        "export_eagle_algorithm": ("eagle",),
        "eagle_config": ("eagle",),
        "draft_vocab_cache": ("eagle",),
        "export_num_medusa_heads": ("medusa",),
        "export_num_medusa_layers": ("medusa",),
        # Medusa heads start as the base's head: nothing is drawn.
        "seed": ("eagle",),
    }
)


def flag_of(field: str) -> str:
    """Megatron-LM's spelling of a field on the command line."""
    return "--" + field.replace("_", "-")


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


class ConvertArguments(BaseArguments, ParallelArguments):
    """The draft, and where the result goes."""

    export_algorithm: Algorithm = Field(
        description="Kind of draft to attach; none: only write the base model as a Megatron-core checkpoint."
    )
    save: str = Field(min_length=1, description="Directory of the Megatron-core checkpoint to write.")
    export_eagle_algorithm: EagleAlgorithm = Field("eagle3", description="Member of the EAGLE family (eagle).")
    eagle_config: Path | None = Field(
        None, description="JSON file with the draft's configuration (eagle). Default: the preset."
    )
    draft_vocab_cache: Path | None = Field(
        None, description="File with the draft vocabulary (eagle). Default: the base's vocabulary."
    )
    export_num_medusa_heads: int = Field(2, ge=1, description="Heads; head i predicts token t+2+i (medusa).")
    export_num_medusa_layers: int = Field(1, ge=1, description="Residual blocks in each head (medusa).")

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        given = self.model_dump(include=self.model_fields_set, exclude_none=True)
        ignored = [
            name for name in given if self.export_algorithm not in _APPLIES_TO.get(name, (self.export_algorithm,))
        ]
        if ignored:
            problems = [f"{flag_of(name)} (for {' or '.join(_APPLIES_TO[name])})" for name in ignored]
            raise ValueError(
                f"{', '.join(problems)} would be ignored with --export-algorithm {self.export_algorithm}: "
                "drop what does not apply, or choose another algorithm"
            )
        return self


class ExportArguments(ParallelArguments):
    """What is exported, and where it goes."""

    load: str = Field(min_length=1, description="Megatron-core checkpoint with the draft.")
    ckpt_step: int | None = Field(None, ge=0, description="Iteration of --load. Default: the newest.")
    export_dir: str = Field(min_length=1, description="Directory to write.")
    export_format: Literal["hf", "speculators"] = Field("hf", description="Form of the draft.")
    export_extra_modules: bool = Field(
        False, description="Write the draft alone; off: the base model, and the draft below it in draft/."
    )
    overwrite: bool = Field(False, description="Replace an earlier export in --export-dir.")

"""What ``extract`` and ``extract-hf`` take. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mcore_spec.cli.arguments import ParallelArguments
from mcore_spec.config import DataConfig
from mcore_spec.planning.states import StorageName


class StoredStatesArguments(DataConfig):
    """Which hidden states are kept, and where they go."""

    output_dir: str = Field(
        min_length=1, description="Directory of the store. An extraction that was interrupted there is continued."
    )
    num_samples: int | None = Field(None, ge=1, description="Conversations, the first so many. Default: all.")
    storage_dtype: StorageName = Field(
        "bf16", description="Dtype of the states on disk; fp8 has a scale for each token and layer."
    )
    max_bytes: int | None = Field(None, ge=1, description="Largest store that may be written. Default: no limit.")
    max_shard_bytes: int = Field(
        512 << 20,
        ge=1,
        description="Largest file; what a killed extraction has to compute again. A rank holds three times as much.",
    )
    drop_tail: bool = Field(
        False,
        description="Leave out what stands behind the last token that the model must produce: no loss reads it. Rows "
        "before it stay, because the draft attends to them.",
    )
    aux_layer_ids: tuple[int, ...] | None = Field(
        None,
        description="Layers whose outputs are kept, 0-based, by output; repeat the flag. Default: those that the draft "
        "of the checkpoint reads, and without one those that EAGLE-3 reads.",
    )
    params_dtype: Literal["bf16", "fp16", "fp32", "fp64", "auto"] = Field(
        "auto", description="Dtype in which the base runs; auto: as stored."
    )
    micro_batch_size: int = Field(1, ge=1, description="Samples of --seq-length tokens in one forward pass of a rank.")

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        layers = self.aux_layer_ids
        if layers is not None and list(layers) != sorted(set(layers)):
            raise ValueError(f"--aux-layer-ids {' '.join(map(str, layers))}: give different layers, ascending")
        return self


class ExtractArguments(StoredStatesArguments, ParallelArguments):
    """The base, and how it is spread over ranks."""

    load: str = Field(min_length=1, description="Megatron-core checkpoint of the base, with or without a draft.")
    ckpt_step: int | None = Field(None, ge=0, description="Iteration of --load. Default: the newest.")
    tokenizer_model: str | None = Field(
        None, description="Directory or hub id of the tokenizer. Default: the one in --load."
    )
    context_parallel_size: int = Field(1, ge=1, description="Ranks that share the rows of each sequence.")


class ExtractHfArguments(StoredStatesArguments):
    """The base, each data-parallel rank with a whole one."""

    pretrained_model_path: str = Field(
        min_length=1, description="Hugging Face directory or hub id of the base model, with its tokenizer."
    )

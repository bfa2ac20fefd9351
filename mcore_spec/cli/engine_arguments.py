"""What ``extract-engine`` takes. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mcore_spec.config import DataConfig
from mcore_spec.planning.states import StorageName


class ExtractEngineArguments(DataConfig):
    """Which base runs in which engine, over what, and where its hidden states go."""

    engine: Literal["vllm", "tensorrt-llm"] = Field(description="What runs the base.")
    pretrained_model_path: str = Field(
        min_length=1, description="Hugging Face directory or hub id of the base model, with its tokenizer."
    )
    output_dir: str = Field(
        min_length=1, description="Directory of the store. An extraction that was interrupted there is continued."
    )
    num_samples: int | None = Field(None, ge=1, description="Conversations, the first so many. Default: all.")
    aux_layer_ids: tuple[int, ...] = Field(
        (),
        description="Layers whose outputs are kept, ascending, 0-based by output. Default: those that EAGLE-3 reads.",
    )
    norm_last: bool = Field(
        True,
        description="Send the last layer's output through the final norm, as drafts read it; vLLM gives it before. "
        "speculators takes it before.",
    )
    storage_dtype: StorageName = Field("bf16", description="Dtype of the states on disk.")
    max_bytes: int | None = Field(None, ge=1, description="Largest store that may be written. Default: no limit.")
    params_dtype: Literal["bf16", "fp16", "fp32", "auto"] = Field("auto", description="Dtype in which the base runs.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs of the engine.")
    batch_size: int = Field(64, ge=1, description="Conversations that are handed to the engine at once.")

"""What the scripts in examples/speculators/ take: the flags of speculators' scripts. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mcore_spec.config import StrictConfig


class DataGenerationArguments(StrictConfig):
    """The base, the conversations, and where tokens and hidden states go."""

    target_model_path: str = Field(min_length=1, description="Hugging Face directory or hub id of the base model.")
    train_data_path: str = Field(
        min_length=1, description="sharegpt, ultrachat, a Hugging Face dataset (NAME:SPLIT), or a file."
    )
    output_dir: str = Field(min_length=1, description="Directory for data_{i}.pt, data_config.json and token_freq.pt.")
    token_freq_path: str | None = Field(
        None, description="Where the counts go. Default: token_freq.pt in --output-dir."
    )
    max_samples: int | None = Field(None, ge=1, description="Conversations, drawn by --seed. Default: all.")
    seq_length: int = Field(2048, ge=8, description="Tokens of a conversation at most; longer ones lose their end.")
    cache_dir: str | None = Field(
        None, description="Where tokenised conversations are kept. Default: data_cache beside --output-dir."
    )
    layer_ids: tuple[int, ...] = Field(
        (),
        description="Layers by boundary, as vLLM counts: i is what enters layer i, their number what leaves the last "
        "one, which is always taken. Default: 2, n // 2, n - 3 and n.",
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs, with --engine vllm.")
    batch_size: int = Field(8, ge=1, description="Conversations that are handed to the base at once.")
    seed: int = Field(0, ge=0, description="Seed of the order of the conversations.")
    engine: Literal["transformers", "vllm"] = Field("transformers", description="What runs the base.")


class VocabMappingArguments(StrictConfig):
    """The counts, the sizes, and where the mapping goes."""

    token_freq_path: str = Field(min_length=1, description="token_freq.pt, as the data generation writes it.")
    draft_vocab_size: int = Field(ge=1, description="Entries of the draft vocabulary.")
    target_vocab_size: int | None = Field(None, ge=1, description="Entries of the base's vocabulary.")
    target_model_path: str | None = Field(None, min_length=1, description="The base, in the place of that number.")
    output_path: str = Field(".", min_length=1, description="Directory for d2t.npy and t2d.npy.")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.target_vocab_size is None) == (self.target_model_path is None):
            raise ValueError("give one of --target-vocab-size and --target-model-path")
        return self


class DraftTrainArguments(StrictConfig):
    """How the draft is trained, and where its epochs go."""

    run_name: str | None = Field(None, min_length=1, description="Name of the run below --log-dir. Default: run.")
    logger: str = Field("", description="Where the log goes besides: of tensorboard, wandb, trackio, with commas.")
    lr: float = Field(1e-4, gt=0, description="Highest learning rate.")
    total_seq_len: int = Field(8192, ge=8, description="Tokens of a sample; conversations are packed into it.")
    ttt_steps: int = Field(3, ge=1, description="Training-time-test steps.")
    ttt_step_loss_decay: float = Field(1.0, gt=0, le=1, description="Weight of a step's loss against the one before.")
    epochs: int = Field(20, ge=1, description="Times to go through the conversations; each has a directory.")
    num_layers: int = Field(1, ge=1, description="Decoder layers of the draft.")
    resume_from_checkpoint: bool = Field(True, description="Go on where an earlier run of the same command ended.")


class SpeculatorsTrainArguments(DraftTrainArguments):
    """The base, its hidden states, the draft vocabulary."""

    verifier_name_or_path: str = Field(min_length=1, description="Hugging Face directory or hub id of the base model.")
    data_path: str = Field(
        "./data", min_length=1, description="What the data generation wrote, or a directory of such directories."
    )
    save_path: str = Field("./checkpoints", min_length=1, description="A directory of each epoch goes below it.")
    data_format_version: Literal[1] = Field(1, description="Of the files in --data-path.")
    log_dir: str = Field(
        "./logs", min_length=1, description="Below it: the run's log, and the checkpoints that it is continued from."
    )
    d2t_path: str = Field("d2t.npy", min_length=1, description="The draft vocabulary's mapping to the base's.")
    t2d_path: str = Field("t2d.npy", min_length=1, description="Which of the base's tokens it has.")


class GenAndTrainArguments(DraftTrainArguments):
    """The base, the conversations, and where everything goes."""

    verifier_name_or_path: str = Field(min_length=1, description="Hugging Face directory or hub id of the base model.")
    output_path: str = Field(
        min_length=1, description="Directory of gen/, vocab_mapping/, checkpoints/ (a directory an epoch) and logs/."
    )
    train_data_path: tuple[str, ...] = Field(
        min_length=1, description="sharegpt, ultrachat, a dataset or a file; may be repeated."
    )
    draft_vocab_size: int = Field(ge=1, description="Entries of the draft vocabulary.")
    max_samples: int | None = Field(None, ge=1, description="Conversations of each set. Default: all.")
    seq_length: int = Field(2048, ge=8, description="Tokens of a conversation at most.")
    cache_dir: str | None = Field(None, description="Where tokenised conversations are kept.")
    layer_ids: tuple[int, ...] = Field((), description="Layers by boundary; see data_generation_offline.py.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs of the data generation, with --engine vllm.")
    batch_size: int = Field(8, ge=1, description="Conversations that are handed to the base at once.")
    seed: int = Field(0, ge=0, description="Seed of the order of the conversations.")
    engine: Literal["transformers", "vllm"] = Field("transformers", description="What runs the base.")

"""What ``finetune`` takes: the run's configuration, the layout, and where checkpoints lie. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from mcore_spec.cli.arguments import DryRunArguments, ParallelArguments
from mcore_spec.config import DataConfig, TrainingConfig


class FinetuneArguments(ParallelArguments, TrainingConfig, DryRunArguments):
    """What is trained, and where the result goes."""

    load: str = Field(min_length=1, description="Megatron-core checkpoint with the draft, as convert writes it.")
    ckpt_step: int | None = Field(None, ge=0, description="Iteration of --load. Default: the newest.")
    save: str = Field(
        min_length=1, description="Directory of the checkpoints. A run that was interrupted there is continued."
    )
    tokenizer_model: str | None = Field(
        None, description="Directory or hub id of the tokenizer. Default: the one in --load."
    )
    context_parallel_size: int = Field(1, ge=1, description="Ranks that share the rows of each sequence.")


class DraftVocabArguments(DataConfig):
    """Which tokens are counted, and where the result goes."""

    pretrained_model_path: str = Field(
        min_length=1, description="Hugging Face directory or hub id of the base model; its configuration is read."
    )
    draft_vocab_size: int = Field(ge=1, description="Entries of the draft vocabulary.")
    output_dir: str = Field(min_length=1, description="Directory for d2t.pt and t2d.pt.")
    tokenizer_model: str | None = Field(
        None, description="Directory or hub id of the tokenizer. Default: the base model's."
    )

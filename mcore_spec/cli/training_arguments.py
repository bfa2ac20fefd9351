"""What ``finetune`` takes: the run's configuration, the layout, and where checkpoints lie. Imports no torch."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from mcore_spec.cli.arguments import DryRunArguments, ParallelArguments, flag_of
from mcore_spec.config import DataConfig, StrictConfig, TrainingConfig
from mcore_spec.config.quantization import Float8Backend, GradientScaling, QuantizationRecord


class QuantizedTrainingArguments(StrictConfig):
    """How a quantised checkpoint is trained."""

    learn_scales: bool = Field(
        False,
        description="Train the scales of the draft's weights, inputs, keys and values too, where the recipe keeps "
        "them. Off: they stay as quantize found them.",
    )
    fp8_compute: bool = Field(
        False,
        description="Multiply FP8 numbers, forward and backward, in the linear maps that are quantised, with the "
        "recipe's scales. Off: values are rounded and multiplied in the dtype of the training.",
    )
    fp8_backend: Float8Backend = Field(
        "auto",
        description="Of --fp8-compute: torch (also on processors) or transformer_engine; auto: Transformer Engine "
        "where it is installed and CUDA is used.",
    )
    fp8_gradient_scaling: GradientScaling = Field(
        "current",
        description="Of --fp8-compute: a gradient's scale from itself, or (delayed, recipe fp8) from the largest "
        "values of the 16 steps before.",
    )

    @model_validator(mode="after")
    def _check_fp8(self) -> Self:
        ignored = sorted({"fp8_backend", "fp8_gradient_scaling"} & self.model_fields_set)
        if ignored and not self.fp8_compute:
            raise ValueError(f"{', '.join(map(flag_of, ignored))} would be ignored without --fp8-compute: give it too")
        return self

    @property
    def gradient_scaling(self) -> GradientScaling | None:
        """``None``: nothing multiplies FP8 numbers."""
        return self.fp8_gradient_scaling if self.fp8_compute else None

    def trained_as(self, record: QuantizationRecord) -> QuantizationRecord:
        """What the checkpoints of the run say; `record` is of the checkpoint that it began with."""
        is_learned = record.has_learned_scales or self.learn_scales
        update = {"has_learned_scales": is_learned, "gradient_scaling": self.gradient_scaling}
        return record.model_copy(update=update)


class FinetuneArguments(ParallelArguments, TrainingConfig, QuantizedTrainingArguments, DryRunArguments):
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
    extract_ranks: int | None = Field(
        None,
        ge=1,
        description="The last so many ranks run the base alone, a whole one each, and send its hidden states to the "
        "others, which train without its layers. Default: the base runs beside the draft.",
    )
    stream_depth: int = Field(
        4, ge=1, description="Micro-batches that a training rank asks extraction ranks for ahead (--extract-ranks)."
    )

    @model_validator(mode="after")
    def _check_streaming(self) -> Self:
        if self.extract_ranks is None:
            if "stream_depth" in self.model_fields_set:
                raise ValueError("--stream-depth has no effect without --extract-ranks: give it, or drop the other")
            return self
        where = f"--extract-ranks {self.extract_ranks}"
        if self.offline_distillation_data is not None:
            raise ValueError(f"{where} and --offline-distillation-data: states are read or streamed, drop one of them")
        if self.dry_run:
            raise ValueError(f"{where} with --dry-run, which plans a run whose base runs beside the draft: drop one")
        if self.eval_acceptance_interval is not None:
            raise ValueError(
                f"{where} with --eval-acceptance-interval, which runs the base where it trains: drop it, and measure "
                "with validate --base HF_DIRECTORY --draft EXPORT"
            )
        return self


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

"""How a draft is trained: Megatron-LM's options, by Megatron-LM's names. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from mcore_spec.config.strict import StrictConfig

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root"]
LOGGERS = ("tensorboard", "wandb", "trackio")


class DataConfig(StrictConfig):
    """The conversations, and how they become rows of tokens."""

    data_path: tuple[str, ...] = Field(
        min_length=1,
        description="Conversations: .jsonl, .json or .parquet (also .gz), or a Hugging Face dataset. May be repeated.",
    )
    data_cache_path: str | None = Field(
        None, description="Directory of the tokenised conversations. Default: data_cache in the output directory."
    )
    seq_length: int = Field(2048, ge=8, description="Tokens in a sample; longer conversations are truncated.")
    on_bad_line: Literal["error", "skip"] = Field("error", description="What to do about a line that cannot be read.")


class TrainingConfig(DataConfig):
    """The run: how much, how fast, how often to say so."""

    data_path: tuple[str, ...] = Field(
        (),
        description="Conversations: .jsonl, .json or .parquet (also .gz), or a Hugging Face dataset. May be repeated. "
        "Either this or --offline-distillation-data.",
    )
    offline_distillation_data: str | None = Field(
        None,
        min_length=1,
        description="Hidden states that extract wrote: the base does not run. Its --seq-length is the default.",
    )
    split: str = Field("98,2,0", description="Weights of training, validation and test conversations.")
    packing: bool = Field(True, description="Lay short conversations behind each other; without it they are padded.")
    micro_batch_size: int = Field(1, ge=1, description="Samples in one forward pass of a data-parallel rank.")
    global_batch_size: int | None = Field(
        None, ge=1, description="Samples in one optimizer step. Default: one micro-batch from each data-parallel rank."
    )
    train_iters: int | None = Field(None, ge=1, description="Optimizer steps. This, --train-samples or --num-epochs.")
    train_samples: int | None = Field(None, ge=1, description="Samples to train on, rounded down to whole steps.")
    num_epochs: int | None = Field(None, ge=1, description="Times to go through the training conversations.")
    fit_start: int | None = Field(
        None,
        ge=0,
        description="Global batches from which the draft's first weights are solved by least squares, before the first "
        "step; they replace what convert made. 0: none. Default: as many as the solution needs, for a draft that was "
        "not trained yet and has such a start.",
    )
    lr: float = Field(1e-4, gt=0, description="Highest learning rate.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the decay.")
    lr_scaling: Literal["auto", "width", "none"] = Field(
        "auto",
        description="width: matrices that do not start as the base's rows learn at 4096 / hidden_size times --lr and "
        "--min-lr (muP), so that one rate fits bases of every size. none: --lr for all. auto: width; behind a "
        "least-squares start matrices learn in proportion to the size of their numbers, at --lr where that is 0.08.",
    )
    lr_decay_style: DecayStyle = Field("cosine", description="Shape of the decay, which ends with the run.")
    lr_warmup_iters: int = Field(0, ge=0, description="Steps of linear warm-up.")
    clip_grad: float = Field(0.5, ge=0, description="Largest norm of the draft's gradient; 0: no limit.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay; none on norms and biases.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second decay rate.")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    bf16: bool = Field(False, description="Compute in bfloat16 with float32 main weights; without it in float32.")
    teacher: Literal["as_loaded", "unquantized"] = Field(
        "as_loaded",
        description="Whose distribution the draft learns, on a quantised base: the base's as it is loaded, which an "
        "engine will verify with, or the base's before quantisation, in a second forward pass.",
    )
    recompute_granularity: Literal["none", "draft"] = Field(
        "none", description="draft: forget the activations of the draft's steps and compute them again backward."
    )
    use_distributed_optimizer: bool | None = Field(
        None, description="Shard the optimizer over the data-parallel ranks. Default: where CUDA is used."
    )
    log_interval: int = Field(10, ge=1, description="Steps between two lines of the log.")
    save_interval: int | None = Field(None, ge=1, description="Steps between two checkpoints. Default: at the end.")
    eval_interval: int | None = Field(None, ge=1, description="Steps between two validations. Default: at the end.")
    eval_iters: int = Field(10, ge=0, description="Batches of a validation at most; 0: none.")
    eval_acceptance_interval: int | None = Field(
        None,
        ge=1,
        description="Steps between two measurements of the acceptance length, by speculative decoding of questions of "
        "the validation conversations. Default: none.",
    )
    eval_acceptance_samples: int = Field(8, ge=1, description="Questions of such a measurement at most.")
    logger: str | None = Field(
        None, description="Where the log goes besides train_log.jsonl: of tensorboard, wandb, trackio, with commas."
    )
    seed: int = Field(1234, ge=0, description="Seed of the data's order, and of rows that are replaced at random.")

    @field_validator("split")
    @classmethod
    def _check_split(cls, value: str) -> str:
        weights = value.split(",")
        if len(weights) != 3 or not all(weight.strip().isdigit() for weight in weights) or int(weights[0]) == 0:
            raise ValueError("must be three whole numbers such as 98,2,0, the first above 0")
        return value

    @property
    def split_weights(self) -> tuple[int, int, int]:
        """The split as numbers."""
        train, valid, test = (int(weight) for weight in self.split.split(","))
        return train, valid, test

    @field_validator("logger")
    @classmethod
    def _check_loggers(cls, value: str | None) -> str | None:
        unknown = sorted(set((value or "").split(",")) - {"", *LOGGERS})
        if unknown:
            raise ValueError(f"{', '.join(unknown)} is not one of {', '.join(LOGGERS)}")
        return value

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        if bool(self.data_path) == (self.offline_distillation_data is not None):
            given = "both are" if self.data_path else "neither is"
            raise ValueError(f"give either --data-path or --offline-distillation-data: {given} given")
        if self.offline_distillation_data is not None:
            ignored = sorted({"data_cache_path", "on_bad_line"} & self.model_fields_set)
            if ignored:
                flags = ", ".join("--" + name.replace("_", "-") for name in ignored)
                raise ValueError(f"{flags} would be ignored with --offline-distillation-data: drop it")
        return self

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        lengths = {
            "--train-iters": self.train_iters,
            "--train-samples": self.train_samples,
            "--num-epochs": self.num_epochs,
        }
        given = [flag for flag, value in lengths.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(lengths)}: {' and '.join(given) or 'none'} is given")
        if self.min_lr > self.lr:
            raise ValueError(f"--min-lr {self.min_lr} is above --lr {self.lr}: lower it")
        return self

    @property
    def loggers(self) -> tuple[str, ...]:
        """Names of the loggers, in the order of `LOGGERS`."""
        given = (self.logger or "").split(",")
        return tuple(name for name in LOGGERS if name in given)

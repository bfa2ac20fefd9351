"""One training run of a draft on a transformers model: load, convert, train with Trainer, save.

The run's own options are below; everything else is transformers' `TrainingArguments`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from mcore_spec.config.files import ConfigFile, read_config_file
from mcore_spec.conversion import convert, find_algorithm
from mcore_spec.data.chat import Tokenizer, load_tokenizer
from mcore_spec.data.store import TokenStore, build_token_store
from mcore_spec.drafts.vocab_map import load_draft_to_target
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.huggingface.checkpointing import enable_huggingface_checkpointing
from mcore_spec.huggingface.data import ConversationDataset, DraftCollator
from mcore_spec.huggingface.trainer import DraftTrainer
from mcore_spec.weights.hf_config import locate


@dataclass(kw_only=True)
class DraftArguments:
    """Model, data and draft."""

    model_name_or_path: str = field(metadata={"help": "Directory or hub id of the base model."})
    data_path: list[str] = field(
        metadata={"help": "Conversations: .jsonl, .json or .parquet files, or Hugging Face datasets."}
    )
    eval_data_path: list[str] = field(default_factory=list, metadata={"help": "Conversations for --eval_strategy."})
    mode: Literal["eagle3", "eagle1", "eagle-mtp", "medusa"] = field(
        default="eagle3", metadata={"help": "Kind of draft."}
    )
    eagle_config: str | None = field(
        default=None,
        metadata={"help": "JSON file of the draft's configuration, whole or the architecture alone."},
    )
    draft_vocab_cache: str | None = field(
        default=None, metadata={"help": "d2t.pt of a draft vocabulary, as calibrate_draft_vocab.py writes it."}
    )
    training_seq_len: int = field(default=2048, metadata={"help": "Longer conversations lose their end."})
    param_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "Dtype of the weights; auto: as stored, but float32 on a machine without a GPU."},
    )
    offline_data: str | None = field(
        default=None, metadata={"help": "Stored hidden states instead of a live base; not built yet."}
    )


def run(arguments: DraftArguments, training: TrainingArguments) -> None:
    """Train, and write the model with its draft to the output directory.

    A run that was interrupted there is continued.

    Args:
        arguments: of this run.
        training: transformers'; its process group is up.

    Raises:
        ConfigError: a file or a value that does not fit.
        UnsupportedError: a base that cannot carry a draft, or stored hidden states.
    """
    if arguments.offline_data is not None:
        raise UnsupportedError(
            f"--offline-data {arguments.offline_data}: Trainer does not read stored hidden states; leave it out, "
            "the base then runs beside the draft, or train with mcore-spec finetune --offline-distillation-data"
        )
    if training.output_dir is None:
        raise ConfigError("--output_dir is missing; give the directory that the trained model is written to")
    if (training.eval_strategy != "no") != bool(arguments.eval_data_path):
        raise ConfigError("--eval_strategy and --eval_data_path need each other; give both or neither")
    file = ConfigFile({}, where=f"{arguments.mode} config")
    if arguments.eagle_config is not None:
        file = read_config_file(Path(arguments.eagle_config), name="--eagle_config")
    directory = locate(arguments.model_name_or_path, field="model_name_or_path")
    tokenizer = load_tokenizer(directory)
    enable_huggingface_checkpointing()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=_dtype(arguments))
    model.config.name_or_path = arguments.model_name_or_path
    vocab_size = model.config.vocab_size
    d2t = None
    if arguments.draft_vocab_cache is not None:
        d2t = load_draft_to_target(Path(arguments.draft_vocab_cache), vocab_size=vocab_size)
    convert(model, _mode(arguments.mode, file), d2t=d2t, seed=training.seed)
    training.remove_unused_columns = False

    def store(sources: list[str]) -> TokenStore:
        return build_token_store(
            sources,
            tokenizer,
            cache_dir=Path(training.output_dir or "") / "data_cache",
            seq_length=arguments.training_seq_len,
            vocab_size=vocab_size,
        )

    trainer = _trainer(model, tokenizer, training, store(arguments.data_path))
    if arguments.eval_data_path:
        trainer.eval_dataset = ConversationDataset(store(arguments.eval_data_path))
    checkpoint = get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    trainer.save_model(training.output_dir)


def _dtype(arguments: DraftArguments) -> Any:
    if arguments.param_dtype != "auto":
        return vars(torch)[arguments.param_dtype]
    return "auto" if torch.cuda.is_available() else torch.float32


def _mode(mode: str, file: ConfigFile) -> list[tuple[str, Any]]:
    """The file over the defaults, as `convert` takes it."""
    name = "medusa" if mode == "medusa" else "eagle"
    configure = find_algorithm(name).configure
    assert configure is not None, "both algorithms read files"
    flags = {} if name == "medusa" else {"export_eagle_algorithm": mode}
    return [(name, configure(flags, file))]


def _trainer(
    model: PreTrainedModel, tokenizer: Tokenizer, training: TrainingArguments, store: TokenStore
) -> DraftTrainer:
    trainer = DraftTrainer(
        model=model,
        args=training,
        processing_class=cast(Any, tokenizer),
        train_dataset=ConversationDataset(store),
        data_collator=DraftCollator(),
    )
    size = trainer.get_cp_size()
    if size > 1:
        trainer.data_collator = DraftCollator(multiple=2 * size)
    return trainer

"""The command line of a training run on a transformers model: its own options and `TrainingArguments`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from mcore_spec.config import suggest
from mcore_spec.errors import ConfigError

# The kind of a new draft.
DEFAULT_MODE = "eagle3"


@dataclass(kw_only=True)
class DraftArguments:
    """Model, data and draft."""

    model_name_or_path: str = field(
        metadata={
            "help": "Directory or hub id of the base model; or of one that has a draft already, also a quantised one: "
            "that draft then goes on."
        }
    )
    data_path: list[str] = field(
        default_factory=list,
        metadata={"help": "Conversations: .jsonl, .json or .parquet files, or Hugging Face datasets."},
    )
    eval_data_path: list[str] = field(default_factory=list, metadata={"help": "Conversations for --eval_strategy."})
    mode: Literal["eagle3", "eagle1", "eagle-mtp", "medusa"] | None = field(
        default=None, metadata={"help": f"Kind of a new draft; {DEFAULT_MODE} if it is not given."}
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
        default=None,
        metadata={
            "help": "Store of hidden states (mcore-spec extract) instead of --data_path: the base's layers do not run."
        },
    )
    fit_start: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps from whose batches the draft's first weights are solved by least squares, before "
            "the first one. 0: none. Default: as many as the solution needs, where the draft has such a start and each "
            "process the whole model."
        },
    )


class Arguments(NamedTuple):
    """Both halves of a command line."""

    draft: DraftArguments
    training: TrainingArguments


class _Parser(HfArgumentParser):
    """Raises where argparse would print the hundreds of options and end the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse_arguments(words: Sequence[str], *, description: str | None = None) -> Arguments:
    """Options as dataclasses; ``--help`` prints them and ends the process.

    Raises:
        ConfigError: an option that is unknown, missing or has a value that does not fit.
    """
    # A beginning of an option would be taken for it, and a misspelt one for another.
    kinds: Any = [DraftArguments, TrainingArguments]
    parser = _Parser(kinds, description=description, allow_abbrev=False)
    try:
        draft, training, unknown = parser.parse_args_into_dataclasses(
            list(words), return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, ImportError) as error:
        # Of TrainingArguments: values that contradict each other, or the machine.
        raise ConfigError(" ".join(str(error).split())) from error
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        name = unknown[0].split("=", 1)[0]
        raise ConfigError(f"{unknown[0]}: unknown option; {suggest(name, known, otherwise='see --help')}")
    return Arguments(draft, training)

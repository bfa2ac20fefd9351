"""speculators' whole pipeline: data generation, vocabulary mapping and training behind each other."""

from __future__ import annotations

from pathlib import Path

import torch

from mcore_spec.cli import speculators_data, speculators_train, speculators_vocab
from mcore_spec.cli.speculators_arguments import (
    DataGenerationArguments,
    DraftTrainArguments,
    GenAndTrainArguments,
    SpeculatorsTrainArguments,
    VocabMappingArguments,
)
from mcore_spec.cli.terminal import say
from mcore_spec.data.durable_files import publish_file
from mcore_spec.data.foreign_states.speculators_v1 import DATA_CONFIG
from mcore_spec.errors import ConfigError
from mcore_spec.weights.base_directory import find_base

_GENERATION = {*DataGenerationArguments.model_fields} & {*GenAndTrainArguments.model_fields} - {"train_data_path"}


def run(arguments: GenAndTrainArguments) -> None:
    """Each step unless it was done; given again after an interruption, it goes on. Under torchrun the first process
    generates the data, and the others wait where training begins.
    """
    output = Path(arguments.output_path)
    if speculators_train.is_first_process():
        _generate(arguments, output)
    vocabulary = output / "vocab_mapping"
    training = arguments.model_dump(include={*DraftTrainArguments.model_fields})
    speculators_train.run(
        SpeculatorsTrainArguments(
            **training,
            verifier_name_or_path=arguments.verifier_name_or_path,
            data_path=str(output / "gen"),
            save_path=str(output / "checkpoints"),
            log_dir=str(output / "logs"),
            d2t_path=str(vocabulary / speculators_vocab.D2T),
            t2d_path=str(vocabulary / speculators_vocab.T2D),
        )
    )


def _generate(arguments: GenAndTrainArguments, output: Path) -> None:
    names = [_name(path) for path in arguments.train_data_path]
    if len(set(names)) < len(names):
        raise ConfigError(f"--train-data-path: sets of the same name ({', '.join(names)}); rename the files")
    base = find_base(arguments.verifier_name_or_path, field="verifier_name_or_path", with_weights=False)
    vocabulary = output / "vocab_mapping"
    counts = torch.zeros(base.architecture.vocab_size, dtype=torch.int64)
    for name, path in zip(names, arguments.train_data_path, strict=True):
        directory, count_path = output / "gen" / name, vocabulary / f"token_freq_{name}.pt"
        if (directory / DATA_CONFIG).exists():
            say(f"{directory} is there already")
        else:
            speculators_data.run(
                DataGenerationArguments(
                    **arguments.model_dump(include=_GENERATION),
                    target_model_path=arguments.verifier_name_or_path,
                    train_data_path=path,
                    output_dir=str(directory),
                    token_freq_path=str(count_path),
                )
            )
        counts += speculators_vocab.read_counts(count_path, vocab_size=len(counts))
    combined = vocabulary / "token_freq_combined.pt"
    found = {int(token): int(counts[token]) for token in counts.nonzero()[:, 0]}
    publish_file(combined, lambda partial: torch.save(found, partial))
    speculators_vocab.run(
        VocabMappingArguments(
            token_freq_path=str(combined),
            draft_vocab_size=arguments.draft_vocab_size,
            target_vocab_size=len(counts),
            output_path=str(vocabulary),
        )
    )


def _name(path: str) -> str:
    """Of a set, for its directory: a file's without its endings, a dataset's without its organisation and split."""
    return Path(path.partition(":")[0]).name.partition(".")[0]

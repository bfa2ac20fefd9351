"""speculators' vocabulary mapping: token counts into d2t.npy and t2d.npy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mcore_spec.cli.speculators_arguments import VocabMappingArguments
from mcore_spec.cli.terminal import say
from mcore_spec.data.durable_files import publish_file
from mcore_spec.data.torch_files import UnreadableFile, read_torch_file
from mcore_spec.drafts.vocab_map import select_draft_vocabulary, target_to_draft
from mcore_spec.errors import ConfigError
from mcore_spec.weights.base_directory import find_base

D2T, T2D = "d2t.npy", "t2d.npy"


def run(arguments: VocabMappingArguments) -> None:
    """Read the counts, select, write."""
    vocab_size = arguments.target_vocab_size
    if vocab_size is None:
        assert arguments.target_model_path is not None, "arguments were checked"
        base = find_base(arguments.target_model_path, field="target_model_path", with_weights=False)
        vocab_size = base.architecture.vocab_size
    counts = read_counts(Path(arguments.token_freq_path), vocab_size=vocab_size)
    d2t = select_draft_vocabulary(counts, size=arguments.draft_vocab_size)
    t2d = target_to_draft(d2t, vocab_size=vocab_size)
    output = Path(arguments.output_path)
    output.mkdir(parents=True, exist_ok=True)
    for name, tensor in ((D2T, d2t), (T2D, t2d)):
        save_array(output / name, tensor)
    covered = int(counts[t2d].sum()) / max(int(counts.sum()), 1)
    total = int(counts.sum())
    say(f"{len(d2t):,} of {vocab_size:,} tokens cover {covered:.2%} of {total:,}; wrote {output / D2T} and {T2D}")


def read_counts(path: Path, *, vocab_size: int) -> Tensor:
    """How often each token is to be produced, int64 [vocab_size].

    Raises:
        ConfigError: no such file, not a dictionary of counts, or tokens beyond the vocabulary.
    """
    try:
        found = read_torch_file(path)
    except FileNotFoundError:
        raise ConfigError(f"--token-freq-path {path}: no such file; data_generation_offline.py writes it") from None
    except UnreadableFile as error:
        raise ConfigError(f"--token-freq-path {path} cannot be read ({error}); generate the data again") from error
    if not isinstance(found, dict) or not all(isinstance(each, int) for pair in found.items() for each in pair):
        raise ConfigError(f"--token-freq-path {path} holds no dictionary of token ids and counts")
    wrong = [token for token in found if not 0 <= token < vocab_size]
    if wrong:
        raise ConfigError(
            f"--token-freq-path {path}: token {max(wrong)} is beyond the base's vocabulary of {vocab_size}; give the "
            "base that the data was generated with"
        )
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    counts[torch.tensor(list(found), dtype=torch.int64)] = torch.tensor(list(found.values()), dtype=torch.int64)
    return counts


def save_array(path: Path, tensor: Tensor) -> None:
    """A ``.npy`` file, whole or not at all."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.save(file, tensor.numpy(), allow_pickle=False)

    publish_file(path, write)


def load_array(path: Path, *, flag: str) -> Tensor:
    """A vector in a ``.npy`` file.

    Raises:
        ConfigError: no such file, or not such a one.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise ConfigError(f"{flag} {path}: no such file; build_vocab_mapping.py writes it") from None
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{flag} {path} cannot be read ({error}); build_vocab_mapping.py writes it") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype not in (np.int64, np.int32, np.bool_):
        raise ConfigError(f"{flag} {path} holds no vector of integers; build_vocab_mapping.py writes it")
    return torch.from_numpy(array)

"""The draft vocabulary: which of the base's tokens a draft can propose."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mcore_spec.data.torch_files import UnreadableFile, read_torch_file
from mcore_spec.errors import ConfigError, UnsupportedError

_REMEDY = "make it again for this base"


def load_draft_to_target(path: Path, *, vocab_size: int) -> Tensor:
    """Read ``d2t.pt``: int64 [draft vocabulary], target id = i + d2t[i].

    Args:
        path: a tensor saved by `torch.save`.
        vocab_size: entries of the base's vocabulary.

    Raises:
        ConfigError: unreadable, not an integer vector, targets not strictly ascending or out of range.
    """
    try:
        d2t = read_torch_file(path)
    except FileNotFoundError as error:
        raise ConfigError(f"draft_vocab_cache = {path}: no such file; correct the path, or {_REMEDY}") from error
    except UnreadableFile as error:
        raise ConfigError(f"draft_vocab_cache = {path}: not a torch tensor file ({error}); {_REMEDY}") from error
    return check_draft_to_target(d2t, vocab_size=vocab_size, where=f"draft_vocab_cache = {path}")


def check_draft_to_target(d2t: object, *, vocab_size: int, where: str) -> Tensor:
    """`d2t` as an int64 vector, if it maps to ascending entries of the base's vocabulary.

    Args:
        d2t: what a file or a caller gave.
        vocab_size: entries of the base's vocabulary.
        where: what it was read from, for errors.

    Raises:
        ConfigError: it is no integer vector, or its targets do not ascend strictly or are out of range.
    """
    if not isinstance(d2t, Tensor) or d2t.ndim != 1 or d2t.dtype not in (torch.int32, torch.int64):
        kind = f"{d2t.dtype} {tuple(d2t.shape)}" if isinstance(d2t, Tensor) else type(d2t).__name__
        raise ConfigError(f"{where} holds {kind}; it must hold an int64 vector d2t: {_REMEDY}")
    d2t = d2t.to(torch.int64)
    targets = torch.arange(d2t.shape[0], device=d2t.device) + d2t
    if d2t.shape[0] > vocab_size:
        raise ConfigError(
            f"{where} has {d2t.shape[0]} entries, more than the base's vocabulary of {vocab_size}; {_REMEDY}"
        )
    if d2t.shape[0] == 0 or bool((targets.diff() <= 0).any()):
        raise ConfigError(f"{where}: target ids i + d2t[i] must ascend strictly; {_REMEDY}")
    if int(targets[0]) < 0 or int(targets[-1]) >= vocab_size:
        raise ConfigError(
            f"{where}: target ids {int(targets[0])} to {int(targets[-1])} leave the base's "
            f"vocabulary of {vocab_size}; it was made for another base: {_REMEDY}"
        )
    return d2t


def agree_on_size(given: int | None, d2t: Tensor | None) -> int | None:
    """Entries of the draft vocabulary, from the configuration or from the mapping; ``None``: neither says it.

    Raises:
        ConfigError: they differ.
    """
    size = given if d2t is None else int(d2t.shape[0])
    if given not in (None, size):
        raise ConfigError(f"draft_vocab_size = {given} but d2t has {size} entries; make the two agree")
    return size


def check_has_mapping(size: int, d2t: Tensor | None, *, vocab_size: int) -> None:
    """Refuse a draft vocabulary of `size` entries of which nobody says what they are.

    Raises:
        ConfigError: it is not the base's of `vocab_size` entries, and there is no d2t.
    """
    if size != vocab_size and d2t is None:
        raise ConfigError(
            f"draft_vocab_size = {size} is not the base's vocabulary of {vocab_size}: give the mapping d2t "
            "(--draft-vocab-cache), or an engine would propose the first ids"
        )


def check_is_filled(targets: Tensor, *, vocab_size: int) -> None:
    """Refuse to export a mapping that was never set, or is damaged.

    Args:
        targets: base token id of each entry, int64 [draft vocabulary].
        vocab_size: entries of the base's vocabulary.

    Raises:
        UnsupportedError: they do not ascend strictly, or are out of range.
    """
    in_range = bool((targets >= 0).all()) and bool((targets < vocab_size).all())
    if not in_range or bool((targets.diff() <= 0).any()):
        raise UnsupportedError(
            f"the draft vocabulary of {targets.shape[0]} entries has no valid d2t: an engine would propose the "
            "wrong ids; convert again with --draft-vocab-cache"
        )


def select_draft_vocabulary(counts: Tensor, *, size: int) -> Tensor:
    """The `size` most frequent tokens as d2t; of equally frequent ones those with the lower id.

    Args:
        counts: how often each entry of the base's vocabulary is to be produced, int64 [vocabulary].
        size: entries of the draft vocabulary.

    Returns:
        d2t, int64 [size]: ascending target ids minus their index.

    Raises:
        ConfigError: more entries than the base's vocabulary has.
    """
    if not 0 < size <= counts.shape[0]:
        raise ConfigError(
            f"draft_vocab_size = {size} is not between 1 and the base's vocabulary of {counts.shape[0]}; choose another"
        )
    order = torch.argsort(counts, descending=True, stable=True)
    targets = order[:size].sort().values
    return targets - torch.arange(size)


def target_to_draft(d2t: Tensor, *, vocab_size: int) -> Tensor:
    """t2d: whether each entry of the base's vocabulary is in the draft's, bool [vocabulary]."""
    is_in = torch.zeros(vocab_size, dtype=torch.bool)
    is_in[torch.arange(d2t.shape[0]) + d2t] = True
    return is_in

"""The conversations of a command that runs a base over them, tokenised once for all ranks."""

from __future__ import annotations

from pathlib import Path

from mcore_spec.checkpoint.store import Checkpoint
from mcore_spec.cli.terminal import say
from mcore_spec.config import BaseArchitecture, DataConfig
from mcore_spec.data.chat import check_same_vocabulary, load_tokenizer
from mcore_spec.data.store import TokenStore, build_token_store
from mcore_spec.parallel.layout import run_on_rank_zero


def read_conversations(
    config: DataConfig, base: BaseArchitecture, tokenizer: str | Path, *, cache_dir: Path
) -> TokenStore:
    """The tokenised conversations, made unless they are in the cache; what went in is said.

    Args:
        config: where they are.
        base: whose vocabulary the tokenizer must have.
        tokenizer: its directory or hub id.
        cache_dir: where they are kept, unless the configuration says.

    Raises:
        ConfigError: what `build_token_store` refuses, or samples longer than the base's positions.
    """
    base.check_seq_length(config.seq_length)
    store = build_token_store(
        config.data_path,
        tokenizer,
        cache_dir=cache_dir if config.data_cache_path is None else Path(config.data_cache_path),
        seq_length=config.seq_length,
        on_bad_line=config.on_bad_line,
        vocab_size=base.vocab_size,
    )
    say(f"data: {store.counts.describe(cut_by='--seq-length')}")
    for reason in store.counts.skip_reasons:
        say(f"  left out: {reason}")
    return store


def choose_tokenizer(checkpoint: Checkpoint, given: str | None) -> str:
    """The tokenizer that is named, if it has the base's vocabulary, or else the one that came with the base.

    Raises:
        ConfigError: there is neither, or another vocabulary.
    """
    tokenizer = checkpoint.choose_tokenizer(given)
    run_on_rank_zero(lambda: _check_tokenizer(given, checkpoint))
    return tokenizer


def _check_tokenizer(given: str | None, checkpoint: Checkpoint) -> None:
    """Compare another tokenizer with the one that came with the base, if one did."""
    own = checkpoint.tokenizer_path
    if given is not None and any(own.glob("*")):
        check_same_vocabulary(load_tokenizer(given), load_tokenizer(own), f"--tokenizer-model {given}")

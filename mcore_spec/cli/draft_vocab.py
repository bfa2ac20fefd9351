"""``mcore-spec draft-vocab``: counts the tokens that a base is to produce, and keeps the most frequent ones."""

from __future__ import annotations

from pathlib import Path

import torch

from mcore_spec.cli.terminal import say
from mcore_spec.cli.training_arguments import DraftVocabArguments
from mcore_spec.data.store import build_token_store
from mcore_spec.drafts.vocab_map import select_draft_vocabulary, target_to_draft
from mcore_spec.errors import ConfigError
from mcore_spec.weights.hf_config import describe_hf, locate, read_hf_config

D2T_NAME, T2D_NAME = "d2t.pt", "t2d.pt"


def run(arguments: DraftVocabArguments) -> None:
    """Count, select, write ``d2t.pt`` (what convert takes) and ``t2d.pt``."""
    directory = locate(arguments.pretrained_model_path)
    base = describe_hf(read_hf_config(directory), where=str(directory / "config.json"))
    if arguments.draft_vocab_size > base.vocab_size:
        raise ConfigError(
            f"--draft-vocab-size {arguments.draft_vocab_size} is above the base's vocabulary of {base.vocab_size}; "
            "give a smaller one"
        )
    output = Path(arguments.output_dir)
    store = build_token_store(
        arguments.data_path,
        arguments.tokenizer_model or str(directory),
        cache_dir=Path(arguments.data_cache_path or output / "data_cache"),
        seq_length=arguments.seq_length,
        on_bad_line=arguments.on_bad_line,
        vocab_size=base.vocab_size,
    )
    counts = torch.from_numpy(store.count_masked_tokens(base.vocab_size))
    d2t = select_draft_vocabulary(counts, size=arguments.draft_vocab_size)
    t2d = target_to_draft(d2t, vocab_size=base.vocab_size)
    output.mkdir(parents=True, exist_ok=True)
    for name, tensor in ((D2T_NAME, d2t), (T2D_NAME, t2d)):
        temporary = output / f".{name}"
        torch.save(tensor, temporary)
        temporary.replace(output / name)
    covered = int(counts[t2d].sum()) / max(int(counts.sum()), 1)
    say(
        f"{d2t.shape[0]:,} of {base.vocab_size:,} tokens cover {covered:.2%} of {int(counts.sum()):,} tokens that the "
        f"model produces ({int((counts > 0).sum()):,} different ones); wrote {output / D2T_NAME} and {T2D_NAME}"
    )

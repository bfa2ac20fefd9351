"""What both contenders of the acceptance benchmark learn from, and what they are asked: from one file of conversations.

    python -m tools.benchmark.acceptance_data --base DIR --data-path FILE --work-dir DIR

Writes, into the work directory:

    train.jsonl         the conversations that are learnt from, as they stand in the file, in its order
    train.safetensors   the same as tokens with their loss masks, cut: for a contender that does not read conversations
    prompts.jsonl       the first questions of the conversations behind them

The command runs under this package, whose chat template code decides which tokens are the model's; `Batches` reads the
tokens and imports torch and safetensors only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.benchmark.cases import CaseError

NUM_ITERATIONS = 100
BATCH_SIZE = 4
NUM_CONVERSATIONS = NUM_ITERATIONS * BATCH_SIZE
NUM_PROMPTS = 40
MAX_TOKENS = 256
TRAIN_FILE = "train.jsonl"
TOKENS_FILE = "train.safetensors"
PROMPTS_FILE = "prompts.jsonl"

Messages: TypeAlias = list[dict[str, str]]


class Batch(NamedTuple):
    """Conversations padded to one length n.

    Attributes:
        input_ids: int64 [b, n].
        attention_mask: int64 [b, n], 1 where there is a token.
        loss_mask: int64 [b, n], 1 where the base should produce the token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor


class Batches:
    """The training conversations in file order, `BATCH_SIZE` at a time, each padded to `MAX_TOKENS`."""

    def __init__(self, file: Path, *, pad_id: int) -> None:
        """Read the tokens that `prepare` wrote; padding is `pad_id`."""
        tensors = load_file(file)
        stops = tensors["lengths"].cumsum(0).tolist()
        self._ids = [tensors["token_ids"][start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
        self._masks = [tensors["loss_mask"][start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
        self._pad_id = pad_id

    def __len__(self) -> int:
        """Whole batches."""
        return len(self._ids) // BATCH_SIZE

    def __getitem__(self, index: int) -> Batch:
        """Batch `index`, from 0."""
        rows = range(index * BATCH_SIZE, (index + 1) * BATCH_SIZE)
        ids = torch.full((BATCH_SIZE, MAX_TOKENS), self._pad_id, dtype=torch.int64)
        there, learnt = torch.zeros_like(ids), torch.zeros_like(ids)
        for place, row in enumerate(rows):
            length = self._ids[row].shape[0]
            ids[place, :length] = self._ids[row]
            there[place, :length] = 1
            learnt[place, :length] = self._masks[row]
        return Batch(ids, there, learnt)


def choose(conversations: Iterable[Messages], *, where: str) -> tuple[list[Messages], list[Messages]]:
    """The conversations to learn from, and those whose questions are asked: the first ones, and those behind them.

    Raises:
        CaseError: too few of them.
    """
    needed = NUM_CONVERSATIONS + NUM_PROMPTS
    chosen = list(islice(conversations, needed))
    if len(chosen) < needed:
        raise CaseError(
            f"{where} has {len(chosen)} conversations; the benchmark learns from {NUM_CONVERSATIONS} and asks "
            f"{NUM_PROMPTS} others: give a file with {needed}"
        )
    return chosen[:NUM_CONVERSATIONS], chosen[NUM_CONVERSATIONS:]


def prepare(base: Path, data_path: str, work_dir: Path) -> None:
    """Write the three files.

    A question may fill the whole length. Such a conversation teaches nobody anything: it stays in its place in the
    batch of a contender that goes by the tokens, and this package leaves it out.

    Raises:
        CaseError: too few conversations, or a directory with those of another file.
        McoreSpecError: the file cannot be read.
    """
    # Not at the top: `Batches` is also used where this package is not installed.
    from mcore_spec.data.chat import ChatEncoder, load_tokenizer
    from mcore_spec.data.conversations import ConversationReader

    reader = ConversationReader([data_path])
    learnt, asked = choose((each.messages for each in reader), where=data_path)
    encoder = ChatEncoder(load_tokenizer(base))
    encoded = encoder.tokenize([encoder.render(messages) for messages in learnt])
    ids = [torch.tensor(each.token_ids[:MAX_TOKENS]) for each in encoded]
    masks = [torch.tensor(each.loss_mask[:MAX_TOKENS]) for each in encoded]
    num_empty = sum(not mask.any() for mask in masks)
    if num_empty:
        print(f"note: {num_empty} of {NUM_CONVERSATIONS} conversations have no token of an answer within {MAX_TOKENS}")
    questions = [next(each["content"] for each in messages if each["role"] == "user") for messages in asked]
    texts = {
        TRAIN_FILE: _lines({"conversations": messages} for messages in learnt),
        PROMPTS_FILE: _lines({"turns": [question]} for question in questions),
    }
    for name, text in texts.items():
        if (work_dir / name).exists() and (work_dir / name).read_text() != text:
            raise CaseError(
                f"{work_dir / name} is of other data than {data_path}, and contenders there may have learnt from it; "
                "choose another --work-dir"
            )
    work_dir.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (work_dir / name).write_text(text)
    tensors = {
        "token_ids": torch.cat(ids),
        "loss_mask": torch.cat(masks),
        "lengths": torch.tensor([each.shape[0] for each in ids]),
    }
    save_file(tensors, work_dir / TOKENS_FILE)


def _lines(values: Iterable[object]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from mcore_spec.errors import McoreSpecError

    parser = argparse.ArgumentParser(description="Make what the contenders of the acceptance benchmark share.")
    parser.add_argument("--base", type=Path, required=True, help="the base model, an HF directory")
    parser.add_argument("--data-path", required=True, help="conversations, JSON lines")
    parser.add_argument("--work-dir", type=Path, required=True, help="where the files go")
    options = parser.parse_args(arguments)
    try:
        prepare(options.base, options.data_path, options.work_dir)
    except (CaseError, McoreSpecError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

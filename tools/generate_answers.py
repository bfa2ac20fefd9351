"""Let a base model answer prompts, so that its draft learns from what the base itself would say.

    python tools/generate_answers.py --model DIR --prompts examples/data/prompts.jsonl --output conversations.jsonl

Prompts are lines of JSON with ``turns`` (a list of user turns) or ``conversations`` / ``messages`` (whose user
turns are taken). Each user turn is answered in its own context. The output is what ``finetune --data-path``
reads. A run that was interrupted goes on where it stopped: prompts that are answered already are skipped.
An answer that reaches --max-new-tokens is cut off there; --drop-truncated leaves such conversations out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Prompt(NamedTuple):
    """User turns that are asked one after the other."""

    conversation_id: str
    category: str | None
    turns: list[str]


def read_prompts(path: Path) -> Iterator[Prompt]:
    """The prompts of a file.

    Raises:
        ValueError: a line without user turns; names it.
    """
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        record: dict[str, Any] = json.loads(line)
        messages = record.get("conversations") or record.get("messages") or []
        turns = record.get("turns") or [each["content"] for each in messages if each["role"] == "user"]
        if not turns:
            raise ValueError(f"{path}:{number}: no turns, conversations or messages with a user's turn")
        identity = record.get("question_id") or record.get("conversation_id") or number
        yield Prompt(str(identity), record.get("category"), turns)


class Answerer:
    """A base model with its tokenizer."""

    def __init__(self, directory: str, *, max_new_tokens: int, temperature: float, dtype: str, seed: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        torch.manual_seed(seed)

    @torch.no_grad()
    def answer(self, conversations: Sequence[list[dict[str, str]]]) -> list[tuple[str, bool]]:
        """The next assistant turn of each conversation, and whether it came to its end."""
        inputs = self.tokenizer.apply_chat_template(
            list(conversations), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        sampling = (
            {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {"do_sample": False}
        )
        output: Tensor = self.model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, pad_token_id=self.tokenizer.pad_token_id, **sampling
        )
        answers = output[:, inputs["input_ids"].shape[1] :]
        ends = self.model.generation_config.eos_token_id
        end_ids = torch.tensor(ends if isinstance(ends, list) else [ends], device=answers.device)
        is_whole = torch.isin(answers, end_ids).any(dim=1).tolist()
        return list(zip(self.tokenizer.batch_decode(answers, skip_special_tokens=True), is_whole, strict=True))


def converse(answerer: Answerer, prompts: Sequence[Prompt], *, drop_truncated: bool) -> Iterator[dict[str, Any]]:
    """Ask a batch of prompts turn by turn; the finished conversations."""
    messages: list[list[dict[str, str]]] = [[] for _ in prompts]
    is_whole = [True] * len(prompts)
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        asked = [index for index, prompt in enumerate(prompts) if turn < len(prompt.turns) and is_whole[index]]
        for index in asked:
            messages[index].append({"role": "user", "content": prompts[index].turns[turn]})
        # Further turns behind an answer that was cut off would continue a conversation nobody had.
        for index, (text, ended) in zip(asked, answerer.answer([messages[i] for i in asked]), strict=True):
            messages[index].append({"role": "assistant", "content": text})
            is_whole[index] = ended
    for prompt, conversation, whole in zip(prompts, messages, is_whole, strict=True):
        if whole or not drop_truncated:
            category = {} if prompt.category is None else {"category": prompt.category}
            yield {"conversation_id": prompt.conversation_id, **category, "conversations": conversation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id of the base model")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--batch-size", type=int, default=8, help="conversations at a time")
    parser.add_argument("--dtype", default="float32", help="of the weights, e.g. bfloat16 on a GPU")
    parser.add_argument("--seed", type=int, default=1234, help="of sampling")
    parser.add_argument("--drop-truncated", action="store_true", help="leave out answers that were cut off")
    given = parser.parse_args()
    done = set()
    if given.output.exists():
        done = {json.loads(line)["conversation_id"] for line in given.output.read_text().splitlines()}
    prompts = [prompt for prompt in read_prompts(given.prompts) if prompt.conversation_id not in done]
    print(f"{len(done)} conversations are there, {len(prompts)} prompts to answer")
    answerer = Answerer(
        given.model,
        max_new_tokens=given.max_new_tokens,
        temperature=given.temperature,
        dtype=given.dtype,
        seed=given.seed,
    )
    with given.output.open("a") as file:
        for start in range(0, len(prompts), given.batch_size):
            batch = prompts[start : start + given.batch_size]
            for conversation in converse(answerer, batch, drop_truncated=given.drop_truncated):
                file.write(json.dumps(conversation, ensure_ascii=False) + "\n")
            file.flush()
            print(f"{start + len(batch)} of {len(prompts)}", flush=True)


if __name__ == "__main__":
    main()

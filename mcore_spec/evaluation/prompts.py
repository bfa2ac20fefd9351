"""From prompts to token ids, and from token ids to text: the chat template, the ends of an answer, several turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from mcore_spec.data.chat import Tokenizer, check_tokenizer, encode_question, load_tokenizer
from mcore_spec.data.conversations import Message
from mcore_spec.data.prompts import Prompt
from mcore_spec.errors import ConfigError

GENERATION_CONFIG = "generation_config.json"


class PromptEncoder(Protocol):
    """What evaluation needs of a tokenizer."""

    end_ids: tuple[int, ...]

    def encode(self, messages: list[Message]) -> list[int]:
        """Token ids that ask the model for its next answer."""

    def decode(self, token_ids: list[int]) -> str:
        """Text of an answer, without its end."""


class TokenizerPrompts:
    """A tokenizer with its chat template; one without a template takes a single text as it is.

    Attributes:
        tokenizer: transformers' own.
        end_ids: tokens that end an answer.
    """

    def __init__(self, path_or_hub_id: str | Path, *, vocab_size: int, config: dict[str, Any] | None = None) -> None:
        """Load the tokenizer.

        Args:
            path_or_hub_id: of the tokenizer; generation_config.json is read beside it.
            vocab_size: entries of the base's vocabulary.
            config: the base's config.json, which may name ends too.

        Raises:
            ConfigError: no tokenizer there, one of another base, or no token that ends an answer.
        """
        self.tokenizer: Tokenizer = load_tokenizer(path_or_hub_id)
        check_tokenizer(self.tokenizer, vocab_size, f"tokenizer_model = {path_or_hub_id}")
        ends = [self.tokenizer.eos_token_id, _ends_in(config or {})]
        file = Path(path_or_hub_id) / GENERATION_CONFIG
        if file.exists():
            ends.append(_ends_in(_read_json(file)))
        flat = [each for end in ends for each in (end if isinstance(end, list) else [end])]
        self.end_ids = tuple(sorted({each for each in flat if isinstance(each, int)}))
        if not self.end_ids:
            raise ConfigError(
                f"tokenizer_model = {path_or_hub_id}: neither the tokenizer nor {GENERATION_CONFIG} says which token "
                "ends an answer; add eos_token to tokenizer_config.json"
            )

    def encode(self, messages: list[Message]) -> list[int]:
        """Token ids that ask for the next answer.

        Raises:
            ConfigError: the template refuses the messages, or there is none and they are several.
        """
        if self.tokenizer.chat_template or len(messages) > 1:
            return encode_question(self.tokenizer, messages)
        ids: list[int] = self.tokenizer(messages[0]["content"], verbose=False)["input_ids"]
        return ids

    def decode(self, token_ids: list[int]) -> str:
        """Text without special tokens."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def first_messages(prompt: Prompt) -> list[Message]:
    """What stands before the first turn: the system message, if there is one."""
    return [] if prompt.system is None else [{"role": "system", "content": prompt.system}]


def _ends_in(config: dict[str, Any]) -> Any:
    return config.get("eos_token_id")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    return values if isinstance(values, dict) else {}

"""Well-known sets of prompts, brought into one form.

    {"conversation_id": "SET-NAME", "category": ..., "conversations": [{"role": "user", "content": ...}, ...]}

A set is a row in `PROMPT_SETS`. Answers of the sets are left out: a draft learns from what its own base says. Names
begin with the set's, so that several sets can stand in one file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from mcore_spec.data.conversations import Message, OnBadLine, check_text, shown
from mcore_spec.data.prompts import PROMPT_FORMATS, Prompt, make_prompt, parse_prompt, read_name
from mcore_spec.data.sources import Source, open_source
from mcore_spec.errors import ConfigError

_MAX_REASONS = 5
_USERS = ("human", "user")
_ASSISTANTS = ("gpt", "chatgpt", "bard", "assistant")


class PromptSet(NamedTuple):
    """How the entries of a set are read.

    Attributes:
        read: one entry; raises `ConfigError` for one that holds no prompt.
        source: dataset on the hub, with split; None where a file has to be given.
        file: which one that is, for the message that asks for it.
        on_bad_line: what is usual: scraped sets have entries that nobody can use.
        named: whether names begin with the set's.
    """

    read: Callable[[Any], Prompt]
    source: str | None
    on_bad_line: OnBadLine
    file: str = ""
    named: bool = True


class PromptSetReader:
    """The prompts of a set, one after the other.

    Attributes:
        num_skipped: entries that were left out.
        reasons: the first few of them, with their places.
    """

    def __init__(self, name: str, source: str | None, *, on_bad_line: OnBadLine | None = None) -> None:
        """Find the source; nothing is read yet.

        Args:
            name: of the set, a key of `PROMPT_SETS`.
            source: file, or dataset on the hub; None: the one where the set is published.
            on_bad_line: leave bad entries out and count them, or raise at the first; None: what is usual for the set.

        Raises:
            ConfigError: a source that does not exist, or none at all.
        """
        self._name, self._set = name, PROMPT_SETS[name]
        given = source or self._set.source
        if given is None:
            raise ConfigError(f"input is required: {name} is read from {self._set.file}")
        self._source: Source = open_source(given, field="input", formats=PROMPT_FORMATS)
        self._on_bad_line = on_bad_line or self._set.on_bad_line
        self.num_skipped = 0
        self.reasons: list[str] = []

    def __iter__(self) -> Iterator[Prompt]:
        """Read from the beginning.

        Raises:
            ConfigError: the source cannot be read or holds no prompt; a bad entry, unless those are skipped.
        """
        self.num_skipped, self.reasons = 0, []
        known: set[str] = set()
        for record in self._source.records():
            where = self._source.where(record.line)
            try:
                if record.problem is not None:
                    raise ConfigError(record.problem)
                prompt = self._read(record.value)
                if prompt.conversation_id in known:
                    raise ConfigError(f"{prompt.conversation_id} stands in the set already")
            except ConfigError as error:
                self._skip(where, str(error))
                continue
            known.add(prompt.conversation_id)
            yield prompt._replace(where=where)
        if not known:
            first = f", the first: {self.reasons[0]}" if self.reasons else ""
            raise ConfigError(
                f"input = {self._source.name} holds no prompt of the form {self._name} ({self.num_skipped} entries "
                f"left out{first}); give another file or another format"
            )

    def _read(self, value: object) -> Prompt:
        prompt = self._set.read(value)
        name = read_name(value) or prompt.conversation_id
        return prompt._replace(conversation_id=f"{self._name}-{name}" if self._set.named else name)

    def _skip(self, where: str, problem: str) -> None:
        if self._on_bad_line == "error":
            raise ConfigError(f"{where}: {problem}; correct it, or leave such entries out with on_bad_line = skip")
        self.num_skipped += 1
        if len(self.reasons) < _MAX_REASONS:
            self.reasons.append(f"{where}: {problem}")


def as_messages(prompt: Prompt) -> list[Message]:
    """A prompt as a chat without answers, as `read_prompts` takes it."""
    system: list[Message] = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, *({"role": "user", "content": turn} for turn in prompt.turns)]


def _read_daring_anteater(value: object) -> Prompt:
    """nvidia/Daring-Anteater: ``conversations`` of User and Assistant, ``system``; ``dataset`` names the origin."""
    prompt = parse_prompt(value)
    origin = value.get("dataset") if isinstance(value, dict) else None
    return prompt._replace(category=origin) if isinstance(origin, str) and prompt.category is None else prompt


def _read_sharegpt(value: object) -> Prompt:
    """ShareGPT: ``conversations`` of human and gpt, in pieces, some of which begin with an answer.

    A system message there is the scraper's, an empty answer a page that was saved too early, and conversations with
    Bing went through a search; only the human's turns are of use here.
    """
    entry = _entry(value)
    messages = entry.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"conversations = {shown(messages)}; it must be a list of messages")
    turns: list[str] = []
    for index, message in enumerate(messages):
        where = f"conversations[{index}]"
        if not isinstance(message, dict):
            raise ConfigError(f"{where} = {shown(message)}; a message must be an object")
        speaker = str(message.get("from")).lower()
        if speaker in _USERS:
            turns.append(check_text(message.get("value"), f"{where}.value"))
        elif speaker not in _ASSISTANTS and speaker != "system":
            raise ConfigError(f"{where} is by {shown(message.get('from'))}; known are human and gpt")
    if not turns:
        raise ConfigError("has no turn of the human")
    return make_prompt(entry, turns=tuple(turns), system=None)


def _read_ultrachat(value: object) -> Prompt:
    """HuggingFaceH4/ultrachat_200k: ``messages``; stingning/ultrachat: ``data``, a list of question, answer, ..."""
    entry = _entry(value)
    if "data" not in entry:
        return parse_prompt(value)
    texts = entry["data"]
    if not isinstance(texts, list) or not texts:
        raise ConfigError(f"data = {shown(texts)}; it must be a list of texts")
    turns = tuple(check_text(text, f"data[{2 * index}]") for index, text in enumerate(texts[::2]))
    return make_prompt(entry, turns=turns, system=None)


def _entry(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"holds {shown(value)}; it must hold an object")
    return value


PROMPT_SETS: Mapping[str, PromptSet] = MappingProxyType(
    {
        "daring-anteater": PromptSet(_read_daring_anteater, "nvidia/Daring-Anteater:train", "skip"),
        "sharegpt": PromptSet(
            _read_sharegpt,
            None,
            "skip",
            file="a file like ShareGPT_V3_unfiltered_cleaned_split.json of anon8231489123/ShareGPT_Vicuna_unfiltered",
        ),
        "ultrachat": PromptSet(_read_ultrachat, "HuggingFaceH4/ultrachat_200k:train_sft", "skip"),
        "mtbench": PromptSet(parse_prompt, "HuggingFaceH4/mt_bench_prompts:train", "error"),
        # Any file or dataset that `read_prompts` could read as well; it is checked and brought into the common form.
        "own": PromptSet(parse_prompt, None, "error", file="a file or dataset of yours", named=False),
    }
)

"""Conversations out of the forms that are in use, checked turn by turn.

    {"conversation_id": ..., "conversations": [{"role": "user", "content": "..."}, ...]}     ModelOpt
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}]}             ShareGPT
    {"messages": [{"role": "user", "content": "..."}, ...]}          OpenAI; contents may be lists of text parts

Other keys of an entry are left alone, but for ``system``: a string there that is not blank is the system message of
ShareGPT's variants. What a chat template would render wrongly or not at all is refused here, where its line is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mcore_spec.data.sources import open_source
from mcore_spec.errors import ConfigError

Message = dict[str, str]
OnBadLine = Literal["error", "skip"]

ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}
_MAX_REASONS = 5
_SHOWN_CHARACTERS = 60


class Conversation(NamedTuple):
    """Turns of one conversation, and where they stand.

    Attributes:
        source: the file or dataset, as the user gave it.
        line: number in it, from 1: the line of a ``.jsonl`` file, otherwise the entry.
        where: both, as a message names them.
        messages: ``role`` and ``content`` of each turn: perhaps system, then user and assistant by turns.
    """

    source: str
    line: int
    where: str
    messages: list[Message]


class ConversationReader:
    """The conversations of several sources, one behind the other.

    Attributes:
        num_read: conversations that were handed out.
        num_skipped: entries that were left out.
        reasons: the first few of them, with their places.
    """

    def __init__(self, sources: Sequence[str | Path], *, on_bad_line: OnBadLine = "error") -> None:
        """Find the sources; nothing is read yet.

        Args:
            sources: see `open_source`.
            on_bad_line: raise at the first bad entry, or leave bad entries out and count them.

        Raises:
            ConfigError: a source that does not exist, or none at all.
        """
        if not sources:
            raise ConfigError("data_path is empty; name at least one file or dataset")
        self.sources = [open_source(source) for source in sources]
        self.on_bad_line = on_bad_line
        self._start()

    def _start(self) -> None:
        self.num_read, self.num_skipped = 0, 0
        self.reasons: list[str] = []

    def __iter__(self) -> Iterator[Conversation]:
        """Read from the beginning; the counts start anew.

        Raises:
            ConfigError: a source without entries or that cannot be read; a bad entry, unless those are skipped.
        """
        self._start()
        for source in self.sources:
            is_empty = True
            for record in source.records():
                is_empty, where = False, source.where(record.line)
                if record.problem is not None:
                    self.skip(where, record.problem)
                    continue
                try:
                    messages = parse_messages(record.value)
                except ConfigError as error:
                    self.skip(where, str(error))
                    continue
                self.num_read += 1
                yield Conversation(source.name, record.line, where, messages)
            if is_empty:
                raise ConfigError(f"data_path = {source.name} is empty; leave it out, or give one with conversations")

    def skip(self, where: str, problem: str) -> None:
        """Leave an entry out and remember why.

        Raises:
            ConfigError: bad entries are not to be skipped.
        """
        if self.on_bad_line == "error":
            raise ConfigError(f"{where}: {problem}; correct it, or leave such lines out with on_bad_line = skip")
        self.num_skipped += 1
        if len(self.reasons) < _MAX_REASONS:
            self.reasons.append(f"{where}: {problem}")


def parse_messages(value: object) -> list[Message]:
    """The turns of one entry, under the keys ``role`` and ``content``, of which a model can learn.

    Args:
        value: what JSON holds.

    Raises:
        ConfigError: what is wrong with it; its place is for the caller to name.
    """
    messages = read_messages(value)
    _check_order(messages)
    return messages


def read_messages(value: object) -> list[Message]:
    """The turns of one entry, under the keys ``role`` and ``content``, in any order of roles.

    Args:
        value: what JSON holds.

    Raises:
        ConfigError: what is wrong with it; its place is for the caller to name.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"holds {shown(value)}; it must hold an object")
    lists = [key for key in ("conversations", "messages") if value.get(key) is not None]
    if len(lists) != 1:
        found = "both" if lists else f"neither, but {keys_of(value)}"
        raise ConfigError(f"must have either conversations or messages; it has {found}")
    turns = value[lists[0]]
    if not isinstance(turns, list):
        raise ConfigError(f"{lists[0]} = {shown(turns)}; it must be a list of messages")
    messages = [_message(turn, f"{lists[0]}[{index}]") for index, turn in enumerate(turns)]
    system = value.get("system")
    if isinstance(system, str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise ConfigError(f"{where} = {shown(turn)}; a message must be an object")
    if "role" in turn and "content" in turn:
        content_key, role = "content", turn["role"]
        roles = {name: name for name in ROLES}
    elif "from" in turn and "value" in turn:
        content_key, role = "value", turn["from"]
        role = role.lower() if isinstance(role, str) else role
        roles = _SHAREGPT_ROLES
    else:
        raise ConfigError(f"{where} has {keys_of(turn)}; a message must have role and content, or from and value")
    if not isinstance(role, str) or role not in roles:
        raise ConfigError(f"{where} has the unknown role {shown(role)}; known roles: {', '.join(roles)}")
    place = f"{where}.{content_key}"
    return {"role": roles[role], "content": check_text(_joined(turn[content_key], place), place)}


def _joined(content: object, where: str) -> object:
    """OpenAI's list of parts as one text; anything else as it is.

    Raises:
        ConfigError: a part that is no text.
    """
    if not isinstance(content, list):
        return content
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ConfigError(
                f"{where}[{index}] = {shown(part)}; of parts only text can be learnt, as "
                '{"type": "text", "text": "..."}'
            )
    return "".join(part["text"] for part in content)


def check_text(value: object, where: str) -> str:
    """A text that a model can read.

    Args:
        value: what JSON holds.
        where: its place in the entry, for the error.

    Raises:
        ConfigError: no string, a blank one, or one that UTF-8 cannot write.
    """
    if not isinstance(value, str):
        raise ConfigError(f"{where} = {shown(value)}; it must be a string")
    if not value.strip():
        raise ConfigError(f"{where} is blank; it must hold text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair; no tokenizer reads it
        raise ConfigError(f"{where} is no Unicode text ({error.reason}, character {error.start + 1})") from error
    return value


def _check_order(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        number = roles.index("system", 1) + 1
        raise ConfigError(f"turn {number} is the system's; only the first turn may be")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    offset = len(roles) - len(turns)
    for index, role in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if role != expected:
            before = f"behind another of the {role}" if index else "at the beginning"
            raise ConfigError(
                f"turn {offset + index + 1} is the {role}'s, {before}; user and assistant must take turns, user first"
            )
    if "assistant" not in turns:
        raise ConfigError("has no turn of the assistant; there is nothing to learn from it")


def shown(value: object) -> str:
    """A value in a message, cut short where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def keys_of(value: dict[Any, Any]) -> str:
    """What an entry has, in a message."""
    return f"the keys {', '.join(str(key) for key in value)}" if value else "no keys"

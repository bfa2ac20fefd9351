"""Prompts out of the forms that are in use: what users say, without the answers.

    {"question_id": 81, "category": "writing", "turns": ["...", "..."]}                      MT-Bench
    {"prompt_id": 81, "category": "writing", "prompt": ["...", "..."]}                       the same on the hub
    {"conversation_id": ..., "conversations": [{"role": "user", "content": "..."}, ...]}     chat, see `conversations`
    What is the capital of France?                                                           a line of a ``.txt`` file

Of a chat the user's turns are taken, and the system message; answers in it are left out. ``conversation_id``,
``question_id``, ``prompt_id`` or ``id`` names a prompt; one without a name is called after its text, so that the name
does not depend on its place in the file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mcore_spec.data.conversations import check_text, keys_of, read_messages, shown
from mcore_spec.data.sources import FORMATS, TEXT_FORMATS, open_source
from mcore_spec.errors import ConfigError

PROMPT_FORMATS = (*FORMATS, *TEXT_FORMATS)
_ID_KEYS = ("conversation_id", "question_id", "prompt_id", "id")
_CHAT_KEYS = ("conversations", "messages")
_DIGEST_CHARACTERS = 16


class Prompt(NamedTuple):
    """What is asked, turn by turn.

    Attributes:
        conversation_id: its name, of which a file holds no two.
        category: the kind of question, where the file says it.
        turns: of the user, at least one; each is asked behind the answer to the one before.
        system: the system message, where there is one.
        where: its place, as a message names it.
    """

    conversation_id: str
    category: str | None
    turns: tuple[str, ...]
    system: str | None = None
    where: str = ""


def read_prompts(path: str | Path, *, field: str = "prompts_path") -> Iterator[Prompt]:
    """The prompts of a file or of a Hugging Face dataset, in order.

    Args:
        path: a file in one of `PROMPT_FORMATS`, or ``organisation/name`` with an optional ``:split``.
        field: what messages call it.

    Raises:
        ConfigError: it is not there, cannot be read or is empty; an entry that holds no prompt, or whose name stands
            before already. Names file and line.
    """
    source = open_source(path, field=field, formats=PROMPT_FORMATS)
    named: dict[str, str] = {}
    unnamed: Counter[str] = Counter()
    for record in source.records():
        where = source.where(record.line)
        if record.problem is not None:
            raise ConfigError(f"{where}: {record.problem}; correct it")
        try:
            prompt, name = parse_prompt(record.value), read_name(record.value)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}; correct it") from error
        if name is None:
            # The same text a second time is a second prompt, as it would be with a name.
            unnamed[prompt.conversation_id] += 1
            if (times := unnamed[prompt.conversation_id]) > 1:
                name = f"{prompt.conversation_id}-{times}"
        name = name or prompt.conversation_id
        if name in named:
            raise ConfigError(f"{where}: its name {name} stands at {named[name]} already; give each prompt its own")
        named[name] = where
        yield prompt._replace(conversation_id=name, where=where)
    if not named:
        raise ConfigError(f"{field} = {path} is empty; give one with prompts")


def parse_prompt(value: object) -> Prompt:
    """The prompt in one entry.

    Args:
        value: what JSON holds, or the text itself.

    Raises:
        ConfigError: what is wrong with it; its place is for the caller to name.
    """
    if isinstance(value, str):
        return make_prompt({}, turns=(check_text(value, "the text"),), system=None)
    if not isinstance(value, dict):
        raise ConfigError(f"holds {shown(value)}; it must hold an object with a prompt, or a text")
    chat_keys = [key for key in _CHAT_KEYS if value.get(key) is not None]
    if value.get("turns") is not None:
        if chat_keys:
            raise ConfigError(f"has both turns and {chat_keys[0]}; keep one")
        return make_prompt(value, turns=_read_turns(value["turns"], "turns"), system=_read_system(value))
    if chat_keys:  # UltraChat's entries have their first turn once more under prompt
        return _read_chat(value)
    if value.get("prompt") is not None:
        return make_prompt(value, turns=_read_turns(value["prompt"], "prompt"), system=_read_system(value))
    raise ConfigError(f"has {keys_of(value)}; it must have turns, conversations, messages or prompt")


def read_name(value: object) -> str | None:
    """The name that an entry gives to its prompt; ``None`` where it gives none.

    Raises:
        ConfigError: a name that is neither text nor a whole number.
    """
    if not isinstance(value, dict):
        return None
    for key in _ID_KEYS:
        name = value.get(key)
        if name is None or name == "":
            continue
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise ConfigError(f"{key} = {shown(name)}; it must be a text or a whole number")
        return check_text(str(name), key)
    return None


def _read_turns(turns: object, key: str) -> tuple[str, ...]:
    if isinstance(turns, str):
        return (check_text(turns, key),)
    if not isinstance(turns, list) or not turns:
        raise ConfigError(f"{key} = {shown(turns)}; it must be a list of at least one text")
    return tuple(check_text(turn, f"{key}[{index}]") for index, turn in enumerate(turns))


def _read_system(value: dict[str, Any]) -> str | None:
    system = value.get("system")
    return system if isinstance(system, str) and system.strip() else None


def _read_chat(value: dict[str, Any]) -> Prompt:
    messages = read_messages(value)
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
    roles = [message["role"] for message in messages]
    if "system" in roles:
        raise ConfigError("has a system message behind another turn; only the first turn may be the system's")
    if roles[:1] != ["user"]:
        raise ConfigError(f"{'begins with the assistant' if roles else 'has no turn'}; a prompt begins with the user's")
    turns = tuple(message["content"] for message in messages if message["role"] == "user")
    return make_prompt(value, turns=turns, system=system)


def make_prompt(value: dict[str, Any], *, turns: tuple[str, ...], system: str | None) -> Prompt:
    """A prompt with the category of its entry, called after its text.

    Raises:
        ConfigError: the category is no text.
    """
    category = value.get("category")
    if category is not None and not isinstance(category, str):
        raise ConfigError(f"category = {shown(category)}; it must be a text")
    digest = hashlib.sha256(json.dumps([system, turns]).encode()).hexdigest()[:_DIGEST_CHARACTERS]
    return Prompt(digest, category or None, turns, system)

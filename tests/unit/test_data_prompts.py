"""Every form of prompts, their names, and what is said about entries that hold none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mcore_spec.data.prompts import Prompt, read_prompts
from mcore_spec.errors import ConfigError
from tests.unit.data_cases import talk, write_lines

ENTRIES: list[Any] = [
    {"question_id": 81, "category": "writing", "turns": ["a", "b\u2028ü"]},
    {"prompt_id": "p", "prompt": ["c", "d"], "reference": [], "category": ""},
    {"prompt_id": "q", "prompt": "e", "messages": talk("e", "x", "f", "y")},
    {"conversation_id": "r", "id": 7, "conversations": talk("g", "x", system="s"), "category": "k"},
    {"id": 7, "conversations": [{"from": "Human", "value": "h"}, {"from": "gpt", "value": "x"}], "system": "t"},
    {"id": "v", "messages": [{"role": "user", "content": "i"}, {"role": "user", "content": "j"}]},
]
PROMPTS = [
    Prompt("81", "writing", ("a", "b\u2028ü")),
    Prompt("p", None, ("c", "d")),
    Prompt("q", None, ("e", "f")),
    Prompt("r", "k", ("g",), "s"),
    Prompt("7", None, ("h",), "t"),
    Prompt("v", None, ("i", "j")),
]


def read(path: Path) -> list[Prompt]:
    return [prompt._replace(where="") for prompt in read_prompts(path)]


def refusal(path: Path | str, **options: str) -> str:
    with pytest.raises(ConfigError) as caught:
        list(read_prompts(path, **options))
    return str(caught.value)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz"])
def test_every_form(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    lines = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in ENTRIES).encode()
    content = json.dumps(ENTRIES).encode() if name.endswith(".json") else lines
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read(path) == PROMPTS
    assert [prompt.where for prompt in read_prompts(path)][1] == (
        f"{path}, entry 2" if name == "x.json" else f"{path}:2"
    )


@pytest.mark.parametrize("name", ["x.txt", "x.TXT", "x.txt.gz"])
def test_a_text_a_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    content = "\ufeff Who?\r\n\n  Wann\u2028jetzt? \n".encode()
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert [prompt.turns for prompt in read(path)] == [("Who?",), ("Wann\u2028jetzt?",)]
    assert [prompt.where for prompt in read_prompts(path)] == [f"{path}:1", f"{path}:3"]


def test_a_prompt_without_a_name_is_called_after_its_text_wherever_it_stands(tmp_path: Path) -> None:
    entries = [{"turns": ["a"]}, {"turns": ["a", "b"]}, {"turns": ["a"], "system": "s"}, {"turns": ["c"]}]
    names = {
        prompt.turns + (prompt.system,): prompt.conversation_id
        for prompt in read(write_lines(tmp_path / "a.jsonl", entries))
    }
    again = {
        prompt.turns + (prompt.system,): prompt.conversation_id
        for prompt in read(write_lines(tmp_path / "b.jsonl", entries[::-1]))
    }
    assert names == again and len(set(names.values())) == 4
    # Twice the same text is two prompts.
    twice = [prompt.conversation_id for prompt in read(write_lines(tmp_path / "c.jsonl", [entries[0]] * 3))]
    first = names["a", None]
    assert twice == [first, f"{first}-2", f"{first}-3"]


BAD = {
    "number": (3, "holds 3; it must hold an object with a prompt, or a text"),
    "nothing": ({"text": "a"}, "has the keys text; it must have turns, conversations, messages or prompt"),
    "no keys": ({}, "has no keys; it must have turns, conversations, messages or prompt"),
    "no turns": ({"turns": []}, "turns = []; it must be a list of at least one text"),
    "turns": ({"turns": {"a": 1}}, "turns = {'a': 1}; it must be a list of at least one text"),
    "turn": ({"turns": ["a", 3]}, "turns[1] = 3; it must be a string"),
    "blank": ({"turns": ["a", " "]}, "turns[1] is blank; it must hold text"),
    "half a pair": ({"prompt": "\ud83d"}, "prompt is no Unicode text (surrogates not allowed, character 1)"),
    "both": ({"turns": ["a"], "messages": talk("a")}, "has both turns and messages; keep one"),
    "two chats": (
        {"conversations": talk("a"), "messages": talk("a")},
        "must have either conversations or messages; it has both",
    ),
    "role": (
        {"messages": [{"role": "tool", "content": "a"}]},
        "messages[0] has the unknown role 'tool'; known roles: system, user, assistant",
    ),
    "assistant first": (
        {"messages": talk("a", "b")[1:]},
        "begins with the assistant; a prompt begins with the user's",
    ),
    "system alone": ({"messages": talk(system="s")}, "has no turn; a prompt begins with the user's"),
    "system late": (
        {"messages": [*talk("a", "b"), *talk(system="s")]},
        "has a system message behind another turn; only the first turn may be the system's",
    ),
    "name": ({"question_id": 1.5, "turns": ["a"]}, "question_id = 1.5; it must be a text or a whole number"),
    "blank name": ({"id": " ", "turns": ["a"]}, "id is blank; it must hold text"),
    "category": ({"category": ["a"], "turns": ["a"]}, "category = ['a']; it must be a text"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_entry_without_a_prompt(case: str, tmp_path: Path) -> None:
    entry, said = BAD[case]
    path = write_lines(tmp_path / "x.jsonl", [ENTRIES[0], entry])
    assert refusal(path) == f"{path}:2: {said}; correct it"


def test_lines_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"turns": ["a"]}\n{"turns": [')
    assert refusal(path) == f"{path}:2: not JSON (Expecting value at column 12); correct it"
    path.write_bytes(b'{"turns": ["\xff"]}\n')
    assert refusal(path) == f"{path}:1: not UTF-8 (invalid start byte at byte 13); correct it"
    path.write_text("\n \n")
    assert refusal(path) == f"prompts_path = {path} is empty; give one with prompts"
    text = tmp_path / "x.txt"
    text.write_bytes(b"a\n\xff\n")
    assert refusal(text) == f"{text}:2: not UTF-8 (invalid start byte at byte 1); correct it"
    missing = tmp_path / "y.jsonl"
    assert refusal(missing, field="input") == (
        f"input = {missing}: no such file; correct the path, or name a Hugging Face dataset as organisation/name"
    )
    other = tmp_path / "x.csv"
    other.write_text("a")
    assert refusal(other) == (
        f"prompts_path = {other} is in none of the formats .jsonl, .json, .parquet, .jsonl.gz, .json.gz, .txt, "
        ".txt.gz; convert it to one"
    )


def test_a_name_that_stands_twice(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"id": 1, "turns": ["a"]}, {"id": "1", "turns": ["b"]}])
    assert refusal(path) == f"{path}:2: its name 1 stands at {path}:1 already; give each prompt its own"

"""Sources and forms of conversations, and what is said about each kind of bad input."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mcore_spec.data.conversations import Conversation, ConversationReader, parse_messages
from mcore_spec.data.sources import open_source
from mcore_spec.errors import ConfigError
from tests.unit.data_cases import talk, write_lines

RECORDS = [
    {"conversation_id": 7, "category": "x", "conversations": talk("a", "b")},
    {"messages": talk("c", "d", "e", "f", system="s")},
    {"conversations": [{"from": "human", "value": "g"}, {"from": "gpt", "value": "h", "weight": 1}]},
    {"conversations": [{"from": "User", "value": "i"}, {"from": "Assistant", "value": "ü\u2028j"}], "system": "t"},
    {
        "conversations": [
            {"from": "system", "value": "u"},
            {"from": "human", "value": "k"},
            {"from": "gpt", "value": "l"},
        ]
    },
    {"messages": talk("m", "n", "o"), "conversations": None, "system": ""},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "p"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": " r"}]},
        ]
    },
]
MESSAGES = [
    talk("a", "b"),
    talk("c", "d", "e", "f", system="s"),
    talk("g", "h"),
    talk("i", "ü\u2028j", system="t"),
    talk("k", "l", system="u"),
    talk("m", "n", "o"),
    talk("p", "q r"),
]


def read(*sources: Path | str, on_bad_line: Any = "error") -> list[Conversation]:
    return list(ConversationReader(sources, on_bad_line=on_bad_line))


def refusal(*sources: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*sources)
    return str(caught.value)


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL", "x.jsonl.gz", "x.json", "x.json.gz"])
def test_every_form_in_every_file(name: str, tmp_path: Path) -> None:
    text = json.dumps(RECORDS) if ".json" in name and "jsonl" not in name.lower() else ""
    text = text or "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    found = read(path)
    assert [each.messages for each in found] == MESSAGES
    assert [each.line for each in found] == [1, 2, 3, 4, 5, 6, 7]
    assert {each.source for each in found} == {str(path)}
    assert found[2].where == (f"{path}:3" if "jsonl" in name.lower() else f"{path}, entry 3")


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    rows = [{"messages": talk("a", "b", system="s"), "n": 1}, {"messages": talk("c", "d"), "n": 2}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read(path)
    assert [each.messages for each in found] == [talk("a", "b", system="s"), talk("c", "d")]
    assert found[1].where == f"{path}, entry 2"
    path.write_bytes(path.read_bytes()[:-9])
    assert refusal(path).startswith(f"data_path = {path} cannot be read (")


@pytest.mark.parametrize("name", ["x.parquet", "organisation/name"])
def test_a_package_that_is_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = "pyarrow" if name.endswith("parquet") else "datasets"
    for module in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    Path("x.parquet").write_bytes(b"x")
    assert refusal(name) == (
        f"data_path = {name} needs the package {package}: pip install {package}, or convert the data to .jsonl"
    )


class RowsOfADataset(list[dict[str, Any]]):
    """The part of `datasets.Dataset` that is used."""

    cache_files: list[dict[str, str]]


def test_a_dataset_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    cached = tmp_path / "cached.arrow"
    cached.write_bytes(b"contents")

    def load_dataset(name: str, *, split: str) -> RowsOfADataset:
        asked.append((name, split))
        if split == "nowhere":
            raise ValueError('Unknown split "nowhere".')
        rows = RowsOfADataset([{"messages": talk("a", "b")}, {"messages": talk("c", split)}])
        rows.cache_files = [{"filename": str(cached)}]
        return rows

    module = ModuleType("datasets")
    module.__dict__["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    found = read("org-1/some.name", "org-1/some.name:train_sft[:10%]")
    assert [each.messages for each in found[1:]] == [talk("c", "train"), talk("a", "b"), talk("c", "train_sft[:10%]")]
    assert found[1].where == "org-1/some.name, entry 2"
    assert asked == [("org-1/some.name", "train"), ("org-1/some.name", "train_sft[:10%]")]
    before = open_source("org-1/some.name").digest()
    assert open_source("org-1/some.name:valid").digest() != before
    cached.write_bytes(b"other contents")
    assert open_source("org-1/some.name").digest() != before
    assert refusal("org-1/some.name:nowhere") == (
        "data_path = org-1/some.name:nowhere is no file, and the dataset org-1/some.name (split nowhere) cannot be "
        'loaded (Unknown split "nowhere".); correct the path, check the network, or give the split as '
        "org-1/some.name:SPLIT"
    )


def test_datasets_that_are_held_in_memory_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_DATASETS_IN_MEMORY_MAX_SIZE has it: there are no files."""
    contents = {"a/one": "x", "a/same": "x", "a/other": "y"}

    def load_dataset(name: str, *, split: str) -> RowsOfADataset:
        rows = RowsOfADataset([{"messages": talk("a", contents[name])}])
        rows.cache_files = []
        return rows

    module = ModuleType("datasets")
    module.__dict__["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    one, same, other = (open_source(name).digest() for name in contents)
    assert one == same != other


def test_sources_that_are_none(tmp_path: Path) -> None:
    for name in (tmp_path / "x.jsonl", "data/x.jsonl", "data/x.parquet", "nothing", "a/b/c", "./a", "~/a"):
        assert refusal(name) == (
            f"data_path = {name}: no such file; correct the path, or name a Hugging Face dataset as organisation/name"
        )
    assert refusal(tmp_path) == f"data_path = {tmp_path} is a directory; name the files in it"
    assert refusal() == "data_path is empty; name at least one file or dataset"
    path = tmp_path / "x.csv"
    path.write_text("a,b")
    assert refusal(path) == (
        f"data_path = {path} is in none of the formats .jsonl, .json, .parquet, .jsonl.gz, .json.gz; convert it to one"
    )


@pytest.mark.parametrize(("name", "text"), [("x.jsonl", ""), ("x.jsonl", "\n \n"), ("x.json", ""), ("x.json", "[]")])
def test_an_empty_file(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    expected = f"data_path = {path} is empty; leave it out, or give one with conversations"
    assert refusal(path) == expected
    with pytest.raises(ConfigError, match="is empty"):
        read(path, on_bad_line="skip")


def test_a_file_that_is_damaged(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(RECORDS[0]).encode() * 1000)
    for name, content in (
        ("cut.jsonl.gz", whole[:-20]),
        ("cut.json.gz", whole[:-20]),
        ("no.jsonl.gz", b"plain text"),
        ("broken.jsonl.gz", whole[:20] + b"\xff" * 30 + whole[50:]),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert refusal(path).startswith(f"data_path = {path} cannot be read ("), name
    path = tmp_path / "x.json"
    path.write_text('[{"a": 1},\n{"a": }]')
    assert refusal(path) == (
        f"{path}:2: not JSON (Expecting value); correct the file, or name it .jsonl if it has one object a line"
    )
    path.write_text('{"messages": []}')
    assert refusal(path) == f"{path} holds an object; a .json file must hold a list of conversations"
    path.write_bytes(b'["\xff"]')
    assert refusal(path) == f"{path} is not UTF-8 (invalid start byte); save it as UTF-8"


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    good = json.dumps(RECORDS[0]).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n" + good + b'\n{"messages": \n')
    remedy = "correct it, or leave such lines out with on_bad_line = skip"
    assert refusal(path) == f"{path}:4: not JSON (Expecting value at column 14); {remedy}"
    path.write_bytes(good + b"\n\xff\n")
    assert refusal(path) == f"{path}:2: not UTF-8 (invalid start byte at byte 1); {remedy}"


USER, ASSISTANT = talk("a", "b")
SYSTEM = {"role": "system", "content": "s"}
# what is wrong -> (the entry, what is said)
BAD_ENTRIES: dict[str, tuple[Any, str]] = {
    "no object": ([1], "holds [1]; it must hold an object"),
    "no keys": ({}, "must have either conversations or messages; it has neither, but no keys"),
    "other keys": (
        {"prompt": "a", "answer": "b"},
        "must have either conversations or messages; it has neither, but the keys prompt, answer",
    ),
    "two lists": (
        {"conversations": [USER, ASSISTANT], "messages": [USER, ASSISTANT]},
        "must have either conversations or messages; it has both",
    ),
    "no list": ({"messages": "a"}, "messages = 'a'; it must be a list of messages"),
    "no message": ({"messages": [USER, "b"]}, "messages[1] = 'b'; a message must be an object"),
    "keys of a message": (
        {"conversations": [{"role": "user", "text": "a"}]},
        "conversations[0] has the keys role, text; a message must have role and content, or from and value",
    ),
    "role": (
        {"messages": [USER, {"role": "tool", "content": "b"}]},
        "messages[1] has the unknown role 'tool'; known roles: system, user, assistant",
    ),
    "role in other letters": (
        {"messages": [{"role": "User", "content": "b"}]},
        "messages[0] has the unknown role 'User'; known roles: system, user, assistant",
    ),
    "ShareGPT's role": (
        {"conversations": [{"from": "bot", "value": "b"}]},
        "conversations[0] has the unknown role 'bot'; known roles: human, gpt, system, user, assistant",
    ),
    "role is no string": (
        {"conversations": [{"from": None, "value": "b"}]},
        "conversations[0] has the unknown role None; known roles: human, gpt, system, user, assistant",
    ),
    "content": (
        {"messages": [USER, {"role": "assistant", "content": {"type": "text", "text": "b" * 60}}]},
        f"messages[1].content = {{'type': 'text', 'text': '{'b' * 34}...; it must be a string",
    ),
    "a part that is no text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "image_url"}]}]},
        "messages[0].content[1] = {'type': 'image_url'}; of parts only text can be learnt, as "
        '{"type": "text", "text": "..."}',
    ),
    "no parts": (
        {"messages": [USER, {"role": "assistant", "content": []}]},
        "messages[1].content is blank; it must hold text",
    ),
    "no content": (
        {"messages": [USER, {"role": "assistant", "content": None}]},
        "messages[1].content = None; it must be a string",
    ),
    "blank content": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " \n"}]},
        "conversations[1].value is blank; it must hold text",
    ),
    "half a character": (
        {"messages": [USER, {"role": "assistant", "content": "ab\ud83d"}]},
        "messages[1].content is no Unicode text (surrogates not allowed, character 3)",
    ),
    "two of the user": (
        {"messages": [SYSTEM, USER, USER, ASSISTANT]},
        "turn 3 is the user's, behind another of the user; user and assistant must take turns, user first",
    ),
    "two of the assistant": (
        {"messages": [USER, ASSISTANT, ASSISTANT]},
        "turn 3 is the assistant's, behind another of the assistant; user and assistant must take turns, user first",
    ),
    "assistant first": (
        {"messages": [ASSISTANT, USER]},
        "turn 1 is the assistant's, at the beginning; user and assistant must take turns, user first",
    ),
    "assistant behind the system": (
        {"messages": [SYSTEM, ASSISTANT]},
        "turn 2 is the assistant's, at the beginning; user and assistant must take turns, user first",
    ),
    "system later": ({"messages": [USER, SYSTEM, ASSISTANT]}, "turn 2 is the system's; only the first turn may be"),
    "two systems": (
        {"messages": [SYSTEM, USER, ASSISTANT], "system": "t"},
        "turn 2 is the system's; only the first turn may be",
    ),
    "nothing to learn": (
        {"messages": [SYSTEM, USER]},
        "has no turn of the assistant; there is nothing to learn from it",
    ),
    "no turns": ({"messages": []}, "has no turn of the assistant; there is nothing to learn from it"),
}


@pytest.mark.parametrize("what", BAD_ENTRIES)
def test_a_bad_entry_is_named(what: str, tmp_path: Path) -> None:
    entry, said = BAD_ENTRIES[what]
    with pytest.raises(ConfigError) as caught:
        parse_messages(entry)
    assert str(caught.value) == said
    path = write_lines(tmp_path / "x.jsonl", [RECORDS[0], entry, RECORDS[1]])
    assert refusal(path) == f"{path}:2: {said}; correct it, or leave such lines out with on_bad_line = skip"


def test_bad_entries_are_skipped_and_counted(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", [RECORDS[0], *(entry for entry, _ in BAD_ENTRIES.values())])
    with first.open("a") as file:
        file.write("{\n")
    second = tmp_path / "b.json"
    second.write_text(json.dumps([{}, RECORDS[1]]))
    reader = ConversationReader([first, second], on_bad_line="skip")
    for _ in range(2):  # counts start anew with each reading
        assert [each.messages for each in reader] == MESSAGES[:2]
        counts = SimpleNamespace(read=reader.num_read, skipped=reader.num_skipped)
        assert counts == SimpleNamespace(read=2, skipped=len(BAD_ENTRIES) + 2)
        assert reader.reasons == [
            f"{first}:{number}: {said}" for number, (_, said) in enumerate(list(BAD_ENTRIES.values())[:5], start=2)
        ]


def test_the_digest_is_of_the_contents(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", RECORDS[:2])
    second = write_lines(tmp_path / "b.jsonl", RECORDS[:2])
    assert open_source(first).digest() == open_source(second).digest()
    write_lines(second, RECORDS[:1])
    assert open_source(first).digest() != open_source(second).digest()
    # The same bytes are another thing as one list.
    first.with_suffix(".json").write_bytes(first.read_bytes())
    assert open_source(first).digest() != open_source(first.with_suffix(".json")).digest()


@pytest.mark.parametrize(
    ("name", "ids", "each"), [("prompts", range(1, 65), 8), ("prompts_held_out", range(65, 73), 1)]
)
def test_the_prompts_of_the_examples(name: str, ids: range, each: int) -> None:
    path = Path(__file__).resolve().parents[2] / "examples" / "data" / f"{name}.jsonl"
    prompts = [record.value for record in open_source(path).records()]
    assert [prompt["question_id"] for prompt in prompts] == list(ids)
    assert Counter(prompt["category"] for prompt in prompts) == dict.fromkeys(PROMPT_CATEGORIES, each)
    assert all(1 <= len(prompt["turns"]) <= 2 and all(prompt["turns"]) for prompt in prompts)


PROMPT_CATEGORIES = ("writing", "reasoning", "math", "coding", "extraction", "stem", "humanities", "roleplay")

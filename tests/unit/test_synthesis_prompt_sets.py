"""Small made-up samples of each well-known set, in its own form."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mcore_spec.data.prompts import Prompt, read_prompts
from mcore_spec.errors import ConfigError
from mcore_spec.synthesis.prompt_sets import PROMPT_SETS, PromptSetReader, as_messages
from tests.unit.data_cases import talk, write_lines


def says(speaker: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value, **more}


DARING_ANTEATER = [
    {
        "system": "",
        "mask": "User",
        "dataset": "roleplay",
        "conversations": [
            says("User", "a", label=None),
            says("Assistant", "x", label="l"),
            says("User", "b", label=None),
        ],
    },
    {
        "system": "s",
        "mask": "User",
        "dataset": "lore",
        "conversations": [says("User", "c"), says("Assistant", "x")],
    },
    {"system": "", "mask": "User", "dataset": "math", "conversations": [says("User", " "), says("Assistant", "x")]},
]
SHAREGPT = [
    {"id": "QWJhYvA_0", "conversations": [says("human", "a"), says("gpt", "x"), says("human", "b"), says("gpt", "")]},
    {"id": "QWJhYvA_17", "conversations": [says("gpt", "x"), says("human", "ü"), says("gpt", "y")]},
    {"id": "i6IyJda_0", "conversations": [says("system", "metadata"), says("user", "c"), says("chatgpt", "x")]},
    {"id": "empty_0", "conversations": []},
    {"id": "bing_0", "conversations": [says("human", "d"), says("bing", "x")]},
    {"id": "gpt_0", "conversations": [says("gpt", "x")]},
    {"id": "QWJhYvA_0", "conversations": [says("human", "again")]},
]
ULTRACHAT_200K = [
    {"prompt": "a", "prompt_id": "f0e37e9f", "messages": talk("a", "x", "b", "y")},
    {"prompt": "c", "prompt_id": "0b3c", "messages": talk("c", "x")},
]
ULTRACHAT = [{"id": "0", "data": ["a", "x", "b", "y"]}, {"id": "1", "data": ["c", "x"]}, {"id": "2", "data": []}]
MTBENCH = [
    {"question_id": 81, "category": "writing", "turns": ["a", "b"]},
    {"question_id": 101, "category": "math", "turns": ["c"]},
]
MTBENCH_ON_THE_HUB = [
    {"prompt": ["a", "b"], "reference": [], "category": "writing", "prompt_id": 81},
    {"prompt": ["c"], "reference": ["4"], "category": "math", "prompt_id": 101},
]


def read(name: str, path: Path | str, **options: Any) -> tuple[list[Prompt], PromptSetReader]:
    reader = PromptSetReader(name, str(path), **options)
    return [prompt._replace(where="") for prompt in reader], reader


def test_daring_anteater(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", DARING_ANTEATER)
    found, reader = read("daring-anteater", path)
    assert [prompt[1:4] for prompt in found] == [("roleplay", ("a", "b"), None), ("lore", ("c",), "s")]
    assert all(prompt.conversation_id.startswith("daring-anteater-") for prompt in found)
    assert reader.reasons == [f"{path}:3: conversations[0].value is blank; it must hold text"]


def test_sharegpt(tmp_path: Path) -> None:
    path = tmp_path / "ShareGPT_V3_unfiltered_cleaned_split.json"
    path.write_text(json.dumps(SHAREGPT))
    found, reader = read("sharegpt", path)
    assert found == [
        Prompt("sharegpt-QWJhYvA_0", None, ("a", "b")),
        Prompt("sharegpt-QWJhYvA_17", None, ("ü",)),
        Prompt("sharegpt-i6IyJda_0", None, ("c",)),
    ]
    assert reader.num_skipped == 4
    assert reader.reasons == [
        f"{path}, entry 4: conversations = []; it must be a list of messages",
        f"{path}, entry 5: conversations[1] is by 'bing'; known are human and gpt",
        f"{path}, entry 6: has no turn of the human",
        f"{path}, entry 7: sharegpt-QWJhYvA_0 stands in the set already",
    ]
    with pytest.raises(ConfigError, match="entry 4: conversations = .*out with on_bad_line = skip"):
        read("sharegpt", path, on_bad_line="error")


def test_ultrachat_in_both_forms(tmp_path: Path) -> None:
    found, _ = read("ultrachat", write_lines(tmp_path / "a.jsonl", ULTRACHAT_200K))
    assert found == [Prompt("ultrachat-f0e37e9f", None, ("a", "b")), Prompt("ultrachat-0b3c", None, ("c",))]
    found, reader = read("ultrachat", write_lines(tmp_path / "b.jsonl", ULTRACHAT))
    assert found == [Prompt("ultrachat-0", None, ("a", "b")), Prompt("ultrachat-1", None, ("c",))]
    assert reader.reasons == [f"{tmp_path / 'b.jsonl'}:3: data = []; it must be a list of texts"]


@pytest.mark.parametrize("entries", [MTBENCH, MTBENCH_ON_THE_HUB])
def test_mtbench_in_both_forms(entries: list[Any], tmp_path: Path) -> None:
    found, _ = read("mtbench", write_lines(tmp_path / "question.jsonl", entries))
    assert found == [Prompt("mtbench-81", "writing", ("a", "b")), Prompt("mtbench-101", "math", ("c",))]


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("Who?\nWhy?\n")
    found, _ = read("own", path)
    assert found == [prompt._replace(where="") for prompt in read_prompts(path)]
    with pytest.raises(ConfigError, match="x.jsonl:2: has the keys text"):
        read("own", write_lines(tmp_path / "x.jsonl", [{"turns": ["a"]}, {"text": "b"}]))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("daring-anteater", ("nvidia/Daring-Anteater", "train")),
        ("ultrachat", ("HuggingFaceH4/ultrachat_200k", "train_sft")),
        ("mtbench", ("HuggingFaceH4/mt_bench_prompts", "train")),
    ],
)
def test_where_a_set_is_published(name: str, source: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(repository: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((repository, split))
        return [{"prompt": ["a"], "messages": None, "prompt_id": 1}]

    module = ModuleType("datasets")
    module.__dict__["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert [prompt.turns for prompt in PromptSetReader(name, None)] == [("a",)]
    assert asked == [source]


def test_a_set_that_has_to_be_given() -> None:
    for name in ("sharegpt", "own"):
        with pytest.raises(ConfigError, match=f"input is required: {name} is read from a file"):
            PromptSetReader(name, None)


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_a_file_of_another_form(name: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"text": "a"}, 3])
    with pytest.raises(ConfigError) as caught:
        read(name, path, on_bad_line="skip")
    assert str(caught.value).startswith(
        f"input = {path} holds no prompt of the form {name} (2 entries left out, the first: {path}:1: "
    )


def test_the_common_form_is_read_back(tmp_path: Path) -> None:
    prompt = Prompt("x", "k", ("a", "b"), "s")
    path = write_lines(
        tmp_path / "x.jsonl", [{"conversation_id": "x", "category": "k", "conversations": as_messages(prompt)}]
    )
    assert list(read_prompts(path)) == [prompt._replace(where=f"{path}:1")]

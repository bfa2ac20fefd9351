"""What stands in the files of a run, whatever happened to the process that wrote them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mcore_spec.data.json_lines import GrowingFile
from mcore_spec.data.prompts import Prompt
from mcore_spec.errors import ConfigError
from mcore_spec.synthesis.output import ConversationFile
from tests.unit.data_cases import talk

LINES = [{"n": 1, "text": "ü\u2028\ud7ff"}, {"n": 2, "text": "漢字 🙂"}, {"n": 3}]
PROMPTS = [Prompt(name, "k" if name == "a" else None, (f"{name}?", "more?"), where=f"p:{name}") for name in "abc"]
SETTINGS = {"model": "m", "temperature": 0.0}


def read(path: Path) -> list[dict[str, Any]]:
    file = GrowingFile(path, field="output")
    try:
        return [line.value for line in file.read()]
    finally:
        file.close()


def write(path: Path, values: list[dict[str, Any]]) -> None:
    file = GrowingFile(path, field="output")
    for value in values:
        file.append(value)
    file.close()


def test_a_file_that_was_cut_anywhere_is_mended(tmp_path: Path) -> None:
    """Every length that a killed process may leave behind; then the file goes on."""
    path = tmp_path / "deep" / "x.jsonl"
    write(path, LINES)
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        # A line that lacks its break alone is whole.
        num_whole = sum(end - 1 <= length for end in ends) if length else 0
        assert read(path) == LINES[:num_whole], length
        write(path, LINES[num_whole:])
        assert path.read_bytes() == whole, length


def test_a_damaged_line_in_the_middle_is_not_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for content, said in (
        (b'{"n": 1}\n{"n"\n{"n": 3}\n', "not JSON (Expecting ':' delimiter"),
        (b'{"n": 1}\n[1]\n', "holds [1]"),
        (b'{"n": 1}\n"\xff"\n', "not JSON ('utf-8' codec"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}:2: {said}")
        assert str(caught.value).endswith("; correct or delete the line")
        assert path.read_bytes() == content


def test_two_processes_do_not_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    first = GrowingFile(path, field="output")
    with pytest.raises(ConfigError, match=f"output = {path}: another process is writing to it"):
        GrowingFile(path, field="output")
    first.close()
    GrowingFile(path, field="output").close()
    with pytest.raises(ConfigError, match=f"output = {tmp_path} is a directory; name a file"):
        GrowingFile(tmp_path, field="output")


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    write(path, LINES[:1])
    whole, file, real_write = path.read_bytes(), GrowingFile(path, field="output"), os.write

    def fill(descriptor: int, data: memoryview) -> int:
        if len(data) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(descriptor, data[:5])

    monkeypatch.setattr(os, "write", fill)
    with pytest.raises(OSError, match="No space"):
        file.append(LINES[1])
    assert path.read_bytes() == whole
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:3]))
    file.append(LINES[1])
    file.close()
    assert read(path) == LINES[:2]


def conversations(path: Path, **options: Any) -> ConversationFile:
    return ConversationFile(path, PROMPTS, **{"settings": SETTINGS, **options})


def names(prompts: list[Prompt]) -> list[str]:
    return [prompt.conversation_id for prompt in prompts]


def test_what_is_written_or_left_out_is_not_missing_any_more(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with conversations(path) as file:
        assert names(file.missing) == ["a", "b", "c"]
        file.write(PROMPTS[0], talk("a?", "ü", system="s"))
        file.leave_out(PROMPTS[2], "truncated (length)")
        assert (names(file.missing), file.num_written, file.num_left_out) == (["b"], 1, 1)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"conversation_id": "a", "category": "k", "conversations": talk("a?", "ü", system="s")}
    ]
    with conversations(path) as file:
        assert (names(file.missing), file.num_written, file.num_left_out) == (["b"], 1, 1)
    # Of prompts that are not asked any more nothing is counted.
    with ConversationFile(path, PROMPTS[1:], settings=SETTINGS) as file:
        assert (names(file.missing), file.num_written, file.num_left_out) == (["b"], 0, 1)
    path.unlink()
    with conversations(path, settings={**SETTINGS, "model": "n"}) as file:
        assert (names(file.missing), file.num_left_out) == (["a", "b", "c"], 0)


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    with conversations(tmp_path / "x.jsonl"):
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []
    with conversations(tmp_path / "x.jsonl") as file:
        file.leave_out(PROMPTS[0], "empty answer (stop)")
    assert len(list(tmp_path.iterdir())) == 2
    with conversations(tmp_path / "x.jsonl") as file:
        assert names(file.missing) == ["b", "c"]


def test_one_file_has_one_setting(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with conversations(path) as file:
        file.write(PROMPTS[0], talk("a?", "b"))
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    with pytest.raises(ConfigError) as caught:
        conversations(path, settings={**SETTINGS, "model": "n"})
    assert str(caught.value) == (
        f"output = {path} was made with model = 'm', this run has 'n'; give the same, or choose another output"
    )
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before
    # Nothing to protect in a run that was killed before its first answer.
    path.write_text("")
    with conversations(path, settings={**SETTINGS, "model": "n"}) as file:
        file.write(PROMPTS[0], talk("a?", "b"))
    with conversations(path, settings={**SETTINGS, "model": "n"}) as file:
        assert file.num_written == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"conversations": talk("a?", "b")}, " has no conversation_id"),
        (
            {"conversation_id": "a", "conversations": talk("z?", "b")},
            " answers another prompt than the one called a at p:a",
        ),
        ({"conversation_id": "a", "conversations": []}, ": has no turn; a prompt begins with the user's; correct or"),
        ({"conversation_id": "a", "text": "b"}, ": has the keys conversation_id, text; it must have turns"),
    ],
)
def test_a_file_of_something_else(line: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write(path, [line])
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        conversations(path)
    assert str(caught.value).startswith(f"{path}:1{said}")
    assert path.read_bytes() == before
    # And the file can be opened again.
    assert read(path) == [line]

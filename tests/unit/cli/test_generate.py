"""An answer on the terminal while it grows."""

from __future__ import annotations

import pytest

from mcore_spec.cli.generate import TextStream
from mcore_spec.cli.terminal import has_colour
from mcore_spec.data.conversations import Message
from mcore_spec.evaluation.decoding import Answer

BYTES = {0: b"Hel", 1: b"lo", 2: b" w\xc3", 3: b"\xb6rld", 4: b"!", 9: b""}


class Bytes:
    """A tokenizer of bytes, whose characters may be cut in two."""

    end_ids: tuple[int, ...] = (9,)

    def encode(self, messages: list[Message]) -> list[int]:
        raise NotImplementedError

    def decode(self, token_ids: list[int]) -> str:
        return b"".join(BYTES[each] for each in token_ids).decode(errors="replace")


def grow(stream: TextStream) -> None:
    """Two passes: a token of the base; then two of the draft, one of the base, and the end."""
    answer = Answer(token_ids=[0], origins=[False])
    stream(0, answer, 1)
    answer.token_ids += [1, 2, 3, 4, 9]
    answer.origins += [True, True, True, False, False]
    stream(0, answer, 5)


def test_text_is_written_once_and_whole_characters_only(capsys: pytest.CaptureFixture[str]) -> None:
    grow(TextStream(Bytes(), is_coloured=False))
    assert capsys.readouterr().out == "Hello w\u00f6rld!"


def test_what_the_draft_contributed_is_green(capsys: pytest.CaptureFixture[str]) -> None:
    grow(TextStream(Bytes(), is_coloured=True))
    assert capsys.readouterr().out == "Hel\x1b[32mlo\x1b[0m\x1b[32m w\u00f6rld\x1b[0m!"


@pytest.mark.parametrize(
    ("is_terminal", "no_colour", "expected"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_colour_is_for_terminals_without_no_color(
    is_terminal: bool, no_colour: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    monkeypatch.setenv("NO_COLOR", no_colour)
    assert has_colour() is expected

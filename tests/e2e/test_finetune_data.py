"""What finetune says about conversations that it cannot learn from, or only in part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import Run, attach_draft, check_refused, tree

pytestmark = pytest.mark.e2e
LONG = ("Count.", "one two three four five six seven eight nine ten " * 20)
ASKED_LONG = ("Say yes. " * 60, "Yes.")
SHORT = ("Name a colour.", "Red.")


@pytest.fixture(scope="module")
def converted(base: Path) -> Path:
    """The base with a draft."""
    return attach_draft(base, base.parent / "converted")


def words(converted: Path, directory: Path, *turns: tuple[str, str], seq_length: int) -> list[object]:
    """A run of one step on conversations of one question and answer each."""
    path = directory / "conversations.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in turns
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    saved = ["--load", converted, "--save", directory / "saved"]
    return [*saved, "--data-path", path, "--seq-length", seq_length, "--split", "1,0,0", "--train-iters", 1]


def test_what_was_cut_and_what_was_left_out_is_counted(run: Run, converted: Path, tmp_path: Path) -> None:
    done = run("finetune", *words(converted, tmp_path, SHORT, LONG, ASKED_LONG, SHORT, seq_length=96))
    assert done.code == 0, done.err
    assert "data: 3 conversations" in done.out
    # The question alone of the third fills the sample: nothing of its answer is left.
    assert "1 truncated at --seq-length, 1 without a token of the model's left out, 0 unreadable" in done.out


def test_nothing_to_learn_shows_the_rendered_text(run: Run, converted: Path, tmp_path: Path) -> None:
    done = run("finetune", *words(converted, tmp_path, SHORT, SHORT, seq_length=8))
    check_refused(
        done, "seq_length = 8", "(2 without, 0 skipped)", r"<|im_start|>user\nName a colour.<|im_end|>", "Red."
    )
    assert not [name for name, content in tree(tmp_path / "saved").items() if content is not None]


def test_no_chat_template(run: Run, converted: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(converted / "iter_0000001" / "tokenizer", plain)
    (plain / "chat_template.jinja").unlink()
    options = words(converted, tmp_path, SHORT, seq_length=96)
    done = run("finetune", *options, "--tokenizer-model", plain)
    check_refused(done, f"tokenizer {plain} has no chat template", "chat_template.jinja")
    assert not (tmp_path / "saved").exists()

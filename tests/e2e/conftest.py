"""A small base model as a user has one, and the commands run inside this process."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mcore_spec.cli.main import run_command

VOCAB_SIZE = 103
# Of the demo model's tokenizer.
CHAT_VOCAB_SIZE = 49152
CONVERSATIONS = [
    ("Name three colours.", "Red, green and blue."),
    ("What is two plus two?", "Two plus two is four."),
    ("Say hello in French.", "Bonjour! That is how one says hello in French."),
    ("Which planet is the largest?", "Jupiter is the largest planet of the solar system."),
    ("Give me a word that rhymes with house.", "Mouse."),
    ("Write a very short poem.", "The rain falls soft on roof and stone; the night is long, but not alone."),
]
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


def make_base(directory: Path, *, seed: int = 0, **changes: int) -> Path:
    """A random Llama in float32, with files that stand for a tokenizer's."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, **changes}))
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"stands for": "a tokenizer"}\n')
    (directory / "tokenizer_config.json").write_text("{}\n")
    return directory


def make_chat_base(directory: Path, *, demo_base: Path) -> Path:
    """A small random base with a real tokenizer and chat template."""
    make_base(directory, vocab_size=CHAT_VOCAB_SIZE)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo_base / name, directory / name)
    return directory


def conversation(question: str, answer: str) -> dict[str, Any]:
    """In ModelOpt's form."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversation_id": question, "conversations": turns}


def attach_draft(base: Path, save: Path) -> Path:
    """The base with an EAGLE-3 draft, as a checkpoint."""
    words = ["--pretrained-model-path", str(base), "--export-algorithm", "eagle", "--save", str(save)]
    assert run_command("convert", words) == 0
    return save


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model."""
    return make_base(tmp_path_factory.mktemp("base") / "tiny_llama")


@pytest.fixture(scope="module")
def base(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a real tokenizer and chat template, alone in its directory's parent."""
    return make_chat_base(tmp_path_factory.mktemp("chat") / "base", demo_base=demo_base)


@pytest.fixture(scope="module")
def data(base: Path) -> Path:
    """Conversations."""
    path = base.parent / "conversations.jsonl"
    path.write_text("".join(json.dumps(conversation(*turns)) + "\n" for turns in CONVERSATIONS))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("convert", "--flag", value, ...)` as one process without torchrun would."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def call(command: str, *words: object) -> Done:
        capsys.readouterr()
        code = run_command(command, [str(word) for word in words])
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
def run_script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run_script(path, "--flag", value, ...)`: the file as Python runs it, without the seconds that imports take.

    A traceback would be raised by the test.
    """
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def call(path: Path, *words: object) -> Done:
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(path), run_name="__main__")
        assert isinstance(caught.value.code, int)
        return Done(caught.value.code, *capsys.readouterr())

    return call


def tree(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory: path -> content (None: a directory); empty where it does not exist."""
    if not directory.exists():
        return {}
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def subprocess_environment() -> dict[str, str]:
    """The environment of a started script: no hub, few threads, no launcher of ours."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def check_refused(done: Done, *parts: object) -> None:
    """One line on stderr with all parts in it, and code 2."""
    assert done.code == 2, done
    assert "Traceback" not in done.err
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and done.err.endswith(lines[0] + "\n"), done.err
    assert [str(part) for part in parts if str(part) not in lines[0]] == [], lines[0]

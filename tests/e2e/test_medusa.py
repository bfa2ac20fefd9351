"""Medusa through the command line: converted, trained, measured, exported, and what users get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mcore_spec.cli.main import run_command
from tests.e2e.conftest import Run, check_refused

pytestmark = pytest.mark.e2e
QUESTIONS = [{"question_id": 1, "turns": ["Name a colour."]}, {"question_id": 2, "turns": ["Hello", "And again?"]}]


@pytest.fixture(scope="module")
def converted(base: Path) -> Path:
    """The base with three heads of two layers."""
    save = base.parent / "converted"
    words = ["--pretrained-model-path", base, "--export-algorithm", "medusa", "--save", save]
    words += ["--export-num-medusa-heads", 3, "--export-num-medusa-layers", 2]
    assert run_command("convert", [str(word) for word in words]) == 0
    return save


@pytest.fixture(scope="module")
def questions(base: Path) -> Path:
    """Prompts in MT-Bench's form."""
    path = base.parent / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


def training(converted: Path, data: Path, save: Path, *more: object) -> list[object]:
    words: list[object] = ["--load", converted, "--save", save, "--data-path", data, "--seq-length", 64]
    return [*words, "--train-iters", 2, "--global-batch-size", 2, "--log-interval", 1, "--split", "3,1,0", *more]


def test_from_conversations_to_every_form_of_export(
    run: Run, base: Path, converted: Path, data: Path, questions: Path, tmp_path: Path
) -> None:
    save = tmp_path / "trained"
    done = run("finetune", *training(converted, data, save, "--eval-acceptance-interval", 2))
    assert done.code == 0, done.err
    entries = [json.loads(line) for line in (save / "train_log.jsonl").read_text().splitlines()]
    # One figure a head, in every entry.
    assert [len(entry["accuracy"]) for entry in entries if "accuracy" in entry] == [3, 3]
    assert [len(entry["acceptance_by_position"]) for entry in entries if "acceptance_length" in entry] == [3]

    def measured(*words: object) -> dict[str, Any]:
        output = tmp_path / "report.json"
        asked = ("--prompts-path", questions, "--osl", 5, "--output", output)
        finished = run("validate", *words, *asked)
        assert finished.code == 0, finished.err
        values: dict[str, Any] = json.loads(output.read_text())
        return {name: value for name, value in values.items() if not name.endswith("tokens_per_second")}

    chain = measured("--load", save, "--steps", 3)
    assert (chain["acceptance"], chain["lossless"]) == ("exact", True)
    assert measured("--load", save, "--tree", "0 1 2 0,0 0,1 1,0 0,0,0")["lossless"] is True
    typical = measured("--load", save, "--tree", "0 1 0,0", "--acceptance", "typical", "--temperature", 0.7)
    assert (typical["acceptance"], typical["lossless"]) == ("typical", None)
    for export_format in ("hf", "tensorrt-llm"):
        directory = tmp_path / export_format
        export = ("--load", save, "--export-dir", directory, "--export-format", export_format)
        done = run("export", *export, "--export-extra-modules")
        assert done.out == f"exported {directory} (iteration 2, Medusa)\n", done.err
        assert measured("--base", base, "--draft", directory, "--steps", 3) == chain
    done = run("generate", "--load", save, "--prompt", "Hello", "--osl", 4, "--steps", 2)
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--steps", 4), ("steps = 4", "3 Medusa heads", "lower --steps")),
        (("--acceptance", "typical"), ("--acceptance typical", "--temperature is 0")),
        (("--typical-delta", 0.5), ("--typical-epsilon and --typical-delta", "--acceptance typical")),
        (("--acceptance", "typical", "--temperature", 0.7, "--seed", 3), ("--seed", "draws nothing")),
        (("--acceptance", "loose"), ("--acceptance", "loose")),
        (("--acceptance", "typical", "--temperature", 0.7, "--typical-epsilon", 0), ("--typical-epsilon",)),
    ],
)
def test_what_a_measurement_is_refused_for(
    words: tuple[object, ...], says: tuple[str, ...], run: Run, converted: Path, questions: Path
) -> None:
    check_refused(run("validate", "--load", converted, "--prompts-path", questions, *words), *says)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--fit-start", 1), ("fit_start = 1", "no such start")),
        (("--dry-run",), ("medusa", "leave --dry-run out")),
    ],
)
def test_what_training_is_refused_for(
    more: tuple[object, ...], says: tuple[str, ...], run: Run, converted: Path, data: Path, tmp_path: Path
) -> None:
    check_refused(run("finetune", *training(converted, data, tmp_path / "save", *more)), *says)
    assert not (tmp_path / "save" / "latest_checkpointed_iteration.txt").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--export-num-medusa-heads", 0), ("--export-num-medusa-heads = '0'", "greater than or equal to 1")),
        (("--draft-vocab-cache", "d2t.pt"), ("--draft-vocab-cache (for eagle)",)),
        (("--draft-init", "base"), ("--draft-init (for eagle)",)),
    ],
)
def test_what_a_conversion_is_refused_for(
    words: tuple[object, ...], says: tuple[str, ...], run: Run, base: Path, tmp_path: Path
) -> None:
    given = ("--pretrained-model-path", base, "--export-algorithm", "medusa", "--save", tmp_path / "save")
    check_refused(run("convert", *given, *words), *says)
    assert not (tmp_path / "save").exists()

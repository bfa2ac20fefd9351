"""Measuring and talking as a user does: from a checkpoint, from two directories, and what users get wrong."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mcore_spec.cli.main import run_command
from tests.e2e.conftest import CHAT_VOCAB_SIZE, Run, attach_draft, check_refused, make_base, subprocess_environment

pytestmark = pytest.mark.e2e
REPOSITORY = Path(__file__).resolve().parents[2]
OSL = 6
KEYS = {
    "acceptance_length",
    "acceptance_by_position",
    "num_forwards",
    "num_tokens",
    "lossless",
    "tokens_per_second",
    "baseline_tokens_per_second",
    "categories",
}
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Name three colours.", "Another one, please."]},
    {"question_id": 82, "category": "math", "turns": ["What is two plus two?"]},
    {"question_id": 83, "category": "math", "turns": ["What is three plus two? Answer with a number."]},
]
CHAT = [{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say hello."}]}]


@pytest.fixture(scope="module")
def converted(base: Path) -> Path:
    """A checkpoint with a draft."""
    return attach_draft(base, base.parent / "converted")


@pytest.fixture(scope="module")
def exported(converted: Path) -> Path:
    """Its draft as engines take it."""
    directory = converted.parent / "draft"
    words = ["--load", str(converted), "--export-dir", str(directory), "--export-extra-modules"]
    assert run_command("export", words) == 0
    return directory


@pytest.fixture(scope="module")
def questions(base: Path) -> Path:
    """Prompts in MT-Bench's form."""
    path = base.parent / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


def measured(path: Path) -> dict[str, Any]:
    """What a report says, times left out."""
    values: dict[str, Any] = json.loads(path.read_text())
    assert values.keys() >= KEYS
    assert values["lossless"] is True
    assert values.pop("tokens_per_second") > 0
    assert values.pop("baseline_tokens_per_second") > 0
    return values


def test_a_checkpoint_and_its_export_measure_the_same(
    run: Run, base: Path, converted: Path, exported: Path, questions: Path, tmp_path: Path
) -> None:
    both = ("--prompts-path", questions, "--osl", OSL, "--output")
    done = run("validate", "--load", converted, *both, tmp_path / "load.json")
    assert done.code == 0, done.err
    assert "3 prompts, 3 steps, up to 6 new tokens each" in done.out
    assert "lossless: every greedy answer is the base's" in done.out
    values = measured(tmp_path / "load.json")
    assert (values["num_answers"], values["osl"]) == (4, OSL)
    assert values["num_tokens"] == 4 * OSL
    assert values["categories"].keys() == {"writing", "math"}
    assert len(values["acceptance_by_position"]) == 3
    done = run("validate", "--base", base, "--draft", exported, *both, tmp_path / "draft.json")
    assert done.code == 0, done.err
    assert measured(tmp_path / "draft.json") == values


def test_the_speculators_form_measures_the_same_and_damage_is_named(
    run: Run, base: Path, converted: Path, exported: Path, questions: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "speculators"
    form = ("--export-extra-modules", "--export-format", "speculators")
    assert run("export", "--load", converted, "--export-dir", directory, *form).code == 0
    words = ("--base", base, "--prompts-path", questions, "--osl", OSL, "--output", tmp_path / "out.json", "--draft")
    reports = []
    for draft in (exported, directory):
        done = run("validate", *words, draft)
        assert done.code == 0, done.err
        reports.append(measured(tmp_path / "out.json"))
    assert reports[0] == reports[1]
    tensors = load_file(directory / "model.safetensors")
    norm = tensors.pop("norm.weight")
    tensors |= {"unheard.weight": norm, "fc.weight": tensors["fc.weight"][1:].contiguous()}
    save_file(tensors, directory / "model.safetensors")
    done = run("validate", *words, directory)
    check_refused(done, "missing ['norm.weight'], not known ['unheard.weight'], of another shape ['fc.weight']")


def test_a_picture(run: Run, converted: Path, questions: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plots" / "a.png"
    done = run("validate", "--load", converted, "--prompts-path", questions, "--osl", 2, "--plot", picture)
    assert done.code == 0, done.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    done = run("validate", "--load", converted, "--prompts-path", questions, "--plot", tmp_path / "a.txt")
    check_refused(done, "matplotlib writes")


def test_two_ranks_under_torchrun_measure_the_same(run: Run, converted: Path, questions: Path, tmp_path: Path) -> None:
    both = ["--load", converted, "--prompts-path", questions, "--osl", OSL, "--params-dtype", "fp64"]
    assert run("validate", *both, "--output", tmp_path / "one.json").code == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    layout = ["--tensor-model-parallel-size", 2, "--sequence-parallel", "--output", tmp_path / "two.json"]
    words = [*launcher, REPOSITORY / "examples" / "validate.py", *both, *layout]
    done = subprocess.run(
        [str(word) for word in words],
        cwd=tmp_path,
        env=subprocess_environment() | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("lossless:") == 1
    assert measured(tmp_path / "two.json") == measured(tmp_path / "one.json")


@pytest.mark.parametrize("options", [("--top-k", 2), ("--tree", "0 1 0,0"), ("--temperature", 0.7, "--seed", 5)])
def test_trees_and_sampling(options: tuple[object, ...], run: Run, converted: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(CHAT[0]) + "\n")
    words = ("--load", converted, "--prompts-path", path, "--osl", OSL, "--output", tmp_path / "out.json")
    done = run("validate", *words, *options)
    assert done.code == 0, done.err
    values = json.loads((tmp_path / "out.json").read_text())
    assert values["num_tokens"] == OSL
    assert values["lossless"] is (None if "--temperature" in options else True)


def test_generate(run: Run, base: Path, converted: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = run("generate", "--load", converted, "--prompt", "Say hello.", "--osl", OSL)
    assert one.code == 0, one.err
    assert f"[{OSL} tokens, " in one.out
    assert "\x1b" not in one.out
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say hello.\nAnd now goodbye.\n"))
    both = run("generate", "--base", base, "--draft", exported, "--osl", OSL)
    assert both.code == 0, both.err
    assert both.out.count(f"[{OSL} tokens, ") == 2
    # The same answer, streamed, up to the line with its figures.
    assert one.out.split("\n[")[0] in both.out


def test_refusals(run: Run, base: Path, converted: Path, exported: Path, questions: Path, tmp_path: Path) -> None:
    report = tmp_path / "out.json"

    def refused(*words: object, prompts: Path = questions) -> Any:
        return run("validate", *words, "--prompts-path", prompts, "--output", report)

    load = ("--load", converted)
    check_refused(refused("--base", base), "give --load, or --base and --draft")
    check_refused(refused(*load, "--draft", exported), "drop --base and --draft")
    check_refused(refused(*load, "--temperature", 1, "--top-k", 2), "drop --tree and --top-k")
    check_refused(refused(*load, "--seed", 2), "--seed has no effect")
    check_refused(refused(*load, "--tree", "0,0"), "tree: node 0,0 has no parent")
    check_refused(refused(*load, "--transformer-impl", "transformer_engine"), "keeps no keys and values")
    check_refused(refused(*load, "--osl", 250), f"{questions}:1", "lower --osl or --steps")
    check_refused(refused(*load, "--steps", 250), "256 positions")
    empty, broken = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl"
    empty.touch()
    broken.write_text(json.dumps(QUESTIONS[0]) + '\n{"turns": "\n')
    check_refused(refused(*load, prompts=empty), "is empty")
    check_refused(refused(*load, prompts=broken), f"{broken}:2")
    check_refused(refused(*load, prompts=tmp_path / "none.jsonl"), tmp_path / "none.jsonl")
    other = make_base(tmp_path / "other", vocab_size=CHAT_VOCAB_SIZE, hidden_size=64)
    check_refused(refused("--base", other, "--draft", exported), "hidden_size = 32", "this base has 64")
    check_refused(refused("--base", base, "--draft", base), "is no export of this package", "'LlamaForCausalLM'")
    check_refused(refused("--base", base, "--draft", tmp_path / "none"), "none is no directory")
    # Before anything is measured, not after it.
    words = ("validate", *load, "--prompts-path", questions)
    for done in (run(*words, "--output", tmp_path), run(*words, "--plot", tmp_path / "empty.jsonl" / "a.png")):
        check_refused(done, tmp_path)
        assert "passes" not in done.out
    plain = tmp_path / "plain"
    assert run("convert", "--pretrained-model-path", base, "--export-algorithm", "none", "--save", plain).code == 0
    check_refused(refused("--load", plain), "has no draft")
    assert not report.exists()


def test_acceptance_is_measured_in_the_middle_of_training(
    run: Run, converted: Path, questions: Path, tmp_path: Path
) -> None:
    data = tmp_path / "conversations.jsonl"
    turns = [("Name three colours.", "Red, green and blue."), ("Say hello.", "Hello!"), ("What is two?", "A number.")]
    data.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n"
            for q, a in turns
        )
    )
    options = ("--seq-length", 64, "--train-iters", 3, "--log-interval", 1, "--split", "1,2,0")
    words = ("--load", converted, "--save", tmp_path / "run", "--data-path", data, *options)
    done = run("finetune", *words, "--eval-acceptance-interval", 2)
    assert done.code == 0, done.err
    assert "iteration 2: measured acceptance length 1." in done.out
    entries = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    (measured_entry,) = (entry for entry in entries if "acceptance_length" in entry)
    assert measured_entry["iteration"] == 2
    assert measured_entry["acceptance_forwards"] > 0
    assert len(measured_entry["acceptance_by_position"]) == 3
    # A run without it comes to the same weights: nothing that is drawn or kept is shared.
    assert run("finetune", *words[:2], "--save", tmp_path / "plain", *words[4:]).code == 0
    plain = [json.loads(line) for line in (tmp_path / "plain" / "train_log.jsonl").read_text().splitlines()]
    losses = [[entry["loss"] for entry in each if "loss" in entry] for each in (entries, plain)]
    assert losses[0] == losses[1]

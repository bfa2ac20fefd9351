"""Beside an engine: what is refused before it starts, what is made of its counters, and when it agrees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mcore_spec.errors import ConfigError
from tools import serve_check
from tools.serve_check import Served, compare, main, report

COUNTERS = {"num_forwards": 40, "num_draft_tokens": 120, "num_accepted_tokens": 13, "accepted_by_step": [10, 3, 0]}
VALIDATED = {
    "acceptance_length": 1.325,
    "acceptance_by_position": [0.25, 0.3, 0.0],
    "num_answers": 3,
    "acceptance": "exact",
    "proposals": "chain",
    "temperature": 0.0,
    "osl": 128,
    "dtype": "float32",
}


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A command line that reaches the engine."""
    for name, architecture in (("base", "LlamaForCausalLM"), ("draft", "LlamaForCausalLMEagle3")):
        (tmp_path / name).mkdir()
        config = {"architectures": [architecture], "hidden_size": 32, "vocab_size": 100}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    prompts, validated = tmp_path / "prompts.jsonl", tmp_path / "validate.json"
    prompts.write_text('{"turns": ["One?", "Two?"]}\n{"turns": ["Three?"]}\n')
    validated.write_text(json.dumps(VALIDATED))
    given = {"--base": tmp_path / "base", "--draft": tmp_path / "draft", "--prompts-path": prompts}
    return [str(word) for pair in (*given.items(), ("--validated", validated)) for word in pair]


def test_counters_under_our_names() -> None:
    figures = report(Served(dict(COUNTERS), [[1] * 30, [1] * 24], seconds=2.0))
    assert figures["acceptance_length"] == pytest.approx(1.325)
    assert figures["acceptance_by_position"] == [0.25, 0.3, 0.0]
    assert (figures["num_tokens"], figures["tokens_per_second"]) == (54, 27.0)
    nothing = {**COUNTERS, "num_forwards": 40, "num_accepted_tokens": 0, "accepted_by_step": [0, 0, 0]}
    assert report(Served(nothing, [[1]], seconds=1.0))["acceptance_by_position"] == [0.0, None, None]
    with pytest.raises(ConfigError, match="raise --osl"):
        report(Served({"num_forwards": 0}, [[1]], seconds=1.0))


@pytest.mark.parametrize(
    ("engines", "agrees"), [(1.325, True), (1.3, True), (1.35, True), (1.298, False), (1.36, False)]
)
def test_two_percent(engines: float, agrees: bool) -> None:
    figures: dict[str, Any] = {"acceptance_length": engines}
    assert compare(figures, dict(VALIDATED)) is agrees
    assert figures["apart"] == pytest.approx(abs(1.325 - engines) / engines)


def served_by(monkeypatch: pytest.MonkeyPatch, counters: dict[str, Any]) -> None:
    """An engine that counts these."""
    monkeypatch.setattr(serve_check, "has_vllm", lambda: True)
    monkeypatch.setattr(serve_check, "serve", lambda given, method, prompts: Served(dict(counters), [[1, 2]] * 3, 1.0))


def test_the_exit_code_says_whether_they_agree(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "serve.json"
    served_by(monkeypatch, COUNTERS)
    assert main([*words, "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert (written["apart"], written["validated_acceptance_length"]) == (0.0, 1.325)
    assert written["answers"] == [[1, 2]] * 3
    served_by(monkeypatch, {**COUNTERS, "num_accepted_tokens": 15, "accepted_by_step": [12, 3, 0]})
    assert main([*words, "--output", str(output)]) == 1
    assert "not within 2%" in capsys.readouterr().err
    assert json.loads(output.read_text())["apart"] > 0.02


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that says why nothing is served."""
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_refusals(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served_by(monkeypatch, COUNTERS)
    monkeypatch.setattr(serve_check, "serve", lambda given, method, prompts: pytest.fail("served"))
    assert "has steps = 3, here it is 2" in refused([*words, "--steps", "2"], capsys)
    assert "has osl = 128, here it is 64" in refused([*words, "--osl", "64"], capsys)
    assert "has num_answers = 3, here it is 2" in refused([*words, "--num-prompts", "1"], capsys)
    assert "has dtype = float32, here it is bfloat16" in refused([*words, "--dtype", "bfloat16"], capsys)
    other = tmp_path / "other.json"
    for field, value in (("acceptance", "typical"), ("proposals", "tree"), ("temperature", 0.7)):
        other.write_text(json.dumps({**VALIDATED, field: value}))
        assert f"has {field} = {value}, here it is" in refused([*words, "--validated", str(other)], capsys)
    assert "cannot be read" in refused([*words, "--validated", str(tmp_path / "none.json")], capsys)
    assert "cannot be read" in refused([*words, "--draft", str(tmp_path)], capsys)
    assert "no such file" in refused([*words, "--prompts-path", str(tmp_path / "none.jsonl")], capsys)
    assert "vLLM serves no LlamaForCausalLMEagle" in refused([*words, "--draft", str(odd(tmp_path))], capsys)
    with pytest.raises(SystemExit):
        main([*words, "--steps", "0"])
    assert "0 is not above 0" in capsys.readouterr().err
    monkeypatch.setattr(serve_check, "has_vllm", lambda: False)
    assert "tools/vllm_environment.sh" in refused(words, capsys)
    for config, said in (
        ({"hidden_size": 64}, "is for a base with hidden_size = 64, and --base has 32"),
        ({"hidden_size": 64, "target_hidden_size": 32, "vocab_size": 90}, "is for a base with vocab_size = 90"),
        ({"hidden_size": 32, "num_heads": 2}, "--steps 3: the draft has 2 heads"),
    ):
        (tmp_path / "draft" / "config.json").write_text(json.dumps({"architectures": ["MedusaModel"], **config}))
        assert said in refused(words, capsys)


def odd(tmp_path: Path) -> Path:
    """A draft that vLLM does not know."""
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"architectures": ["LlamaForCausalLMEagle"]}')
    return tmp_path / "odd"

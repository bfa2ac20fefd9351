"""The command line of a training run on a transformers model: what is understood, and what is told in one line."""

from __future__ import annotations

import pytest

from mcore_spec import ConfigError
from mcore_spec.huggingface.arguments import parse_arguments

BASE = ["--model_name_or_path", "base", "--output_dir", "out"]


def test_both_halves() -> None:
    draft, training = parse_arguments(
        [*BASE, "--data_path", "a.jsonl", "b.jsonl", "--fit_start", "4", "--max_steps", "3"]
    )
    assert (draft.model_name_or_path, draft.data_path, draft.fit_start) == ("base", ["a.jsonl", "b.jsonl"], 4)
    assert (training.output_dir, training.max_steps) == ("out", 3)
    assert parse_arguments(BASE).draft.fit_start is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "1"], "--lerning_rate: unknown option; did you mean --learning_rate?"),
        # A beginning of an option is not taken for it.
        (["--learning", "1"], "--learning: unknown option"),
        (["--zzzz=1"], "--zzzz=1: unknown option; see --help"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--mode", "eagle9"], "argument --mode: invalid choice: 'eagle9'"),
        (["--save_strategy", "epoch", "--load_best_model_at_end", "True"], "--load_best_model_at_end requires"),
        (["stray"], "stray: unknown option"),
    ],
)
def test_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments([*BASE, "--use_cpu", "True", *words])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_required() -> None:
    with pytest.raises(ConfigError, match="the following arguments are required: --model_name_or_path"):
        parse_arguments([])

"""From a command line and a YAML file to arguments: values, precedence, and what errors say."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcore_spec.cli.arguments import ConvertArguments, ExportArguments
from mcore_spec.cli.parser import parse_arguments
from mcore_spec.errors import ConfigError

MINIMAL = ("--export-algorithm", "eagle", "--load", "base", "--save", "out")


def parse(*argv: str) -> ConvertArguments:
    return parse_arguments(ConvertArguments, argv, prog="mcore-spec convert", description="Convert.")


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    return str(caught.value)


@pytest.fixture
def write_config(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


# --- flags ----------------------------------------------------------------------------------------


def test_flags_become_typed_values_and_only_they_are_set():
    arguments = parse(*MINIMAL, "--tensor-model-parallel-size", "2", "--sequence-parallel", "--eagle-config=a.json")
    assert arguments.tensor_model_parallel_size == 2
    assert arguments.sequence_parallel is True
    assert arguments.eagle_config == Path("a.json")
    assert (arguments.load, arguments.save, arguments.seed) == ("base", "out", 1234)
    assert arguments.model_fields_set == {
        "export_algorithm",
        "load",
        "save",
        "tensor_model_parallel_size",
        "sequence_parallel",
        "eagle_config",
    }


def test_booleans_have_an_off_flag():
    arguments = parse(*MINIMAL, "--no-sequence-parallel")
    assert arguments.sequence_parallel is False and "sequence_parallel" in arguments.model_fields_set


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--sav", "x"), "unknown flag --sav; did you mean --save?"),
        (("--tensor_model_parallel_size=2",), "unknown flag --tensor_model_parallel_size; did you mean"),
        (("--tensor-parallel-size", "2"), "did you mean --tensor-model-parallel-size?"),
        (("--no-sequence-paralel",), "did you mean --no-sequence-parallel?"),
        (("--confg", "x"), "did you mean --config?"),
        (("--qqqq",), "unknown flag --qqqq; see mcore-spec convert --help"),
        (("stray",), "unexpected argument 'stray': every value follows a flag"),
        (("--ckpt-step",), "--ckpt-step: expected one argument; see mcore-spec convert --help"),
        (("--seed", "many"), "--seed = 'many': Input should be a valid integer"),
        (("--seed", "-5"), "--seed = '-5': Input should be greater than or equal to 0"),
        (("--params-dtype", "bf61"), "--params-dtype = 'bf61': Input should be 'bf16', 'fp16', 'fp32'"),
        (("--params-dtype", "fp31"), "or 'auto'; did you mean fp32?"),
        (("--export-eagle-algorithm", "eagel3"), "'eagle1', 'eagle3' or 'eagle-mtp'; did you mean eagle3?"),
        (("--export-eagle-algorithm", "qqqq"), "--export-eagle-algorithm = 'qqqq': Input should be 'eagle1', 'eagle3'"),
        (("--seed", "1", "--seed", "2"), "--seed is given twice, as 1 and 2: keep one"),
        (("--save", "x"), "--save is given twice, as out and x: keep one"),
        (
            ("--no-sequence-parallel", "--sequence-parallel"),
            "--sequence-parallel is given twice, as --sequence-parallel and --no-sequence-parallel: keep one",
        ),
        (("--sequence-parallel",), "--sequence-parallel splits over tensor-parallel ranks"),
        (("--export-num-medusa-heads", "2"), "--export-num-medusa-heads (for medusa) would be ignored"),
    ],
)
def test_wrong_command_lines(argv, message):
    assert message in refusal(*MINIMAL, *argv)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eagel", "--export-algorithm = 'eagel': not known; did you mean eagle?"),
        ("qqqq", "--export-algorithm = 'qqqq': not known; choose one of eagle, medusa, none"),
    ],
)
def test_an_algorithm_that_is_not_known(name, message):
    assert refusal("--export-algorithm", name, "--load", "base", "--save", "out") == message


def test_no_abbreviations():
    assert refusal(*MINIMAL, "--export-eagle-algo", "eagle1").endswith("did you mean --export-eagle-algorithm?")


def test_the_same_value_twice_is_no_contradiction():
    assert parse(*MINIMAL, "--save", "out").save == "out"


def test_every_missing_option_is_named_with_its_meaning():
    message = refusal("--load", "base")
    assert "--export-algorithm is required: Kind of draft" in message
    assert "--save is required: Directory of the Megatron-core checkpoint to write" in message


# --- the YAML file --------------------------------------------------------------------------------


def test_flags_win_over_the_file(write_config):
    path = write_config(
        "export-algorithm: medusa\nload: base\nsave: from-file\nexport_num_medusa_heads: 4\nckpt_step: 7\n"
    )
    arguments = parse("--config", path, "--save", "from-flag", "--export-num-medusa-heads", "5")
    assert (arguments.save, arguments.export_num_medusa_heads, arguments.ckpt_step) == ("from-flag", 5, 7)
    assert arguments.export_algorithm == "medusa"
    assert arguments.model_fields_set == {
        "export_algorithm",
        "load",
        "save",
        "export_num_medusa_heads",
        "ckpt_step",
    }


def test_an_off_flag_wins_over_the_file(write_config):
    path = write_config("sequence_parallel: true\ntensor_model_parallel_size: 2\n")
    assert parse(*MINIMAL, "--config", path).sequence_parallel is True
    assert parse(*MINIMAL, "--config", path, "--no-sequence-parallel").sequence_parallel is False


def test_an_option_of_the_file_can_be_ignored_as_little_as_a_flag(write_config):
    message = refusal(*MINIMAL, "--config", write_config("export_num_medusa_heads: 2\n"))
    assert message.startswith("--export-num-medusa-heads (for medusa) would be ignored")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nlaod: x\n", ":2: laod: unknown key; did you mean load?"),
        ("qqqq: 1\n", ":1: qqqq: unknown key; see --help"),
        ("ckpt_step: 1\nckpt-step: 1\n", ":2: ckpt-step: already given in line 1: keep one"),
        ("seed: 1\nseed: 1\n", ":2: seed: already given in line 1: keep one"),
        ("seed: true\n", ":1: seed = True: expected N, not true or false"),
        ("sequence_parallel: 1\n", ":1: sequence_parallel = 1: expected true or false"),
        ("seed: [1]\n", ":1: seed = [1]: Input should be a valid integer"),
        ("eagle_config: 2024-13-45\n", ":1: eagle_config: month must be in 1..12; put the value in quotes"),
        ("seed: 1\nload: [a\n", ":3: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("seed: !!python/name:os.system\n", ":1: not valid YAML: could not determine a constructor for"),
        ("seed: \x07\n", ": not valid YAML: unacceptable character"),
        ("- seed\n", ": expected lines of the form `option: value`"),
        ("", ": expected lines of the form `option: value`"),
    ],
)
def test_wrong_files(write_config, text, message):
    path = write_config(text)
    assert refusal(*MINIMAL, "--config", path).startswith(f"{path}{message}")


def test_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "none.yaml"
    assert refusal(*MINIMAL, "--config", str(path)) == (
        f"--config {path}: No such file or directory; name a YAML file that can be read"
    )


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments_class", [ConvertArguments, ExportArguments])
def test_help_shows_every_field(arguments_class, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as caught:
        parse_arguments(arguments_class, ["--help"], prog="prog", description="What it does.")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "What it does." in text and "--config FILE" in text
    for name, field in arguments_class.model_fields.items():
        assert f"  --{name.replace('_', '-')}" in text
        assert field.description in text


def test_help_shows_kinds_defaults_and_groups(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        parse("--help")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == (
        "usage: mcore-spec convert [--config FILE] --export-algorithm {eagle,medusa,none} --save SAVE [options]"
    )
    assert "--seed N              Seed of the draft's initial weights. Default: 1234." in lines
    assert "--sequence-parallel, --no-sequence-parallel" in lines
    assert "--transformer-impl {local,transformer_engine}" in lines
    assert "Layers of the base model: Megatron-core's own, or Transformer Engine's. Default: local." in lines
    assert "--save SAVE           Directory of the Megatron-core checkpoint to write. Required." in lines
    groups = [line for line in lines if line.endswith(":") and not line.startswith("-")]
    assert groups == [
        "options:",
        "The draft, and where the result goes:",
        "The base model, and how it is read:",
        "How the model is spread over ranks:",
        "A rehearsal:",
        "The GPUs that a run is planned for:",
    ]

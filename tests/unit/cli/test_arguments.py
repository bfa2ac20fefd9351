"""What the arguments refuse: sources that exclude each other, and options that would be ignored."""

from __future__ import annotations

from typing import Any

import pytest

from mcore_spec.cli.arguments import ConvertArguments, ExportArguments, flag_of
from mcore_spec.errors import ConfigError

EAGLE = {"export_algorithm": "eagle", "load": "base", "save": "out"}


def convert(**values: Any) -> ConvertArguments:
    return ConvertArguments.parse(EAGLE | values)


def test_flags_are_spelt_as_in_megatron_lm():
    assert flag_of("tensor_model_parallel_size") == "--tensor-model-parallel-size"
    assert flag_of("save") == "--save"


def test_defaults():
    assert convert().model_dump() == {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "sequence_parallel": False,
        "decoder_last_pipeline_num_layers": None,
        "transformer_impl": "local",
        "pretrained_model_path": None,
        "load": "base",
        "ckpt_step": None,
        "params_dtype": "auto",
        "seed": 1234,
        "export_algorithm": "eagle",
        "save": "out",
        "algorithm_config": None,
        "export_eagle_algorithm": "eagle3",
        "eagle_config": None,
        "draft_vocab_cache": None,
        "export_offline_model": False,
        "draft_init": "auto",
        "export_num_medusa_heads": None,
        "export_num_medusa_layers": None,
        "dry_run": False,
        "num_gpus": None,
        "gpu": "h100",
        "utilization": 0.4,
    }
    export = ExportArguments(load="checkpoint", export_dir="out")
    assert (export.export_format, export.export_extra_modules, export.overwrite) == ("hf", False, False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"load": None}, "give either --pretrained-model-path or --load: neither is given"),
        ({"pretrained_model_path": "hf"}, "give either --pretrained-model-path or --load: both are given"),
        (
            {"load": None, "pretrained_model_path": "hf", "ckpt_step": 3},
            "--ckpt-step chooses an iteration of --load, which is not given: drop it",
        ),
        (
            {"sequence_parallel": True},
            "--sequence-parallel splits over tensor-parallel ranks, --tensor-model-parallel-size is 1: "
            "raise the size or drop --sequence-parallel",
        ),
        (
            {"decoder_last_pipeline_num_layers": 3},
            "--decoder-last-pipeline-num-layers has no effect while --pipeline-model-parallel-size is 1: "
            "raise the size or drop it",
        ),
    ],
)
def test_values_that_contradict_each_other(values, message):
    with pytest.raises(ConfigError) as caught:
        convert(**values)
    assert str(caught.value).endswith(message)


def test_values_that_agree():
    assert convert(sequence_parallel=True, tensor_model_parallel_size=2).sequence_parallel
    assert convert(decoder_last_pipeline_num_layers=3, pipeline_model_parallel_size=2)
    assert convert(ckpt_step=0).ckpt_step == 0


@pytest.mark.parametrize(
    ("algorithm", "option", "value", "owners"),
    [
        ("eagle", "export_num_medusa_heads", 2, "medusa"),
        ("eagle", "export_num_medusa_layers", 3, "medusa"),
        ("medusa", "eagle_config", "draft.json", "eagle"),
        ("medusa", "export_eagle_algorithm", "eagle3", "eagle"),
        ("medusa", "draft_vocab_cache", "d2t.pt", "eagle"),
        ("none", "draft_vocab_cache", "d2t.pt", "eagle"),
        ("none", "export_num_medusa_heads", 2, "medusa"),
        ("none", "seed", 1234, "eagle"),
        ("medusa", "seed", 7, "eagle"),
        ("none", "algorithm_config", "draft.json", "eagle or medusa"),
    ],
)
def test_an_option_of_another_algorithm_is_refused_even_with_its_default(algorithm, option, value, owners):
    with pytest.raises(ConfigError) as caught:
        convert(export_algorithm=algorithm, **{option: value})
    assert str(caught.value).endswith(
        f"{flag_of(option)} (for {owners}) would be ignored with --export-algorithm {algorithm}: "
        "drop what does not apply, or choose another algorithm"
    )


def test_all_ignored_options_are_named_at_once():
    with pytest.raises(ConfigError, match=r"--eagle-config \(for eagle\)") as caught:
        convert(export_algorithm="medusa", eagle_config="a.json", draft_vocab_cache="d2t.pt")
    assert "--draft-vocab-cache (for eagle)" in str(caught.value)


def test_two_names_of_one_file():
    with pytest.raises(ConfigError, match="--eagle-config and --algorithm-config are two names of one option: keep"):
        convert(eagle_config="a.json", algorithm_config="a.json")
    flags = {"export_eagle_algorithm": "eagle3", "draft_init": "auto", "seed": 1234}
    assert convert(algorithm_config="a.json").algorithm_flags() == flags


def test_none_means_absent():
    assert convert(export_algorithm="medusa", eagle_config=None).export_algorithm == "medusa"


@pytest.mark.parametrize("algorithm", ["eagle", "medusa", "none"])
def test_options_left_alone_are_never_ignored_options(algorithm):
    assert convert(export_algorithm=algorithm).export_algorithm == algorithm

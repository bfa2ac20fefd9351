"""Configuration classes: strict, frozen, and errors that name field, value and remedy."""

from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from mcore_spec.config import (
    EAGLE1_DEFAULT_CFG,
    EAGLE3_DEFAULT_CFG,
    EAGLE_MTP_DEFAULT_CFG,
    EagleArchitectureConfig,
    EagleConfig,
    MedusaConfig,
    RopeConfig,
    check_supported,
    eagle_preset,
    suggest,
)
from mcore_spec.errors import ConfigError, UnsupportedError
from tests.tiny import base_architecture


def test_presets_describe_their_algorithm_and_are_fresh() -> None:
    presets = {"eagle1": EAGLE1_DEFAULT_CFG, "eagle3": EAGLE3_DEFAULT_CFG, "eagle-mtp": EAGLE_MTP_DEFAULT_CFG}
    for name, preset in presets.items():
        assert preset == eagle_preset(name)
        config = EagleConfig.parse(preset["config"])
        check_supported(config)
        assert config.algorithm == name
    changed = eagle_preset("eagle3")
    changed["config"]["eagle_architecture_config"]["fc_norm"] = True
    assert eagle_preset("eagle3") != changed
    with pytest.raises(ConfigError, match="'eagle4' is not known; did you mean eagle"):
        eagle_preset("eagle4")


def test_eagle3_is_the_default_algorithm() -> None:
    assert EagleConfig.parse({}).algorithm == "eagle3"
    assert EagleConfig.parse({"eagle_architecture_config": {"num_hidden_layers": 2}}).algorithm == "eagle3"
    given = {"use_aux_hidden_state": False, "use_input_layernorm_in_first_layer": False}
    assert EagleConfig.parse({"eagle_architecture_config": given}).algorithm == "eagle1"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"medusa_num_head": 3}, "medusa_num_head: unknown field; did you mean medusa_num_heads?"),
        ({"medusa_num_heads": 0}, "medusa_num_heads = 0: "),
        ({"medusa_num_heads": "many"}, "medusa_num_heads = 'many': "),
        ({"medusa_loss_decay_factor": 2}, "medusa_loss_decay_factor = 2: "),
        ({"zzz": 1}, "zzz: unknown field; known fields: medusa_num_heads, "),
    ],
)
def test_medusa_errors(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        MedusaConfig.parse(values)


def test_a_field_of_the_architecture_in_the_wrong_place() -> None:
    message = "eagle_aux_hidden_state_layer_ids: unknown field; it belongs into eagle_architecture_config"
    with pytest.raises(ConfigError, match=message):
        EagleConfig.parse({"eagle_aux_hidden_state_layer_ids": [1, 2, 3]})


def test_a_beginning_is_finished_before_a_spelling_is_corrected() -> None:
    known = ["qwen3-32b", "qwen3-30b-a3b", "qwen3-235b-a22b"]
    assert suggest("qwen3-235b", known) == "did you mean qwen3-235b-a22b?"
    assert suggest("qwen3-33b", known) == "did you mean qwen3-32b?"
    assert suggest("zzz", known, otherwise="none") == "none"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_hidden_layer": 2},
            "eagle_architecture_config.num_hidden_layer: unknown field; did you mean num_hidden_layers?",
        ),
        ({"eagle_ttt_steps": 2}, "eagle_ttt_steps: unknown field; it belongs beside eagle_architecture_config"),
        ({"num_hidden_layers": 0}, "eagle_architecture_config.num_hidden_layers = 0: "),
        ({"hidden_act": "swish"}, "eagle_architecture_config.hidden_act = 'swish': "),
        ({"attention_dropout": 0.1}, "eagle_architecture_config.attention_dropout = 0.1: "),
        ({"position_embedding_type": "learned"}, "eagle_architecture_config.position_embedding_type = 'learned': "),
        ({"parallel_draft_step": 0}, "eagle_architecture_config.parallel_draft_step = 0: "),
        (
            {"parallel_draft_heads_num_layers": 2},
            "parallel_draft_heads_num_layers = 2 needs parallel_draft_step",
        ),
        ({"eagle_aux_hidden_state_layer_ids": [3, 1]}, "eagle_aux_hidden_state_layer_ids = [3, 1] must be sorted"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 1]}, "[1, 1] must be sorted and without repetition"),
        ({"use_aux_hidden_state": True, "use_mtp_layernorm": True}, "exclude each other: choose one"),
        ({"norm_before_fc": True, "fc_norm": True}, "norm_before_fc and fc_norm exclude each other"),
        (
            {"use_aux_hidden_state": False, "norm_output": True, "fc_norm": True},
            "fc_norm, norm_output need(s) use_aux_hidden_state = true",
        ),
        (
            {"use_input_layernorm_in_first_layer": False, "eagle_aux_hidden_state_layer_ids": [1]},
            "eagle_aux_hidden_state_layer_ids need(s) use_aux_hidden_state = true",
        ),
    ],
)
def test_eagle_architecture_errors(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        EagleConfig.parse({"eagle_architecture_config": values}, where="FILE.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_aux_hidden_state": True, "use_last_layernorm": False}, "eagle3 needs use_last_layernorm = True"),
        (
            {"use_aux_hidden_state": True, "use_last_layernorm": True, "use_input_layernorm_in_first_layer": False},
            "eagle3 needs use_last_layernorm = True and use_input_layernorm_in_first_layer = True, got True and False",
        ),
        ({"use_mtp_layernorm": True}, "eagle-mtp needs use_last_layernorm = True"),
        ({"use_aux_hidden_state": False}, "eagle1 needs use_last_layernorm = False"),
        (
            {"use_input_layernorm_in_first_layer": False, "use_last_layernorm": True},
            "eagle1 needs use_last_layernorm = False",
        ),
    ],
)
def test_flags_of_no_known_draft(values: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        check_supported(EagleConfig.parse({"eagle_architecture_config": values}))


def test_reuse_of_the_base_decoder_is_for_mtp() -> None:
    for algorithm in ("eagle1", "eagle3"):
        config = EagleConfig.parse({**eagle_preset(algorithm)["config"], "eagle_reuse_base_decoder": True})
        with pytest.raises(UnsupportedError, match="eagle_reuse_base_decoder = true is for eagle-mtp"):
            check_supported(config)


def test_labels_outside_of_the_vocabulary_cannot_be_learnt() -> None:
    said = "eagle_keep_out_of_vocabulary = true needs eagle_self_logit_distillation = true"
    with pytest.raises(ConfigError, match=said):
        EagleConfig.parse({"eagle_keep_out_of_vocabulary": True, "eagle_self_logit_distillation": False})


def test_configs_are_frozen_and_survive_json() -> None:
    config = EagleConfig.parse(
        {"eagle_architecture_config": {"eagle_aux_hidden_state_layer_ids": [1, 2], "rope_scaling": {"factor": 2.0}}}
    )
    assert EagleConfig.parse(config.model_dump(mode="json")) == config
    with pytest.raises(ValidationError):
        config.eagle_ttt_steps = 4
    assert EagleArchitectureConfig.model_fields.keys() >= {"torch_dtype", "parallel_draft_heads_num_layers"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"theta": 0}, "theta = 0"),
        ({"theta": 1e4, "rope_type": "dynamic"}, "rope_type = 'dynamic'"),
        ({"theta": 1e4, "rope_type": "linear"}, "missing ['factor'], unknown []"),
        ({"theta": 1e4, "scaling": {"factor": 2}}, "missing [], unknown ['factor']"),
    ],
)
def test_rope_errors(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        RopeConfig.parse(values)


def test_base_architecture_errors() -> None:
    with pytest.raises(ConfigError, match="num_attention_heads = 4 must be a multiple of num_key_value_heads = 3"):
        base_architecture(num_key_value_heads=3)
    with pytest.raises(ConfigError, match="windowed_layers has 2 entries for 6 layers"):
        base_architecture(window_size=4, windowed_layers=(True, False))

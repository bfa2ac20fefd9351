"""`convert()` on a live GPTModel in one process: the forms of a mode, what it attaches, what it refuses."""

from __future__ import annotations

import json
import pkgutil
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pydantic
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mcore_spec import EAGLE1_DEFAULT_CFG, EAGLE3_DEFAULT_CFG, EAGLE_MTP_DEFAULT_CFG, EagleConfig, MedusaConfig, convert
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.megatron_build import BaseGPTModel, build_gpt_model
from mcore_spec.checkpoint.store import find_checkpoint, load_checkpoint, make_record, save_checkpoint
from mcore_spec.cli.arguments import ConvertArguments
from mcore_spec.cli.parser import parse_arguments
from mcore_spec.config import ALGORITHMS, BaseIdentity, eagle_preset
from mcore_spec.conversion import Algorithm, conversion_of, find_algorithm
from mcore_spec.drafts.eagle1 import Eagle1Draft
from mcore_spec.drafts.eagle3 import Eagle3Draft
from mcore_spec.drafts.medusa import MedusaDraft
from mcore_spec.drafts.mtp import MTPDraft
from mcore_spec.errors import CheckpointError, ConfigError, McoreSpecError, UnsupportedError
from mcore_spec.export.draft import export_draft
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.quantization.calibrate import quantize
from tests.one_file_algorithm import OneMapConfig, OneMapDraft, registered
from tests.tiny import DRAFT_VOCAB_SIZE, base_architecture, draft_to_target

# What a user of ModelOpt has in a file, every key of it.
MODELOPT = {
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "position_embedding_type": "rope",
    "rope_scaling": {"rope_type": "default", "rope_theta": 10000},
    "rope_theta": 10000,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.01,
    "rms_norm_eps": 1e-05,
    "mlp_bias": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_aux_hidden_state": True,
    "eagle_aux_hidden_state_layer_ids": [],
    "use_mtp_layernorm": False,
    "parallel_draft_step": 1,
    "parallel_draft_heads_num_layers": 1,
    "has_lm_head": False,
    "head_dim": 8,
}


@pytest.fixture(scope="module", autouse=True)
def _runtime() -> Iterator[None]:
    with parallel_runtime(Layout()):
        yield


@pytest.fixture
def build() -> Callable[..., BaseGPTModel]:
    """A function that makes a base with defined weights."""

    def build_base(**changes: Any) -> BaseGPTModel:
        model = build_gpt_model(base_architecture(**{"dtype": "float32", **changes}), Layout())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
        return model

    return build_base


def architecture(**values: Any) -> list[Any]:
    return [("eagle", {"eagle_architecture_config": values})]


@pytest.mark.parametrize(
    ("mode", "draft_class", "attribute"),
    [
        ("medusa", MedusaDraft, "medusa_heads"),
        ("eagle", Eagle3Draft, "eagle_module"),
        (EAGLE1_DEFAULT_CFG, Eagle1Draft, "eagle_module"),
        (EAGLE3_DEFAULT_CFG, Eagle3Draft, "eagle_module"),
        (EAGLE_MTP_DEFAULT_CFG, MTPDraft, "eagle_module"),
        ({"algorithm": "medusa", "config": {"medusa_num_heads": 3}}, MedusaDraft, "medusa_heads"),
        ([("medusa", {"medusa_num_layers": 2})], MedusaDraft, "medusa_heads"),
        ([("medusa", MedusaConfig(medusa_num_heads=1))], MedusaDraft, "medusa_heads"),
        ([("eagle", {})], Eagle3Draft, "eagle_module"),
        ([("eagle", EagleConfig(eagle_ttt_steps=5))], Eagle3Draft, "eagle_module"),
        ([("eagle", {"eagle_architecture_config": {"num_hidden_layers": 2}})], Eagle3Draft, "eagle_module"),
        ((("medusa", {}),), MedusaDraft, "medusa_heads"),
    ],
)
def test_every_form_of_a_mode(
    mode: Any, draft_class: type[nn.Module], attribute: str, build: Callable[..., BaseGPTModel]
) -> None:
    model = build()
    base_names = {name for name, _ in model.named_parameters()}
    assert convert(model, mode) is model
    draft = model.get_submodule(attribute)
    assert isinstance(draft, draft_class)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name not in base_names)
        assert parameter.dtype is torch.float32
        assert parameter.isfinite().all(), f"{name} was left as memory had it"


def test_the_given_values_arrive(build: Callable[..., BaseGPTModel]) -> None:
    model = build()
    convert(model, [("medusa", {"medusa_num_heads": 3, "medusa_num_layers": 2})])
    assert [len(head.blocks) for head in model.medusa_heads.heads] == [2, 2, 2]
    model = build()
    convert(model, [("eagle", EagleConfig(eagle_ttt_steps=5))])
    conversion = conversion_of(model)
    assert conversion is not None and conversion.config.eagle_ttt_steps == 5


def test_what_is_not_given_follows_the_base(build: Callable[..., BaseGPTModel]) -> None:
    rope = {
        "theta": 500.0,
        "rope_type": "linear",
        "scaling": {"factor": 2.0},
    }
    model = convert(build(rope=rope, hidden_act="gelu", rms_norm_eps=1e-3, num_layers=9), "eagle")
    conversion = conversion_of(model)
    assert conversion is not None
    resolved = conversion.config.eagle_architecture_config
    assert (resolved.num_attention_heads, resolved.num_key_value_heads, resolved.head_dim) == (4, 2, 8)
    assert (resolved.intermediate_size, resolved.hidden_act, resolved.rms_norm_eps) == (24, "gelu", 1e-3)
    assert (resolved.rope_theta, resolved.rope_scaling) == (500.0, {"rope_type": "linear", "factor": 2.0})
    assert (resolved.hidden_size, resolved.vocab_size, resolved.draft_vocab_size) == (16, 103, 103)
    assert resolved.eagle_aux_hidden_state_layer_ids == (1, 3, 5)
    # A resolved configuration is a configuration: converting by it gives the same.
    again = conversion_of(convert(build(rope=rope, hidden_act="gelu", rms_norm_eps=1e-3, num_layers=9), [
        ("eagle", conversion.config.model_dump(mode="json"))
    ]))  # fmt: skip
    assert again is not None and again.config == conversion.config


@pytest.mark.parametrize(("num_layers", "expected"), [(1, (0,)), (2, (0, 1)), (4, (0, 1)), (32, (1, 15, 28))])
def test_default_aux_layers(num_layers: int, expected: tuple[int, ...]) -> None:
    base = base_architecture(num_layers=num_layers)
    resolved = find_algorithm("eagle").resolve(EagleConfig(), base, None).eagle_architecture_config
    assert resolved.eagle_aux_hidden_state_layer_ids == expected


def test_modelopts_file_converts(build: Callable[..., BaseGPTModel]) -> None:
    model = convert(build(dtype="bfloat16"), architecture(**MODELOPT))
    draft = model.eagle_module
    assert isinstance(draft, Eagle3Draft) and draft.fc.weight.dtype is torch.bfloat16
    assert draft.lm_head is None
    assert draft.layers[0].mlp.gate_proj.weight.shape == (32, 16)
    assert abs(draft.layers[0].self_attn.q_proj.weight.float().std() / 0.01 - 1) < 0.1


def test_modelopts_file_for_another_dtype_is_refused(build: Callable[..., BaseGPTModel]) -> None:
    """Its torch_dtype says what the draft is made of; a draft of another dtype would be a silent exception."""
    with pytest.raises(ConfigError, match="torch_dtype = 'bfloat16' is not the base's 'float32'; leave it out"):
        convert(build(), architecture(**MODELOPT))
    values = {name: value for name, value in MODELOPT.items() if name != "torch_dtype"}
    assert convert(build(), architecture(**values)).eagle_module.fc.weight.dtype is torch.float32


def test_d2t_gives_the_draft_vocabulary_its_size(build: Callable[..., BaseGPTModel]) -> None:
    model = convert(build(), "eagle", d2t=draft_to_target())
    draft = model.eagle_module
    assert torch.equal(draft.d2t, draft_to_target())
    assert draft.lm_head.vocab_size == DRAFT_VOCAB_SIZE
    assert "d2t" in draft.state_dict()
    model = convert(build(), architecture(draft_vocab_size=DRAFT_VOCAB_SIZE), d2t=draft_to_target().to(torch.int32))
    assert model.eagle_module.d2t.dtype is torch.int64


def test_a_whole_vocabulary_needs_no_mapping(build: Callable[..., BaseGPTModel]) -> None:
    draft = convert(build(), architecture(draft_vocab_size=103)).eagle_module
    assert draft.lm_head is None and not draft.has_reduced_vocabulary


def test_an_unfrozen_base_keeps_its_gradients(build: Callable[..., BaseGPTModel]) -> None:
    model = convert(build(), [("eagle", {"eagle_freeze_base_model": False})])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_seed_decides_the_weights(build: Callable[..., BaseGPTModel]) -> None:
    def weight(seed: int) -> torch.Tensor:
        return convert(build(), "eagle", seed=seed, draft_init="random").eagle_module.fc.weight

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))


REFUSED = {
    "misspelt algorithm": ("eagel", ConfigError, "algorithm 'eagel' is not known; did you mean eagle?"),
    "unknown algorithm": ("hydra", ConfigError, "algorithm 'hydra' is not known; choose one of eagle, medusa"),
    "no name": ([(["eagle"], {})], ConfigError, "algorithm ['eagle'] is not known; did you mean eagle?"),
    "two algorithms": ([("eagle", {}), ("medusa", {})], ConfigError, "must name exactly one algorithm"),
    "no algorithm": ([], ConfigError, "must name exactly one algorithm"),
    "not a preset": ({"algorithm": "eagle"}, ConfigError, "mode = {'algorithm': 'eagle'} must name exactly"),
    "no mode": (None, ConfigError, "mode = None must name exactly one algorithm"),
    "two spellings": (
        [("eagle", {"eagle_architecture_config": {"rope_scaling": {"rope_theta": 1.0}, "rope_parameters": {}}})],
        ConfigError,
        "rope_parameters and rope_scaling say the same",
    ),
    "unknown key": (
        [("medusa", {"medusa_heads": 2})],
        ConfigError,
        "medusa config: medusa_heads: unknown field; did you mean medusa_num_heads?",
    ),
    "unknown key of the architecture": (
        architecture(num_layers=2),
        ConfigError,
        "eagle_architecture_config.num_layers: unknown field; did you mean",
    ),
    "somebody else's config": ([("eagle", MedusaConfig())], ConfigError, "takes a EagleConfig, got MedusaConfig"),
    "aux layer out of range": (
        architecture(eagle_aux_hidden_state_layer_ids=[1, 6]),
        ConfigError,
        "eagle_aux_hidden_state_layer_ids = [1, 6]: [6] out of range; the base has layers 0 to 5",
    ),
    "negative aux layer": (
        architecture(eagle_aux_hidden_state_layer_ids=[-1]), ConfigError, "[-1] out of range"
    ),
    "unsorted aux layers": (
        architecture(eagle_aux_hidden_state_layer_ids=[4, 1]), ConfigError, "must be sorted"
    ),
    "larger draft vocabulary": (
        architecture(draft_vocab_size=104),
        ConfigError,
        "draft_vocab_size = 104 is larger than the base's vocabulary of 103",
    ),
    "d2t is missing": (
        architecture(draft_vocab_size=37),
        ConfigError,
        "draft_vocab_size = 37 is not the base's vocabulary of 103: give the mapping d2t",
    ),
    "reduced vocabulary of EAGLE-1": (
        architecture(use_input_layernorm_in_first_layer=False, draft_vocab_size=37),
        ConfigError,
        "draft_vocab_size = 37 with eagle1, whose head is the base's",
    ),
    "another hidden size": (
        architecture(hidden_size=32), ConfigError, "hidden_size = 32 is not the base's 16; leave it out"
    ),
    "another vocabulary": (architecture(vocab_size=99), ConfigError, "vocab_size = 99 is not the base's 103"),
    "another context": (
        architecture(max_position_embeddings=1), ConfigError, "max_position_embeddings = 1 is not the base's 64"
    ),
    "heads and groups": (
        architecture(num_attention_heads=3, num_key_value_heads=2),
        ConfigError,
        "num_attention_heads = 3 is not a multiple of num_key_value_heads = 2",
    ),
    "two thetas": (
        architecture(rope_theta=1.0, rope_scaling={"rope_type": "default", "rope_theta": 2.0}),
        ConfigError,
        "rope_theta = 1.0 but rope_scaling has rope_theta = 2.0; leave one of the two out",
    ),
    "incomplete rope": (
        architecture(rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        ConfigError,
        "rope_scaling of type 'yarn': missing ['original_max_position_embeddings']",
    ),
    "contradictory algorithms": (
        architecture(use_aux_hidden_state=True, use_mtp_layernorm=True), ConfigError, "exclude each other"
    ),
    "contradictory norms": (
        architecture(norm_before_fc=True, fc_norm=True), ConfigError, "exclude each other"
    ),
    "no such draft": (
        architecture(use_aux_hidden_state=True, use_last_layernorm=False),
        UnsupportedError,
        "eagle3 needs use_last_layernorm = True",
    ),
    "offline": ([("eagle", {"eagle_offline": True})], UnsupportedError, "eagle_offline = true"),
    "reuse for EAGLE-3": (
        [("eagle", {"eagle_reuse_base_decoder": True})], UnsupportedError, "is for eagle-mtp"
    ),
    "reuse of another shape": (
        [
            (
                "eagle",
                {
                    "eagle_reuse_base_decoder": True,
                    "eagle_architecture_config": {
                        **EAGLE_MTP_DEFAULT_CFG["config"]["eagle_architecture_config"],
                        "num_attention_heads": 2,
                    },
                },
            )
        ],
        ConfigError,
        "num_attention_heads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, build: Callable[..., BaseGPTModel]) -> None:
    mode, error, message = REFUSED[case]
    unchanged_after(build(), lambda model: convert(model, mode), error, message)


D2T_REFUSED = {
    "another size than configured": (
        architecture(draft_vocab_size=36),
        draft_to_target(),
        "draft_vocab_size = 36 but d2t has 37 entries; make the two agree",
    ),
    "more entries than the base": ("eagle", draft_to_target(104, vocab_size=200), "104 entries, more than"),
    "for Medusa, of another size": (
        [("medusa", {"draft_vocab_size": 36})],
        draft_to_target(),
        "draft_vocab_size = 36 but d2t has 37 entries; make the two agree",
    ),
    "for EAGLE-1": (EAGLE1_DEFAULT_CFG, draft_to_target(), "with eagle1, whose head is the base's"),
    "of floats": ("eagle", draft_to_target().double(), "holds torch.float64 (37,); it must hold an int64 vector"),
    "not a vector": ("eagle", draft_to_target()[None], "holds torch.int64 (1, 37)"),
    "beyond the vocabulary": ("eagle", draft_to_target() + 1, "target ids 1 to 103 leave the base's vocabulary of 103"),
    "before the vocabulary": ("eagle", draft_to_target() - 1, "target ids -1 to 101 leave"),
    "repeated targets": ("eagle", -torch.arange(37), "must ascend strictly"),
    "empty": ("eagle", torch.zeros(0, dtype=torch.int64), "must ascend strictly"),
}


@pytest.mark.parametrize("case", D2T_REFUSED)
def test_refused_mappings(case: str, build: Callable[..., BaseGPTModel]) -> None:
    mode, d2t, message = D2T_REFUSED[case]
    unchanged_after(build(), lambda model: convert(model, mode, d2t=d2t), ConfigError, message)


def unchanged_after(
    model: BaseGPTModel, function: Callable[[BaseGPTModel], object], error: type[McoreSpecError], message: str
) -> None:
    """A refused model is the model that it was: no modules, nothing frozen."""
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=re.escape(message)):
        function(model)
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_is_converted_once(build: Callable[..., BaseGPTModel]) -> None:
    model = convert(build(), "medusa")
    names = [name for name, _ in model.named_modules()]
    for mode in ("medusa", "eagle"):
        with pytest.raises(ConfigError, match=r"has a draft already \(medusa\); convert the base it was made from"):
            convert(model, mode)
    assert [name for name, _ in model.named_modules()] == names


def test_a_quantised_model_takes_no_draft(build: Callable[..., BaseGPTModel]) -> None:
    """Its recipe covers the draft, which would have no scales."""
    model = quantize(build(), "int8_per_channel")
    message = r"the model is quantised (int8_per_channel): convert the one that it was made from"
    unchanged_after(model, lambda model: convert(model, "eagle"), ConfigError, message)


def test_other_modules_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="GPTModel or a transformers model, got Linear"):
        convert(nn.Linear(2, 2), "medusa")


def test_a_preset_is_not_changed_by_its_use(build: Callable[..., BaseGPTModel]) -> None:
    convert(build(), EAGLE3_DEFAULT_CFG)
    assert eagle_preset("eagle3") == EAGLE3_DEFAULT_CFG


def test_public_names_stay_what_they_are() -> None:
    """A module of a public function's name would take its place as soon as anything imports it."""
    import mcore_spec

    for name in mcore_spec.__all__:
        assert not isinstance(pkgutil.resolve_name(f"mcore_spec:{name}"), ModuleType), name
    modules = {module.name for module in pkgutil.walk_packages(mcore_spec.__path__)}
    assert not modules & set(mcore_spec.__all__)


def test_a_presets_configuration_alone_is_a_mode(build: Callable[..., BaseGPTModel]) -> None:
    for preset, kind in ((EAGLE3_DEFAULT_CFG, Eagle3Draft), (EAGLE_MTP_DEFAULT_CFG, MTPDraft)):
        assert isinstance(convert(build(), preset["config"]).eagle_module, kind)
    assert isinstance(convert(build(), {"medusa_num_heads": 3}).medusa_heads, MedusaDraft)


def test_rope_parameters_is_another_name_of_rope_scaling(build: Callable[..., BaseGPTModel]) -> None:
    scaling = {"rope_type": "linear", "rope_theta": 777.0, "factor": 2.0}
    both = [
        convert(build(), [("eagle", {"eagle_architecture_config": {name: scaling}})])
        for name in ("rope_scaling", "rope_parameters")
    ]
    first, second = (model.eagle_module.architecture for model in both)
    assert first == second
    assert (first.rope_theta, first.rope_scaling) == (777.0, {"rope_type": "linear", "factor": 2.0})


@pytest.fixture
def _one_map() -> Iterator[None]:
    with registered():
        yield


@pytest.mark.usefixtures("_one_map")
def test_a_third_algorithm_is_a_line_in_the_registry(build: Callable[..., BaseGPTModel], tmp_path: Path) -> None:
    """Converted, saved, loaded back bit for bit, exported and read back: one file says all that this needs."""
    model = convert(build(), [("one-map", {"one_map_std": 0.5})], seed=3)
    draft = model.one_map
    assert isinstance(draft, OneMapDraft)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "one_map.map.weight",
        "one_map.heads.0.weight",
    ]
    assert 0.4 < float(draft.map.weight.detach().std()) < 0.6
    assert torch.equal(draft.heads[0].weight, model.output_layer.weight)
    base, token_ids = MegatronBase(model), torch.arange(5)[None]
    features = base.features(token_ids)
    logits = draft(features.last, base.embed(token_ids + 1))
    assert logits.shape == (5, 1, 103) and logits.isfinite().all()

    record = make_record(model, BaseIdentity(source="a base", fingerprint="a base"))
    save_checkpoint(model, tmp_path / "checkpoint", record)
    checkpoint = find_checkpoint(tmp_path / "checkpoint")
    assert checkpoint.record.conversion.algorithm == "one-map"
    loaded = load_checkpoint(checkpoint, Layout())
    assert conversion_of(loaded).config == OneMapConfig(one_map_std=0.5)
    saved, again = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)
    assert {name: p.requires_grad for name, p in saved.items()} == {name: p.requires_grad for name, p in again.items()}

    export_draft(loaded, checkpoint.record, tmp_path / "export")
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    assert tensors.keys() == {"projection.weight", "head.0.weight"}
    assert torch.equal(tensors["projection.weight"], draft.map.weight)
    assert torch.equal(tensors["head.0.weight"], draft.heads[0].weight)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["std"] == 0.5
    assert (tmp_path / "export" / "README.md").read_text().count("# One map draft for") == 1
    with pytest.raises(UnsupportedError, match="export_format = 'speculators' has no form for One map drafts"):
        export_draft(loaded, checkpoint.record, tmp_path / "other", export_format="speculators")


@pytest.mark.usefixtures("_one_map")
def test_a_third_algorithm_is_refused_like_the_others(build: Callable[..., BaseGPTModel]) -> None:
    unchanged_after(build(), lambda model: convert(model, "one-mpa"), ConfigError, "did you mean one-map?")
    for mode, d2t, message in (
        (
            [("one-map", {"one_map_sdt": 1.0})],
            None,
            "one-map config: one_map_sdt: unknown field; did you mean one_map_std?",
        ),
        (
            "one-map",
            draft_to_target(),
            "d2t is given, but the draft of a OneMapConfig speaks the base's whole vocabulary",
        ),
    ):
        unchanged_after(build(), lambda model, m=mode, d=d2t: convert(model, m, d2t=d), ConfigError, message)
    assert isinstance(convert(build(), {"one_map_std": 1.0}).one_map, OneMapDraft)
    unfrozen = convert(build(), {"one_map_freeze": False})
    assert all(parameter.requires_grad for parameter in unfrozen.parameters())


@pytest.mark.usefixtures("_one_map")
def test_the_command_line_knows_a_third_algorithm() -> None:
    given = ("--load", "base", "--save", "out", "--export-algorithm", "one-map")

    def parse(*words: str) -> ConvertArguments:
        return parse_arguments(ConvertArguments, words, prog="prog", description="What it does.")

    arguments = parse(*given, "--algorithm-config", "one.json", "--seed", "3")
    assert (arguments.export_algorithm, arguments.algorithm_config) == ("one-map", Path("one.json"))
    for flag, owner in (
        ("--eagle-config", "eagle"),
        ("--export-num-medusa-heads", "medusa"),
        ("--draft-vocab-cache", "eagle"),
    ):
        with pytest.raises(
            ConfigError, match=rf"{flag} \(for {owner}\) would be ignored with --export-algorithm one-map"
        ):
            parse(*given, flag, "2")


def test_a_checkpoint_of_an_algorithm_that_is_not_there(build: Callable[..., BaseGPTModel], tmp_path: Path) -> None:
    with registered():
        model = convert(build(), "one-map")
        save_checkpoint(model, tmp_path, make_record(model, BaseIdentity(source="a base", fingerprint="a base")))
    with pytest.raises(
        CheckpointError, match=r"mcore_spec.json: conversion: algorithm 'one-map' is not known; choose one"
    ):
        load_checkpoint(find_checkpoint(tmp_path), Layout())


def test_every_line_of_the_registry_is_an_algorithm() -> None:
    """What a line says can be imported, and its flags are the command's."""
    for name, registered_algorithm in ALGORITHMS.items():
        assert isinstance(find_algorithm(name), Algorithm)
        assert set(registered_algorithm.flags) <= ConvertArguments.model_fields.keys()


def test_errors_about_a_configuration_show_no_chain(build: Callable[..., BaseGPTModel]) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(build(), [("medusa", {"medusa_num_heads": 0})])
    shown = "".join(traceback.format_exception(caught.value))
    assert "pydantic" not in shown.replace(str(Path(pydantic.__file__).parent), "") and "direct cause" not in shown

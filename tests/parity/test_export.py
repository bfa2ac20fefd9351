"""An exported draft, read as an engine reads it, computes what the module computes.

The engine's side is `tests.reference.engine`: plain safetensors, `config.json`, transformers' base. The
module's side is megatron-core's base and our draft, on one rank, two tensor-parallel ones and two stages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from mcore_spec.parallel.layout import Layout
from tests.parity.export_cases import CHAIN
from tests.parity.hf_models import LLAMA3, SIZES, YARN, randomise
from tests.pool import RankPool
from tests.reference import engine

pytestmark = pytest.mark.parallel
CASES = "tests.parity.export_cases"
LAYOUTS = {"TP1": Layout(), "TP2": Layout(tensor=2), "PP2": Layout(pipeline=2)}
# float64 on both sides: what remains is the order of sums.
TOLERANCE = 1e-10
NUM_LAYERS = 8
DEFAULT_AUX = [1, 3, 4]
TARGETS = [0, 1, 5, 8, 13, 20, 21, 34, 35, 50, 55, 60, 61, 62, 70, 77, 80, 88, 89, 95, 100, 101, 102]

BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama3": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "yarn_tied": (LlamaConfig, {"rope_parameters": YARN, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "head_dim": 16}),
    "qwen2": (Qwen2Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}


class Case(NamedTuple):
    """A draft: on which base, asked for how, and what of it must be seen in `config.json`."""

    base: str
    mode: Any
    expected: dict[str, Any] = {}
    is_reduced: bool = False


def eagle3(base: str, *, expected: dict[str, Any] | None = None, is_reduced: bool = False, **architecture: Any) -> Case:
    values = {"use_aux_hidden_state": True, "use_last_layernorm": True, **architecture}
    return Case(
        base,
        [("eagle", {"eagle_architecture_config": values})],
        architecture if expected is None else expected,
        is_reduced,
    )


CASE_TABLE: dict[str, Case] = {
    "eagle3": eagle3("llama3"),
    "eagle3-own-head": eagle3("yarn_tied", expected={}, has_lm_head=True),
    "eagle3-reduced": eagle3("yarn_tied", is_reduced=True),
    "eagle3-own-shape": eagle3(
        "qwen3",
        expected={
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "intermediate_size": 20,
            "rms_norm_eps": 0.01,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_theta": 777.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
        },
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=20,
        rms_norm_eps=0.01,
        attention_bias=True,
        mlp_bias=True,
        rope_theta=777.0,
    ),
    "eagle3-norm-before-fc": eagle3(
        "llama3", is_reduced=True, norm_before_residual=True, norm_before_fc=True, norm_output=True
    ),
    "eagle3-fc-norm-2-layers": eagle3("llama3", is_reduced=True, fc_norm=True, norm_output=True, num_hidden_layers=2),
    "eagle3-2-layers": eagle3("yarn_tied", num_hidden_layers=2, norm_before_residual=True),
    # The first and the last layer: boundary 8 is the last layer's output, before the final norm.
    "eagle3-other-layers": eagle3(
        "llama3",
        expected={
            "eagle_aux_hidden_state_layer_ids": [1, 7, 8],
            "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [0, 6, 7]},
        },
        eagle_aux_hidden_state_layer_ids=(0, 6, 7),
    ),
    "eagle1": Case("llama3", [("eagle", {"eagle_architecture_config": {"use_input_layernorm_in_first_layer": False}})]),
    "eagle1-2-layers": Case(
        "yarn_tied",
        [
            (
                "eagle",
                {"eagle_architecture_config": {"use_input_layernorm_in_first_layer": False, "num_hidden_layers": 2}},
            )
        ],
        {"num_hidden_layers": 2},
    ),
    "mtp-qwen3": Case(
        "qwen3",
        [("eagle", {"eagle_architecture_config": {"use_mtp_layernorm": True, "use_last_layernorm": True}})],
        {"qk_norm": True, "base_family": "qwen3", "reads_before_final_norm": False},
    ),
    "mtp-qwen2": Case(
        "qwen2",
        [("eagle", {"eagle_architecture_config": {"use_mtp_layernorm": True, "use_last_layernorm": True}})],
        {"qkv_bias": True, "base_family": "qwen2", "reads_before_final_norm": True},
    ),
    "medusa": Case("llama3", [("medusa", {"medusa_num_heads": 3, "medusa_num_layers": 2})]),
    "medusa-reduced": Case(
        "llama3",
        [("medusa", {"medusa_num_heads": 3, "medusa_num_layers": 2})],
        {"draft_vocab_size": len(TARGETS)},
        is_reduced=True,
    ),
    "medusa-tied": Case("yarn_tied", [("medusa", {"medusa_num_heads": 4})], {"num_heads": 4, "num_hidden_layers": 1}),
}


# --- directories ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of eight layers in float64, so that three aux layers differ and two stages have four each."""
    root = tmp_path_factory.mktemp("bases")
    for index, (name, (config_class, changes)) in enumerate(BASES.items()):
        config = config_class(**{**SIZES, "num_hidden_layers": NUM_LAYERS, **changes})
        model = AutoModelForCausalLM.from_config(config).double()
        randomise(model, torch.Generator().manual_seed(100 + index))
        model.save_pretrained(root / name)
    return {name: root / name for name in BASES}


@pytest.fixture(scope="module")
def token_ids() -> Tensor:
    """[b, s + CHAIN]."""
    return torch.randint(103, (2, 7 + CHAIN), generator=torch.Generator().manual_seed(5))


def d2t_of(targets: list[int]) -> Tensor:
    return torch.tensor(targets) - torch.arange(len(targets))


class Exported(NamedTuple):
    """The directories of one case by layout, and what the module computed there."""

    directories: dict[str, Path]
    outputs: dict[str, dict[str, Any]]
    base: Path


@pytest.fixture(scope="module", params=CASE_TABLE)
def exported(request, bases, token_ids, rank_pool: RankPool, tmp_path_factory) -> Exported:
    case = CASE_TABLE[request.param]
    root = tmp_path_factory.mktemp(request.param)
    outputs = {}
    for name, layout in LAYOUTS.items():
        by_rank = rank_pool.run(
            f"{CASES}:export_and_run",
            world_size=layout.tensor * layout.pipeline,
            base_directory=bases[case.base],
            directory=root / name,
            layout=layout,
            mode=case.mode,
            d2t=d2t_of(TARGETS) if case.is_reduced else None,
            token_ids=token_ids,
        )
        outputs[name] = by_rank[-1]
    return Exported({name: root / name for name in LAYOUTS}, outputs, bases[case.base])


@pytest.fixture
def case(request) -> Case:
    return CASE_TABLE[request.node.callspec.params["exported"]]


# --- what an engine computes ----------------------------------------------------------------------


def test_an_engine_computes_what_the_module_computes(exported: Exported, token_ids: Tensor) -> None:
    """Logits of three steps over given tokens, and three tokens drafted one after the other over a cache."""
    base = engine.Base.load(exported.base, torch.float64)
    draft = engine.load(exported.directories["TP1"], base)
    num_rows = token_ids.shape[1] - CHAIN
    features = draft.features(base, token_ids[:, :num_rows])
    embeddings = [base.embed(token_ids[:, 1 + step : 1 + step + num_rows]) for step in range(CHAIN)]
    logits = draft.logits(features, embeddings)
    proposals = draft.propose(base, features, token_ids[:, : num_rows + 1], CHAIN)
    chain = torch.stack([proposal.token_ids for proposal in proposals])
    assert chain.unique().numel() > 1, "a draft that always says the same would equal many"
    for layout, output in exported.outputs.items():
        assert len(output["logits"]) == len(logits)
        for step, expected in enumerate(logits):
            assert expected.abs().max() > 0.1
            difference = (output["logits"][step] - expected).abs().max().item()
            assert difference <= TOLERANCE, f"{layout}, step {step}: logits differ by {difference}"
        assert torch.equal(output["chain"], chain), layout
    # Serving over a cache comes to the same as training over rows, at the row that both have.
    torch.testing.assert_close(proposals[0].logits, logits[0][-1], rtol=TOLERANCE, atol=TOLERANCE)


def test_every_layout_writes_the_same_bytes(exported: Exported) -> None:
    contents = {
        name: {file.name: file.read_bytes() for file in directory.iterdir()}
        for name, directory in exported.directories.items()
    }
    assert {"config.json", "model.safetensors", "README.md", "mcore_spec_export.json"} <= contents["TP1"].keys()
    for name in ("TP2", "PP2"):
        assert contents[name].keys() == contents["TP1"].keys()
        different = [file for file, data in contents[name].items() if data != contents["TP1"][file]]
        assert not different, f"{name} differs from TP1 in {different}"


# --- what is written ------------------------------------------------------------------------------


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def test_the_configuration_says_everything_and_nothing_else(exported: Exported, case: Case) -> None:
    """Every key that an engine reads, with its value; a key that nobody asked for is an error too."""
    base = read_config(exported.base)
    common = {
        "hidden_size": 32,
        "vocab_size": 103,
        "max_position_embeddings": base["max_position_embeddings"],
        "torch_dtype": "float64",
        "dtype": "float64",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    assert common["max_position_embeddings"] == 4096
    if "medusa" in case.mode[0][0]:
        medusa = {"architectures": ["MedusaModel"], "model_type": "medusa", "num_heads": 3, "num_hidden_layers": 2}
        fixed = {"medusa_fc_bias": True, "max_paths": 64, "topk": 10}
        assert read_config(exported.directories["TP1"]) == {**common, **medusa, **fixed, **case.expected}
        return
    rope = {**base["rope_parameters"]}
    rope_type, theta = rope["rope_type"], rope["rope_theta"]
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    layers = {
        "model_type": "llama",
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": base["head_dim"] if base.get("head_dim") else 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": theta,
        "rope_scaling": None if rope_type == "default" else scaling,
        "rope_parameters": rope,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    architecture = case.mode[0][1]["eagle_architecture_config"]
    if architecture.get("use_aux_hidden_state"):
        own = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": len(TARGETS) if case.is_reduced else 103,
            "norm_before_residual": False,
            "norm_before_fc": False,
            "fc_norm": False,
            "norm_output": False,
            "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in DEFAULT_AUX],
            "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": DEFAULT_AUX},
        }
    elif architecture.get("use_mtp_layernorm"):
        own = {
            "architectures": ["EagleMTPModel"],
            "model_type": "eagle_mtp",
            "qkv_bias": False,
            "qk_norm": False,
            "num_nextn_predict_layers": 1,
        }
    else:
        own = {"architectures": ["LlamaForCausalLM"]}
    assert read_config(exported.directories["TP1"]) == {**common, **layers, **own, **case.expected}


LAYER_NAMES = {
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
}
MIDLAYER = {f"midlayer.{name}" for name in LAYER_NAMES | {"hidden_norm.weight"}}
EAGLE3_NAMES = {"fc.weight", "norm.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("exported", "names"),
    [
        ("eagle3", EAGLE3_NAMES | MIDLAYER),
        ("eagle3-own-head", EAGLE3_NAMES | MIDLAYER),
        ("eagle3-reduced", EAGLE3_NAMES | MIDLAYER | {"d2t"}),
        ("eagle3-norm-before-fc", EAGLE3_NAMES | MIDLAYER | {"d2t", "input_norm.weight"}),
        (
            "eagle3-fc-norm-2-layers",
            EAGLE3_NAMES
            | {"d2t", "layers.0.hidden_norm.weight", *(f"fc_norm.{index}.weight" for index in range(3))}
            | {f"layers.{layer}.{name}" for layer in range(2) for name in LAYER_NAMES},
        ),
        ("eagle1", {"fc.weight"} | {f"layers.0.{name}" for name in LAYER_NAMES - {"input_layernorm.weight"}}),
        (
            "medusa",
            {f"lm_heads.{head}.weight" for head in range(3)}
            | {
                f"blocks.{head}.layers.{block}.{kind}"
                for head in range(3)
                for block in range(2)
                for kind in ("weight", "bias")
            },
        ),
    ],
    indirect=["exported"],
)
def test_tensors_have_the_names_that_engines_know(exported: Exported, names: set[str]) -> None:
    """No embedding (the base's is shared), no t2d (TensorRT-LLM stops at it), no layers.0 (SGLang drops it)."""
    tensors = load_file(exported.directories["TP1"] / "model.safetensors")
    assert set(tensors) == names
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        name: torch.int64 if name == "d2t" else torch.float64 for name in names
    }
    if "d2t" in names:
        assert (torch.arange(len(TARGETS)) + tensors["d2t"]).tolist() == TARGETS


@pytest.mark.parametrize("exported", ["eagle3-reduced", "eagle3-2-layers", "medusa"], indirect=True)
def test_the_card_says_how_to_serve(exported: Exported, case: Case) -> None:
    card = (exported.directories["TP1"] / "README.md").read_text()
    assert f"vllm serve {exported.base} --speculative-config" in card
    if "medusa" in case.mode[0][0]:
        assert '"method": "medusa"' in card
        return
    assert '"method": "eagle3"' in card
    assert f"trtllm-serve {exported.base} --extra_llm_api_options" in card
    # SGLang drops what it does not know: only what it reads comes with its command.
    is_plain = case.expected.get("num_hidden_layers", 1) == 1
    assert (f"--model-path {exported.base} --speculative-algorithm EAGLE3" in card) == is_plain
    assert ("known to be read by vLLM only" in card) != is_plain


# --- what is refused ------------------------------------------------------------------------------

EAGLE3_MODE = eagle3("llama3").mode
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,
}
MEDUSA_MODE = CASE_TABLE["medusa"].mode
REFUSALS: dict[str, tuple[Any, bool, str, str, list[str]]] = {
    # name: mode, reduced, damage, format, parts of the message
    "d2t never filled": (EAGLE3_MODE, True, "d2t never filled", "hf", ["d2t", "23", "--draft-vocab-cache"]),
    "d2t out of range": (EAGLE3_MODE, True, "d2t out of range", "speculators", ["d2t", "23", "--draft-vocab-cache"]),
    "unsorted layers": (
        EAGLE3_MODE,
        False,
        "unsorted layers",
        "hf",
        ["eagle_aux_hidden_state_layer_ids = [4, 1, 3]", "not sorted", "convert again"],
    ),
    "longrope": (
        eagle3("llama3", rope_scaling={**LONGROPE, "attention_factor": 1.5}).mode,
        False,
        "none",
        "hf",
        ["rope_scaling of type 'longrope'", "1.5", "max_position_embeddings"],
    ),
    "activation": (
        eagle3("llama3", hidden_act="gelu").mode,
        False,
        "none",
        "hf",
        ["hidden_act = 'gelu'", "silu only", "convert again"],
    ),
    "heads": (
        eagle3("llama3", num_attention_heads=6, head_dim=4).mode,
        False,
        "none",
        "hf",
        ["num_attention_heads = 6", "hidden_size = 32", "convert again"],
    ),
    "format": (MEDUSA_MODE, False, "none", "speculators", ["export_format = 'speculators'", "Medusa", "choose hf"]),
    "parallel heads": (
        eagle3("llama3", parallel_draft_step=2).mode,
        False,
        "none",
        "speculators",
        ["export_format = 'speculators' with parallel_draft_step = 2", "choose hf"],
    ),
    "no draft": (None, False, "none", "hf", ["no draft", "convert it first", "--export-extra-modules"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_would_not_serve_is_refused_on_every_rank(
    refusal, layout, bases, rank_pool: RankPool, tmp_path: Path
) -> None:
    """A stage without the draft must not wait for the one that refuses, and nothing is left behind."""
    mode, is_reduced, damage, export_format, parts = REFUSALS[refusal]
    messages = rank_pool.run(
        f"{CASES}:refused_export",
        world_size=LAYOUTS[layout].tensor * LAYOUTS[layout].pipeline,
        base_directory=bases["llama3"],
        directory=tmp_path / "export",
        layout=LAYOUTS[layout],
        mode=mode,
        d2t=d2t_of(TARGETS) if is_reduced else None,
        damage=damage,
        export_format=export_format,
        timeout=90,
    )
    for message in messages:
        assert [part for part in parts if part not in message] == [], message
    assert list(tmp_path.iterdir()) == []

"""EAGLE-MTP in MiMo's layout: base and layer as one model, read back tensor by tensor and computed by the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from mcore_spec.config import EagleConfig, eagle_preset
from mcore_spec.config.quantization import find_recipe
from mcore_spec.drafts.resolve import resolve_eagle
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.parallel.layout import Layout
from mcore_spec.weights.hf_config import describe_hf, without_mtp
from tests.parity.export_cases import CHAIN
from tests.parity.hf_models import randomise
from tests.pool import RankPool
from tests.reference.drafts import eagle_mtp
from tests.reference.engine import Base, shape_of
from tests.tiny import base_architecture, write_hf_model

CASES = "tests.parity.export_mimo_cases"
LAYOUTS = {"TP1": Layout(), "TP2": Layout(tensor=2), "PP2": Layout(pipeline=2)}
# Where the checkpoints of MiMo-7B have them; engines put "mtp_block." before the layer's own.
OUTER = {"enorm": "token_layernorm", "hnorm": "hidden_layernorm", "eh_proj": "input_proj", "norm": "final_layernorm"}
PREFIX = "model.mtp_layers.0."
# float64; sums in another order.
TOLERANCE = 1e-9


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base_directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Qwen2Config(
        vocab_size=103, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=request.param,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).double()
    randomise(model, torch.Generator().manual_seed(3))
    directory = tmp_path_factory.mktemp("base")
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def token_ids() -> Tensor:
    return torch.randint(103, (2, 7 + CHAIN), generator=torch.Generator().manual_seed(5))


def export(rank_pool: RankPool, base: Path, directory: Path, layout: Layout, **options: Any) -> list[Any]:
    return rank_pool.run(
        f"{CASES}:export_whole",
        world_size=layout.tensor * layout.pipeline,
        base_directory=base,
        directory=directory,
        layout=layout,
        **options,
    )


def test_an_engine_of_mimo_computes_what_the_module_computes(
    rank_pool: RankPool, base_directory: Path, tmp_path: Path, token_ids: Tensor
) -> None:
    contents = []
    for name, layout in LAYOUTS.items():
        outputs = export(rank_pool, base_directory, tmp_path / name, layout, token_ids=token_ids)[-1]
        _check_written(tmp_path / name, base_directory, outputs, token_ids)
        contents.append({name: tensor.tolist() for name, tensor in _tensors(tmp_path / name).items()})
    assert contents[0] == contents[1] == contents[2]


def _tensors(directory: Path) -> dict[str, Tensor]:
    """Of all files; each pipeline stage writes its own."""
    found: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def _check_written(directory: Path, base_directory: Path, outputs: dict[str, Any], token_ids: Tensor) -> None:
    """The files alone, by transformers and the oracle."""
    files = {file.name for file in directory.iterdir()}
    assert {"README.md", "config.json", "draft.safetensors", "mcore_spec_export.json"} < files
    assert ("model.safetensors" in files) != ("model.safetensors.index.json" in files)
    config, given = (json.loads((each / "config.json").read_text()) for each in (directory, base_directory))
    assert config == {**given, "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    # A program that knows nothing of the layer loads the base.
    base = Base.load(directory, torch.float64)
    original = Base.load(base_directory, torch.float64)
    assert torch.equal(base.head, original.head)
    tensors = load_file(directory / "draft.safetensors")
    head = tensors.pop("lm_head.weight", None)
    assert (head is not None) == config["tie_word_embeddings"]
    if head is not None:
        assert torch.equal(head, original.head)
    inner = {f"{theirs}.weight": f"{ours}.weight" for ours, theirs in OUTER.items()}
    weights = {}
    for name, tensor in tensors.items():
        assert name.startswith(PREFIX)
        short = name.removeprefix(PREFIX)
        weights[inner.get(short, f"layers.0.{short}")] = tensor
    assert {"eh_proj.weight", "layers.0.self_attn.q_proj.bias", "layers.0.mlp.down_proj.weight"} <= weights.keys()
    assert len(weights) == 4 + 12
    num_rows = token_ids.shape[1] - CHAIN
    layers, _ = base.hidden_states(token_ids[:, :num_rows])
    embeddings = [base.embed(token_ids[:, 1 + step : 1 + step + num_rows]) for step in range(CHAIN)]
    shape = shape_of({**config, "head_dim": 8, "rope_theta": 10000.0, "rope_scaling": None})
    shape = shape.__class__(**{**vars(shape), "num_layers": 1})
    steps = eagle_mtp(weights, shape, layers[-1], embeddings, base.head, is_mimo=True)
    for ours, theirs in zip(outputs["logits"], steps, strict=True):
        torch.testing.assert_close(ours, theirs.logits, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_base_in_several_files_names_the_layer_in_its_list(
    rank_pool: RankPool, base_directory: Path, tmp_path: Path
) -> None:
    export(rank_pool, base_directory, tmp_path / "out", Layout(), max_file_bytes=20_000)
    places = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: file for name, file in places.items() if name.startswith(PREFIX)}
    assert len(found) == 16
    assert set(found.values()) == {"draft.safetensors"}
    assert len(set(places.values())) > 2


REFUSALS = {
    "several layers": ({"num_hidden_layers": 2}, "needs num_hidden_layers = 1, this draft has 2"),
    "another width": ({"intermediate_size": 64}, "needs intermediate_size = 48, this draft has 64"),
    "another rope": ({"rope_theta": 500.0}, "needs rope = "),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_layout_cannot_say_is_refused(
    name: str, rank_pool: RankPool, base_directory: Path, tmp_path: Path
) -> None:
    changes, message = REFUSALS[name]
    results = export(
        rank_pool, base_directory, tmp_path / "out", Layout(tensor=2), architecture=changes, is_refused=True
    )
    for result in results:
        assert message in result
    assert list(tmp_path.iterdir()) == []


def test_the_layer_alone_is_no_model(rank_pool: RankPool, base_directory: Path, tmp_path: Path) -> None:
    (result,) = export(rank_pool, base_directory, tmp_path / "out", Layout(), is_refused=True, is_alone=True)
    assert "export_format = 'mimo' is base and draft in one model" in result


def test_a_quantised_base_would_declare_scales_of_the_layer(
    rank_pool: RankPool, base_directory: Path, tmp_path: Path
) -> None:
    recipe = find_recipe("fp8_per_channel").model_copy(update={"exclude": ("eagle_module.*",)})
    results = export(rank_pool, base_directory, tmp_path / "out", Layout(pipeline=2), recipe=recipe, is_refused=True)
    for result in results:
        assert "export_format = 'mimo' of a quantised base: its declaration would cover the draft's layer" in result
    assert list(tmp_path.iterdir()) == []


def test_which_state_is_read_follows_the_base() -> None:
    config = EagleConfig.parse(eagle_preset("eagle-mtp")["config"])

    def layers(given: EagleConfig = config, **base: Any) -> tuple[int, ...]:
        resolved = resolve_eagle(given, base_architecture(**base))
        return resolved.eagle_architecture_config.eagle_aux_hidden_state_layer_ids

    assert layers() == ()
    assert layers(family="qwen3", qk_norm=True) == ()
    assert layers(family="qwen2", qkv_bias=True) == (5,)
    assert layers(family="megatron", qkv_bias=True) == (5,)
    flags = eagle_preset("eagle-mtp")["config"]["eagle_architecture_config"]

    def asked(ids: list[int]) -> EagleConfig:
        return EagleConfig.parse({"eagle_architecture_config": {**flags, "eagle_aux_hidden_state_layer_ids": ids}})

    assert layers(asked([5])) == (5,)
    with pytest.raises(ConfigError, match=r"\[1, 5\] with eagle-mtp, which reads one state: give \[5\]"):
        layers(asked([1, 5]))


def test_other_bases_have_no_such_layout(rank_pool: RankPool, tmp_path: Path) -> None:
    base = write_hf_model(tmp_path / "base", "qwen3", tied=False)
    (result,) = export(rank_pool, base, tmp_path / "out", Layout(), is_refused=True)
    assert result.startswith(UnsupportedError.__name__)
    assert "with a base of the family qwen3" in result


def test_a_draft_starts_as_the_layer_that_its_base_has(
    rank_pool: RankPool, base_directory: Path, tmp_path: Path
) -> None:
    export(rank_pool, base_directory, tmp_path / "mimo", Layout())
    raw = json.loads((tmp_path / "mimo" / "config.json").read_text())
    plain = without_mtp({**raw, "attention_bias": True, "auto_map": {"AutoConfig": "x"}, "model_type": "mimo"})
    given = json.loads((base_directory / "config.json").read_text())
    assert describe_hf(plain, where="x") == describe_hf(given, where="x")
    tensors = load_file(tmp_path / "mimo" / "draft.safetensors")
    inner = {f"{theirs}.weight": f"{ours}.weight" for ours, theirs in OUTER.items()}
    expected = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    expected = {inner.get(name, f"layers.0.{name}"): tensor for name, tensor in expected.items()}
    for layout in LAYOUTS.values():
        found = rank_pool.run(
            f"{CASES}:start_as_mtp",
            world_size=layout.tensor * layout.pipeline,
            base_directory=base_directory,
            directory=tmp_path / "mimo",
            layout=layout,
        )
        assert found[-1].keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[-1][name], tensor), name
    for result in rank_pool.run(
        f"{CASES}:start_as_mtp",
        world_size=2,
        base_directory=base_directory,
        directory=tmp_path / "mimo",
        layout=Layout(tensor=2),
        architecture={"intermediate_size": 64},
    ):
        assert "is not one layer of this draft's sizes: 0.mlp.down_proj.weight, 0.mlp.gate_proj.weight" in result

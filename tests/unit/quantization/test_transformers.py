"""The same recipes on a transformers model with a draft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import mcore_spec
from mcore_spec.config.quantization import KV_CACHE_FP8, RECIPES, find_recipe
from mcore_spec.quantization.installed import install, quantization_of, unquantized
from mcore_spec.quantization.modes import learn_scales, round_weights
from tests.reference import quantized_engine
from tests.tiny import VOCAB_SIZE, write_hf_model

TOKENS = torch.randint(VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("base"), "llama", tied=False)


def drafted(directory: Path, algorithm: str = "eagle") -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    return mcore_spec.convert(model, [(algorithm, {})])


def see(model: nn.Module) -> None:
    model(input_ids=TOKENS, labels=TOKENS)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found


def test_a_quantised_model_computes_with_rounded_weights_and_inputs(directory: Path, tmp_path: Path) -> None:
    model = drafted(directory).eval()
    names, before = [name for name, _ in model.named_parameters()], logits(model)
    assert mcore_spec.quantize(model, "fp8_per_channel") is model
    assert [name for name, _ in model.named_parameters()] == names
    found = logits(model)
    with unquantized(model):
        assert torch.equal(logits(model), before)
    # The exported draft says how inputs are rounded; the base's linear maps are rounded alike.
    mcore_spec.export_speculative_decoding(model, export_dir=tmp_path / "draft")
    read = quantized_engine.read(tmp_path / "draft")
    rounding = read.inputs["fc"]
    plain: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            amax = module.weight.detach().abs().amax(dim=1, keepdim=True)
            scale = (amax.float() / 448).double()
            module.weight.data = (module.weight / scale).float().to(torch.float8_e4m3fn).double() * scale
            module.register_forward_pre_hook(lambda _m, args: (rounding(args[0]), *args[1:]))
    torch.testing.assert_close(found, logits(plain), rtol=1e-9, atol=1e-9)
    assert float((found - before).abs().max()) > 1e-3
    weight = model.eagle_module.get_parameter("layers.0.mlp.up_proj.weight")
    quantization = quantization_of(model)
    assert quantization is not None
    with torch.no_grad():
        expected = quantization.of("eagle_module.layers.0.mlp.up_proj").weight(weight)
    assert torch.equal(read.weights["midlayer.mlp.up_proj.weight"], expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_that_are_rounded_once_give_the_same(recipe: str, directory: Path) -> None:
    model = drafted(directory).eval()
    mcore_spec.quantize(model, recipe, see if find_recipe(recipe).is_calibrated else None)
    quantization = quantization_of(model)
    assert quantization is not None
    expected = logits(model)
    with torch.no_grad():
        weights = {
            target.name: quantizer.weight(target.weight) for target, quantizer in quantization.linear_quantizers()
        }
    round_weights(model)
    for target, quantizer in quantization.linear_quantizers():
        assert torch.equal(target.weight, weights[target.name])
        # Rounded a second time it would be another one, or might be: nothing looks at it again.
        quantizer.weight.stored()[0].fill_(torch.nan)
    assert torch.equal(logits(model), expected)
    round_weights(model)
    assert torch.equal(logits(model), expected)
    with pytest.raises(AssertionError, match="its weights are as they were"), unquantized(model):
        pass


def test_scales_stay_what_they_are_in_a_shorter_dtype(directory: Path, tmp_path: Path) -> None:
    model = mcore_spec.quantize(drafted(directory), "fp8", see)
    quantization = quantization_of(model)
    assert quantization is not None
    before = {name: scale.clone() for name, scale in quantization.state_dict().items()}
    model.to(torch.bfloat16)
    assert model.model.norm.weight.dtype is torch.bfloat16
    after = quantization.state_dict()
    assert after.keys() == before.keys()
    assert all(scale.dtype is torch.float32 and torch.equal(after[name], scale) for name, scale in before.items())
    mcore_spec.export_speculative_decoding(model, export_dir=tmp_path / "draft")
    read = quantized_engine.read(tmp_path / "draft")
    assert torch.equal(
        read.scales["midlayer.mlp.up_proj.weight_scale"].reshape(1),
        before["linears.eagle_module/layers/0/mlp/up_proj.weight.scale_0"],
    )


def test_scales_that_were_learned_go_on_when_it_is_said(directory: Path) -> None:
    before = mcore_spec.quantize(drafted(directory), "int8_per_channel")
    learn_scales(before)
    record = quantization_of(before)
    assert record is not None and record.record.has_learned_scales
    model = drafted(directory)
    quantization = install(model, record.record)
    learned = list(quantization.parameters())
    assert learned and not any(parameter.requires_grad for parameter in learned)
    learn_scales(model)
    assert all(parameter.requires_grad for parameter in learned)


def test_a_printed_model_says_what_is_quantised_and_how(directory: Path) -> None:
    model = drafted(directory)
    recipe = find_recipe("fp8_per_channel").model_copy(update={"exclude": ("model.layers.0.*",)})
    mcore_spec.quantize(model, recipe)
    lines = [line.strip() for line in repr(quantization_of(model)).splitlines()]
    assert "fp8_per_channel, include=['*'], exclude=['model.layers.0.*']" in lines
    scheme = "weight e4m3 per channel; activation e4m3 per token, dynamic"
    assert f"(model/layers/1/mlp/up_proj): {scheme}" in lines and f"(eagle_module/fc): {scheme}" in lines
    assert not any("layers/0/mlp" in line and "model/" in line and "eagle" not in line for line in lines)


def test_a_draft_learns_on_it(directory: Path) -> None:
    model = drafted(directory)
    mcore_spec.quantize(model, "fp8", see)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(8):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_refusals(directory: Path, tmp_path: Path) -> None:
    model = drafted(directory)
    with pytest.raises(mcore_spec.ConfigError, match="did you mean fp8_blockwise"):
        mcore_spec.quantize(model, "fp8_blockwize")
    with pytest.raises(mcore_spec.ConfigError, match="give conversations"):
        mcore_spec.quantize(model, "fp8")
    with pytest.raises(mcore_spec.ConfigError, match="leave calibration out"):
        mcore_spec.quantize(model, "int8_per_channel", see)
    with pytest.raises(mcore_spec.ConfigError, match="was never computed"):
        mcore_spec.quantize(model, "fp8", lambda _model: None)
    once = iter([TOKENS])
    with pytest.raises(mcore_spec.ConfigError, match="and 0 when the conversations ran a second time"):
        mcore_spec.quantize(
            model, "fp8", lambda live: [live(input_ids=each, labels=each) for each in once], calibration="percentile"
        )
    with pytest.raises(mcore_spec.ConfigError, match=r"medusa_heads.* is zero everywhere.*--quant-exclude"):
        mcore_spec.quantize(drafted(directory, "medusa"), "int8_per_channel")
    offloaded = drafted(directory)
    offloaded.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(mcore_spec.UnsupportedError, match=r"layers.1.mlp.up_proj is offloaded"):
        mcore_spec.quantize(offloaded, "int8_per_channel")
    recipe = find_recipe("fp8").model_copy(update={"kv_cache": KV_CACHE_FP8})
    with pytest.raises(mcore_spec.UnsupportedError, match="quantised by its engine alone"):
        mcore_spec.quantize(model, recipe, see)
    assert quantization_of(model) is None
    mcore_spec.quantize(model, "fp8", see)
    with pytest.raises(mcore_spec.ConfigError, match="quantised already"):
        mcore_spec.quantize(model, "fp8", see)
    with pytest.raises(mcore_spec.UnsupportedError, match="which this form does not say"):
        mcore_spec.save(model, tmp_path / "draft")
    assert not (tmp_path / "draft").exists()

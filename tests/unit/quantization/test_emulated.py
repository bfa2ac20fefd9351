"""Products with rounded weights that are not kept: against rounding that autograd keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import mcore_spec
from mcore_spec.config.quantization import RECIPES, find_recipe
from mcore_spec.parallel.tensor_parallel import TensorParallel
from mcore_spec.quantization.emulated import rounded_linear
from mcore_spec.quantization.quantizers import WeightQuantizer
from tests.tiny import VOCAB_SIZE, write_hf_model

# No multiple of a block's 128.
INPUTS, OUTPUTS = 200, 136


def make_case(name: str) -> tuple[WeightQuantizer, list[nn.Parameter], Tensor, Tensor]:
    """A quantiser whose scales cut off some numbers; weight, bias and scales; an input; its output's gradient."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight, bias = nn.Parameter(drawn(OUTPUTS, INPUTS)), nn.Parameter(drawn(OUTPUTS))
    scheme = find_recipe(name).weight
    parts = [torch.arange(1, OUTPUTS, 2), torch.arange(0, OUTPUTS, 2)]
    quantizer = WeightQuantizer(scheme, weight, cut=None, tp=TensorParallel(), parts=parts, name="map")
    quantizer.set_amax([amax / 2 for amax in quantizer.amax(weight)])
    scales = quantizer.learn(scheme.number, num_behind=1, group=None, dtype=torch.float64)
    return quantizer, [weight, bias, *scales.values()], drawn(2, 7, INPUTS).requires_grad_(), drawn(2, 7, OUTPUTS)


@pytest.mark.parametrize("name", RECIPES)
def test_outputs_and_gradients_are_those_of_a_weight_that_is_kept(name: str) -> None:
    quantizer, parameters, x, grad = make_case(name)
    weight, bias = parameters[:2]
    kept = F.linear(x, quantizer(weight), bias)
    expected = torch.autograd.grad(kept, [x, *parameters], grad)
    output = rounded_linear(x, weight, bias, quantizer)
    assert torch.equal(output, kept)
    for found, wanted in zip(torch.autograd.grad(output, [x, *parameters], grad), expected, strict=True):
        assert float(wanted.abs().max()) > 0
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12 * float(wanted.abs().max()))
    assert bool((expected[1] == 0).any()), "nothing was cut off"


@pytest.mark.parametrize("trained", ["x", "weight", "bias", "scales"])
def test_each_gradient_alone(trained: str) -> None:
    """A frozen base, a draft with fixed scales: what nobody wants is not made."""
    quantizer, (weight, bias, *scales), x, grad = make_case("fp8_per_channel")
    named: dict[str, list[Tensor]] = {"x": [x], "weight": [weight], "bias": [bias], "scales": [*scales]}
    for name, tensors in named.items():
        for tensor in tensors:
            tensor.requires_grad_(name == trained)
    expected = torch.autograd.grad(F.linear(x, quantizer(weight), bias), named[trained], grad)
    found = torch.autograd.grad(rounded_linear(x, weight, bias, quantizer), named[trained], grad)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_under_autocast() -> None:
    quantizer, parameters, x, grad = make_case("fp8")
    x, grad = x.detach().float().requires_grad_(), grad.bfloat16()
    weight, bias, scale = (nn.Parameter(each.detach().float()) for each in parameters)
    quantizer.register_parameter(next(iter(quantizer.learned())), scale)
    with torch.autocast("cpu", torch.bfloat16):
        kept = F.linear(x, quantizer(weight), bias)
        output = rounded_linear(x, weight, bias, quantizer)
    assert output.dtype is torch.bfloat16 and torch.equal(output, kept)
    sources = [x, weight, bias, scale]
    expected = torch.autograd.grad(kept, sources, grad)
    for found, wanted in zip(torch.autograd.grad(output, sources, grad), expected, strict=True):
        assert found.dtype is torch.float32
        # Sums of bfloat16 numbers.
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", RECIPES)
def test_a_training_step_keeps_no_copy_of_a_weight(name: str, tmp_path: Path) -> None:
    """In none of the draft's steps, of which each would have its own."""
    base = write_hf_model(tmp_path, "llama", tied=False)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    mcore_spec.convert(model, [("eagle", {"eagle_architecture_config": {"intermediate_size": 1000}})])
    tokens = torch.randint(VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(4))
    loop = (lambda live: live(input_ids=tokens, labels=tokens)) if find_recipe(name).is_calibrated else None
    mcore_spec.quantize(model, name, loop)
    model.train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    copies: list[Tensor] = []
    weights: list[Tensor] = []

    def look(saved: Tensor) -> Tensor:
        if sorted(saved.shape) == sorted(model.eagle_module.get_parameter("layers.0.mlp.up_proj.weight").shape):
            (weights if saved.untyped_storage().data_ptr() in own else copies).append(saved)
        return saved

    with saved_tensors_hooks(look, lambda saved: saved):
        loss = model(input_ids=tokens, labels=tokens).loss
    assert weights and not copies
    loss.backward()

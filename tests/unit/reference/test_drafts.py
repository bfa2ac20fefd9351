"""The reference drafts against transformers' layers, against an engine-like decoder and by hand.

transformers' RMSNorm computes in float32, which would hide everything below 1e-7: its layers run here in
float64 with torch's RMSNorm in that place.
"""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, Qwen3Config
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from tests.reference.drafts import (
    ACTIVATIONS,
    Shape,
    StepOutput,
    Weights,
    eagle1,
    eagle3,
    eagle3_serve,
    eagle_mtp,
    medusa,
    rotate,
)

EPS = 1e-5
ROUNDING = 1e-12  # float64, sums of a few dozen terms of order 1, in another order.
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN_ROPE = DEFAULT_ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def random(generator: torch.Generator, *size: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*size, generator=generator, dtype=torch.float64) * scale


def decoder_weights(
    generator: torch.Generator,
    shape: Shape,
    h: int,
    ffn: int,
    first_width: int,
    *,
    bias: bool = False,
    qk_norm: bool = False,
) -> Weights:
    """Random decoder layers of width h; layer 0's attention reads `first_width`."""
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    weights: Weights = {}
    for layer in range(shape.num_layers):
        width = first_width if layer == 0 else h
        rows = {"q": q, "k": kv, "v": kv}
        matrices = {f"self_attn.{name}_proj": (size, width) for name, size in rows.items()}
        matrices |= {"self_attn.o_proj": (h, q), "mlp.down_proj": (h, ffn)}
        matrices |= {"mlp.gate_proj": (ffn, h), "mlp.up_proj": (ffn, h)}
        norms = {"input_layernorm": h, "post_attention_layernorm": h}
        if qk_norm:
            norms |= {"self_attn.q_norm": shape.head_dim, "self_attn.k_norm": shape.head_dim}
        for name, size in matrices.items():
            weights[f"layers.{layer}.{name}.weight"] = random(generator, *size, scale=0.4)
            if bias:
                weights[f"layers.{layer}.{name}.bias"] = random(generator, size[0], scale=0.4)
        for name, size in norms.items():
            weights[f"layers.{layer}.{name}.weight"] = 1 + random(generator, size, scale=0.2)
    return weights


def eagle3_weights(
    generator: torch.Generator, shape: Shape, h: int, ffn: int, *, num_aux: int, vocab: int, fc_input: str
) -> Weights:
    weights = decoder_weights(generator, shape, h, ffn, 2 * h)
    weights["fc.weight"] = random(generator, h, num_aux * h, scale=0.4)
    weights["layers.0.hidden_norm.weight"] = 1 + random(generator, h, scale=0.2)
    weights["norm.weight"] = 1 + random(generator, h, scale=0.2)
    weights["lm_head.weight"] = random(generator, vocab, h)
    if fc_input == "norm_before_fc":
        weights["input_norm.weight"] = 1 + random(generator, num_aux * h, scale=0.2)
    if fc_input == "fc_norm":
        for j in range(num_aux):
            weights[f"fc_norm.{j}.weight"] = 1 + random(generator, h, scale=0.2)
    return weights


def eagle1_weights(generator: torch.Generator, shape: Shape, h: int, ffn: int) -> Weights:
    weights = decoder_weights(generator, shape, h, ffn, h, bias=True)
    del weights["layers.0.input_layernorm.weight"]
    return weights | {"fc.weight": random(generator, h, 2 * h, scale=0.4)}


def mtp_weights(generator: torch.Generator, shape: Shape, h: int, ffn: int) -> Weights:
    weights = decoder_weights(generator, shape, h, ffn, h, qk_norm=True)
    weights["eh_proj.weight"] = random(generator, h, 2 * h, scale=0.4)
    for name in ("enorm", "hnorm", "norm"):
        weights[f"{name}.weight"] = 1 + random(generator, h, scale=0.2)
    return weights


def shifted(token_embeddings: Tensor, s: int, steps: int) -> list[Tensor]:
    """Of step k: e(x[t+1+k]) in row t."""
    return [token_embeddings[1 + k : 1 + k + s] for k in range(steps)]


def hf_layer(
    layer: nn.Module, weights: Weights, index: int = 0, *, replaced: dict[str, nn.Module] | None = None
) -> nn.Module:
    """A transformers decoder layer in float64 with layer `index` of `weights`, loaded strictly.

    Its RMSNorms become torch's, which keep float64; `replaced` swaps further modules first.
    """
    for name, module in (replaced or {}).items():
        layer.set_submodule(name, module)
    for name, module in list(layer.named_modules()):
        if module.__class__.__name__.endswith("RMSNorm"):
            layer.set_submodule(name, nn.RMSNorm(module.weight.numel(), eps=EPS))
    layer = layer.double().eval()
    prefix = f"layers.{index}."
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    own.pop("hidden_norm.weight", None)  # EAGLE-3's own, which a transformers layer has no place for.
    layer.load_state_dict(own, strict=True)
    return layer


def hf_forward(
    layer: nn.Module, rope: nn.Module, x: Tensor, start: int = 0, cache: DynamicCache | None = None
) -> Tensor:
    """The layer on x [s, b, h] at positions start.., causal; [s, b, h]."""
    positions = torch.arange(start, start + x.shape[0])[None]
    mask = torch.ones(x.shape[0], start + x.shape[0], dtype=torch.bool).tril(start)[None, None]
    x = x.transpose(0, 1)
    out = layer(x, attention_mask=mask, past_key_values=cache, position_embeddings=rope(x, positions))
    return out.transpose(0, 1)


def llama_config(h: int, ffn: int, *, bias: bool = False) -> LlamaConfig:
    return LlamaConfig(**hf_sizes(h, ffn, DEFAULT_ROPE), attention_bias=bias, mlp_bias=bias)


def hf_sizes(h: int, ffn: int, rope: dict[str, object]) -> dict[str, object]:
    return {
        "hidden_size": h,
        "intermediate_size": ffn,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 128,
        "rms_norm_eps": EPS,
        "rope_parameters": dict(rope),
        "attn_implementation": "sdpa",
    }


def shape_of(rope: nn.Module, **overrides: int) -> Shape:
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6} | overrides
    return Shape(
        **sizes,
        eps=EPS,
        hidden_act="silu",
        inv_freq=rope.inv_freq,
        attention_scaling=rope.attention_scaling,
    )


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fc_input", ["plain", "norm_before_fc", "fc_norm"])
@pytest.mark.parametrize("norm_before_residual", [False, True])
@pytest.mark.parametrize("norm_output", [False, True])
def test_eagle3_rows_are_what_an_engine_computes(fc_input, norm_before_residual, norm_output):
    generator = torch.Generator().manual_seed(1)
    s, b, h, steps, num_aux = 7, 2, 8, 4, 3
    shape = shape_of(LlamaRotaryEmbedding(llama_config(h, 12)), num_layers=2)
    weights = eagle3_weights(generator, shape, h, 12, num_aux=num_aux, vocab=11, fc_input=fc_input)
    aux = random(generator, s, b, num_aux * h)
    token_embeddings = random(generator, s + steps, b, h)
    flags = {"norm_before_residual": norm_before_residual, "norm_output": norm_output}

    trained = eagle3(weights, shape, aux, shifted(token_embeddings, s, steps), **flags)
    assert len(trained) == steps
    for row in (0, 1, 4, 6):
        served = eagle3_serve(weights, shape, aux, token_embeddings, None, row, steps, **flags)
        assert len(served) == steps
        for step in range(steps):
            for name in StepOutput._fields:
                assert_near(getattr(trained[step], name)[row], getattr(served[step], name), ROUNDING)


@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_eagle3_first_step_is_a_wide_llama_layer_and_a_plain_one(norm_before_residual):
    """transformers' attention over [a ; b]; its layer cannot have this residual, which is added here."""
    generator = torch.Generator().manual_seed(2)
    s, b, h, ffn = 6, 2, 8, 12
    config = llama_config(h, ffn)
    rope = LlamaRotaryEmbedding(config)
    shape = shape_of(rope, num_layers=2)
    weights = eagle3_weights(generator, shape, h, ffn, num_aux=2, vocab=11, fc_input="plain")
    sizes = {"q": 24, "k": 12, "v": 12}
    wide = {f"self_attn.{name}_proj": nn.Linear(2 * h, size, bias=False) for name, size in sizes.items()}
    layer = hf_layer(LlamaDecoderLayer(config, 0), weights, replaced=wide)
    further = hf_layer(LlamaDecoderLayer(config, 1), weights, 1)
    hidden_norm = nn.RMSNorm(h, eps=EPS, dtype=torch.float64)
    hidden_norm.load_state_dict({"weight": weights["layers.0.hidden_norm.weight"]})
    aux, embedding, head = random(generator, s, b, 2 * h), random(generator, s, b, h), random(generator, 5, h)

    with torch.no_grad():
        state = aux @ weights["fc.weight"].T
        normed = hidden_norm(state)
        both = torch.cat([layer.input_layernorm(embedding), normed], -1)
        mask = torch.ones(s, s, dtype=torch.bool).tril()[None, None]
        attended, _ = layer.self_attn(
            both.transpose(0, 1),
            position_embeddings=rope(embedding, torch.arange(s)[None]),
            attention_mask=mask,
        )
        u = (normed if norm_before_residual else state) + attended.transpose(0, 1)
        y = hf_forward(further, rope, u + layer.mlp(layer.post_attention_layernorm(u)))
        hidden = nn.functional.rms_norm(y, (h,), weights["norm.weight"], EPS)

    (output,) = eagle3(weights, shape, aux, [embedding], head, norm_before_residual=norm_before_residual)
    assert_near(output.feedback, y, 1e-10)
    assert_near(output.hidden, hidden, 1e-10)
    assert_near(output.logits, hidden @ head.T, 1e-10)
    flags = {"norm_before_residual": norm_before_residual, "norm_output": True}
    (own,) = eagle3(weights, shape, aux, [embedding], **flags)
    assert_near(own.feedback, hidden, 1e-10)
    assert_near(own.logits, hidden @ weights["lm_head.weight"].T, 1e-10)


def test_eagle3_norms_before_fc():
    """A norm in the weights equals an aux that somebody else has normed, without one in the weights."""
    generator = torch.Generator().manual_seed(3)
    h = 8
    shape = shape_of(LlamaRotaryEmbedding(llama_config(h, 12)))
    plain = eagle3_weights(generator, shape, h, 12, num_aux=2, vocab=5, fc_input="plain")
    aux, embeddings = random(generator, 4, 1, 2 * h), [random(generator, 4, 1, h)]
    over_all, of_first, of_second = (random(generator, size) for size in (2 * h, h, h))

    by_one = nn.functional.rms_norm(aux, (2 * h,), over_all, EPS)
    first = nn.functional.rms_norm(aux[..., :h], (h,), of_first, EPS)
    by_each = torch.cat([first, nn.functional.rms_norm(aux[..., h:], (h,), of_second, EPS)], -1)
    each = {"fc_norm.0.weight": of_first, "fc_norm.1.weight": of_second}
    for extra, normed in (({"input_norm.weight": over_all}, by_one), (each, by_each)):
        (actual,) = eagle3(plain | extra, shape, aux, embeddings)
        (expected,) = eagle3(plain, shape, normed, embeddings)
        assert_near(actual.feedback, expected.feedback, ROUNDING)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_eagle1_is_llama_layers_without_the_first_input_norm(num_layers):
    generator = torch.Generator().manual_seed(4)
    s, b, h, ffn = 6, 2, 8, 12
    config = llama_config(h, ffn, bias=True)
    rope = LlamaRotaryEmbedding(config)
    shape = shape_of(rope, num_layers=num_layers)
    weights = eagle1_weights(generator, shape, h, ffn)
    layer = hf_layer(LlamaDecoderLayer(config, 0), weights, replaced={"input_layernorm": nn.Identity()})
    features, embedding, head = (random(generator, *size) for size in ((s, b, h), (s, b, h), (11, h)))

    with torch.no_grad():
        expected = hf_forward(layer, rope, torch.cat([embedding, features], -1) @ weights["fc.weight"].T)
        if num_layers == 2:
            expected = hf_forward(hf_layer(LlamaDecoderLayer(config, 1), weights, 1), rope, expected)
    (output,) = eagle1(weights, shape, features, [embedding], head)
    assert_near(output.hidden, expected, 1e-10)
    assert_near(output.feedback, expected, 1e-10)
    assert_near(output.logits, expected @ head.T, 1e-10)


@pytest.mark.parametrize("rope_parameters", [DEFAULT_ROPE, YARN_ROPE], ids=["default", "yarn"])
def test_mtp_is_a_qwen3_layer(rope_parameters):
    """Step 0 against one causal forward, and four steps of a few rows against transformers' own cache."""
    generator = torch.Generator().manual_seed(5)
    s, b, h, ffn, steps = 6, 2, 8, 12, 4
    config = Qwen3Config(**hf_sizes(h, ffn, rope_parameters), num_hidden_layers=1)
    rope = Qwen3RotaryEmbedding(config)
    shape = shape_of(rope)
    assert (shape.attention_scaling != 1.0) == (rope_parameters is YARN_ROPE)
    weights = mtp_weights(generator, shape, h, ffn)
    layer = hf_layer(Qwen3DecoderLayer(config, 0), weights)
    sizes = ((s, b, h), (s + steps, b, h), (11, h))
    hidden, token_embeddings, head = (random(generator, *size) for size in sizes)

    def norm(name: str, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (h,), weights[f"{name}.weight"], EPS)

    def run(embedding: Tensor, state: Tensor, start: int, cache: DynamicCache | None) -> Tensor:
        x = torch.cat([norm("enorm", embedding), norm("hnorm", state)], -1) @ weights["eh_proj.weight"].T
        return norm("norm", hf_forward(layer, rope, x, start, cache))

    outputs = eagle_mtp(weights, shape, hidden, shifted(token_embeddings, s, steps), head)
    with torch.no_grad():
        expected = run(token_embeddings[1 : 1 + s], hidden, 0, None)
        assert_near(outputs[0].hidden, expected, 1e-10)
        for row in (0, 2, 5):
            cache = DynamicCache()
            state = run(token_embeddings[1 : row + 2], hidden[: row + 1], 0, cache)[-1:]
            for step in range(steps):
                if step:
                    position = row + step
                    state = run(token_embeddings[position + 1 : position + 2], state, position, cache)
                assert_near(outputs[step].hidden[row], state[0], 1e-10)
                assert_near(outputs[step].feedback[row], state[0], 1e-10)
                assert_near(outputs[step].logits[row], state[0] @ head.T, 1e-10)


def test_eagle1_steps_feed_back_the_estimate():
    """HASS: row 0 of three steps is one causal sequence of three inputs, the later features estimated."""
    generator = torch.Generator().manual_seed(6)
    h, ffn, steps = 8, 12, 3
    config = llama_config(h, ffn, bias=True)
    rope = LlamaRotaryEmbedding(config)
    weights = eagle1_weights(generator, shape_of(rope), h, ffn)
    layer = hf_layer(LlamaDecoderLayer(config, 0), weights, replaced={"input_layernorm": nn.Identity()})
    features, token_embeddings, head = (random(generator, *size) for size in ((2, 1, h), (6, 1, h), (5, h)))

    outputs = eagle1(weights, shape_of(rope), features, shifted(token_embeddings, 2, steps), head)
    inputs = [features[0]] + [output.feedback[0].detach() for output in outputs[:-1]]
    x = torch.cat([token_embeddings[1 : 1 + steps], torch.stack(inputs)], -1) @ weights["fc.weight"].T
    with torch.no_grad():
        expected = hf_forward(layer, rope, x)
    assert_near(torch.stack([output.hidden[0] for output in outputs]), expected, 1e-10)


def test_medusa_by_hand():
    """silu(0) = 0, silu(1) = 1 / (1 + 1/e), silu(2) = 2 / (1 + 1/e^2); head 1 is the plain head."""
    weights = {
        "heads.0.blocks.0.linear.weight": torch.tensor([[1.0, 0.0], [0.0, 0.5]]),
        "heads.0.blocks.0.linear.bias": torch.tensor([0.0, 1.0]),
        "heads.0.blocks.1.linear.weight": torch.zeros(2, 2),
        "heads.0.blocks.1.linear.bias": torch.tensor([0.0, 2.0]),
        "heads.0.lm_head.weight": torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, -1.0]]),
        "heads.1.blocks.0.linear.weight": torch.zeros(2, 2),
        "heads.1.blocks.0.linear.bias": torch.zeros(2),
        "heads.1.blocks.1.linear.weight": torch.zeros(2, 2),
        "heads.1.blocks.1.linear.bias": torch.zeros(2),
        "heads.1.lm_head.weight": torch.tensor([[3.0, 0.0], [0.0, 1.0]]),
    }
    weights = {name: value.double() for name, value in weights.items()}
    first, second = medusa(weights, torch.tensor([[[1.0, -2.0]]], dtype=torch.float64), 2, 2)
    z = (1 + 1 / (1 + math.exp(-1)), -2 + 2 / (1 + math.exp(-2)))  # W z + b is (1, 0), then (0, 2).
    assert_near(first, torch.tensor([[[z[0] + z[1], 2 * z[0], -z[1]]]], dtype=torch.float64), ROUNDING)
    assert_near(second, torch.tensor([[[3.0, -2.0]]], dtype=torch.float64), ROUNDING)


def test_rotation_by_hand():
    """Half a turn of pair (0, 2) negates it; a quarter of pair (1, 3) sends (a, b) to (-b, a)."""
    inv_freq = torch.tensor([math.pi, math.pi / 2])
    shape = Shape(1, 1, 4, EPS, "silu", inv_freq, attention_scaling=2.0)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).view(1, 1, 1, 4)
    expected = 2 * torch.tensor([-1.0, -4.0, -3.0, 2.0], dtype=torch.float64).view(1, 1, 1, 4)
    assert_near(rotate(shape, x, [1]), expected, 1e-6)  # the angle is float32
    assert_near(rotate(shape, x, [0]), 2 * x, ROUNDING)


def test_activations_are_those_that_transformers_means():
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    for name, activation in ACTIVATIONS.items():
        assert_near(activation(x), ACT2FN[name](x), ROUNDING)


@pytest.mark.parametrize("draft", ["eagle3", "eagle1", "eagle_mtp", "medusa"])
def test_gradients(draft):
    """Of every weight and input, through two steps, against finite differences."""
    generator = torch.Generator().manual_seed(7)
    h, ffn, s = 4, 3, 3
    shape = Shape(2, 1, 2, EPS, "silu", torch.ones(1))
    first = random(generator, s, 1, 2 * h if draft == "eagle3" else h)
    embeddings = [random(generator, s, 1, h) for _ in range(2)]
    head = random(generator, 3, h)
    if draft == "eagle3":
        weights = eagle3_weights(generator, shape, h, ffn, num_aux=2, vocab=3, fc_input="fc_norm")
    elif draft == "eagle1":
        weights = eagle1_weights(generator, shape, h, ffn)
    elif draft == "eagle_mtp":
        weights = mtp_weights(generator, shape, h, ffn)
    else:
        weights = {"heads.0.lm_head.weight": head}
        for block in range(2):
            weights[f"heads.0.blocks.{block}.linear.weight"] = random(generator, h, h)
            weights[f"heads.0.blocks.{block}.linear.bias"] = random(generator, h)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(weights, tensors[3:], strict=True))
        if draft == "medusa":
            return tuple(medusa(named, tensors[0], 1, 2))
        inputs = tensors[0], list(tensors[1:3])
        if draft == "eagle3":
            outputs = eagle3(named, shape, *inputs)
        else:
            outputs = {"eagle1": eagle1, "eagle_mtp": eagle_mtp}[draft](named, shape, *inputs, head)
        return tuple(output.logits for output in outputs)

    tensors = [first, *embeddings, *weights.values()]
    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in tensors])

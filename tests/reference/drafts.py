"""What the drafts compute, written a second time in plain torch, as an oracle for the package.

Nothing here is shared with `mcore_spec`, and nothing is fast: attention is a loop over rows, each with an
explicit list of the keys that it sees, so that the visibility rule can be read rather than deduced from a
mask. One process, one document per batch entry that starts at position 0, any dtype (float64 in the tests),
differentiable by autograd.

Tensors are [s, b, h], sequence first. Weights are a flat dict of torch-Linear style matrices [out, in]; a
bias, a q/k norm or a norm before `fc` is applied where the dict has one. MLPs are dense: no experts.

Step k of row t reads the embedding of token t+1+k and the feedback of step k-1, and its logits predict token
t+2+k. Test-time training (TTT) runs all rows together; `eagle3_serve` runs one row as an engine does, which
must come to the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True, eq=False)
class Shape:
    """The facts about a draft decoder that its weights do not tell."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    hidden_act: str
    inv_freq: Tensor
    """Rotary frequencies [head_dim / 2], any rope scaling already in them."""
    attention_scaling: float = 1.0
    """Factor of the rotary cosines and sines (yarn and its relatives)."""
    num_layers: int = 1


class StepOutput(NamedTuple):
    """One TTT step: [s, b, ...] for all rows, or [b, ...] for the one row that is served."""

    hidden: Tensor
    """What the head reads."""
    feedback: Tensor
    """The recurrent state that the next step reads."""
    logits: Tensor


class Cache(Protocol):
    """The keys and values that one decoder layer has produced so far."""

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take the rows of a step: two tensors [s, b, kv_heads, head_dim]."""

    def visible(self, row: int, batch: int) -> tuple[list[Tensor], list[Tensor]]:
        """The keys and values [kv_heads, head_dim] that a row of the last appended step sees."""


@dataclass
class TrainingCache:
    """TTT: row t sees the step-0 rows 0..t and itself at every later step so far."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.keys.append(keys)
        self.values.append(values)

    def visible(self, row: int, batch: int) -> tuple[list[Tensor], list[Tensor]]:
        places = [(0, other) for other in range(row + 1)]
        places += [(step, row) for step in range(1, len(self.keys))]
        keys = [self.keys[step][other, batch] for step, other in places]
        values = [self.values[step][other, batch] for step, other in places]
        return keys, values


@dataclass
class ServingCache:
    """An engine: one row a call, which sees everything that is cached, itself included."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.keys += keys.unbind(0)
        self.values += values.unbind(0)

    def visible(self, row: int, batch: int) -> tuple[list[Tensor], list[Tensor]]:
        assert row == 0, f"row is {row}, but a serving step has one row"
        return [key[batch] for key in self.keys], [value[batch] for value in self.values]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def parallel_heads(weights: Weights, hidden: Tensor) -> list[Tensor]:
    """Logits of the heads beside a step's own, which read the same `hidden` [..., h]; none without their weights."""
    found: list[Tensor] = []
    prefix = "parallel_draft_heads"
    while f"{prefix}.medusa_heads.{len(found)}.0.linear.weight" in weights:
        z, block = hidden, 0
        while f"{prefix}.medusa_heads.{len(found)}.{block}.linear.weight" in weights:
            z = z + F.silu(linear(weights, f"{prefix}.medusa_heads.{len(found)}.{block}.linear", z))
            block += 1
        found.append(F.linear(z, weights[f"{prefix}.lm_head.weight"]))
    return found


def rms_norm(weights: Weights, shape: Shape, name: str, x: Tensor) -> Tensor:
    """RMSNorm in the dtype of `x`. (transformers computes it in float32, whatever the input.)"""
    return weights[f"{name}.weight"] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + shape.eps)


def rotate(shape: Shape, x: Tensor, positions: list[int]) -> Tensor:
    """Rotary embedding of x [s, b, heads, head_dim], transformers' rotate-half convention.

    The angles are float32 and the cosines are cast afterwards, as transformers does it.
    """
    angles = torch.tensor(positions, dtype=torch.float32, device=x.device)[:, None]
    angles = angles * shape.inv_freq.to(x.device, torch.float32)
    angles = torch.cat([angles, angles], -1)[:, None, None, :]  # [s, 1, 1, head_dim]
    cos = (angles.cos() * shape.attention_scaling).to(x.dtype)
    sin = (angles.sin() * shape.attention_scaling).to(x.dtype)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def attention(
    weights: Weights,
    shape: Shape,
    name: str,
    x: Tensor,
    positions: list[int],
    cache: Cache,
) -> Tensor:
    """Self-attention of the rows x [s, b, width] at their positions, which join the cache first."""
    s, b, _ = x.shape
    q = linear(weights, f"{name}.q_proj", x).view(s, b, shape.num_heads, shape.head_dim)
    k = linear(weights, f"{name}.k_proj", x).view(s, b, shape.num_kv_heads, shape.head_dim)
    v = linear(weights, f"{name}.v_proj", x).view(s, b, shape.num_kv_heads, shape.head_dim)
    if f"{name}.q_norm.weight" in weights:
        q = rms_norm(weights, shape, f"{name}.q_norm", q)
    if f"{name}.k_norm.weight" in weights:
        k = rms_norm(weights, shape, f"{name}.k_norm", k)
    q, k = rotate(shape, q, positions), rotate(shape, k, positions)
    cache.append(k, v)

    kv_head = [head // (shape.num_heads // shape.num_kv_heads) for head in range(shape.num_heads)]
    rows = []
    for t in range(s):
        for i in range(b):
            key_list, value_list = cache.visible(t, i)
            keys = torch.stack(key_list)[:, kv_head]  # [visible, heads, head_dim]
            values = torch.stack(value_list)[:, kv_head]
            scores = (q[t, i] * keys).sum(-1) / shape.head_dim**0.5  # [visible, heads]
            probabilities = scores.softmax(0)
            rows.append((probabilities[..., None] * values).sum(0).flatten())
    return linear(weights, f"{name}.o_proj", torch.stack(rows).view(s, b, -1))


def mlp(weights: Weights, shape: Shape, name: str, x: Tensor) -> Tensor:
    gate = ACTIVATIONS[shape.hidden_act](linear(weights, f"{name}.gate_proj", x))
    return linear(weights, f"{name}.down_proj", gate * linear(weights, f"{name}.up_proj", x))


def decoder_layer(
    weights: Weights,
    shape: Shape,
    layer: int,
    x: Tensor,
    residual: Tensor,
    positions: list[int],
    cache: Cache,
) -> Tensor:
    """The layer after its input norm: attention reads `x` (of any width), its output joins `residual`."""
    name = f"layers.{layer}"
    u = residual + attention(weights, shape, f"{name}.self_attn", x, positions, cache)
    normed = rms_norm(weights, shape, f"{name}.post_attention_layernorm", u)
    return u + mlp(weights, shape, f"{name}.mlp", normed)


def pre_norm_layers(
    weights: Weights, shape: Shape, first: int, x: Tensor, positions: list[int], caches: list[Cache]
) -> Tensor:
    """The ordinary decoder layers from `first` to the last."""
    for layer in range(first, shape.num_layers):
        normed = rms_norm(weights, shape, f"layers.{layer}.input_layernorm", x)
        x = decoder_layer(weights, shape, layer, normed, x, positions, caches[layer])
    return x


def eagle3_start(weights: Weights, shape: Shape, aux: Tensor) -> Tensor:
    """g_0 [s, b, h] of the concatenated aux hidden states [s, b, n*h]."""
    if "input_norm.weight" in weights:
        assert "fc_norm.0.weight" not in weights, "input_norm and fc_norm are two ways of doing one thing"
        aux = rms_norm(weights, shape, "input_norm", aux)
    elif "fc_norm.0.weight" in weights:
        parts = aux.split(weights["fc_norm.0.weight"].numel(), -1)
        aux = torch.cat([rms_norm(weights, shape, f"fc_norm.{j}", part) for j, part in enumerate(parts)], -1)
    return linear(weights, "fc", aux)


def eagle3_step(
    weights: Weights,
    shape: Shape,
    state: Tensor,
    embedding: Tensor,
    head: Tensor | None,
    positions: list[int],
    caches: list[Cache],
    *,
    norm_before_residual: bool,
    norm_output: bool,
) -> StepOutput:
    """One step of the rows [s, b, h] whose state is g_k and whose input is `embedding`."""
    a = rms_norm(weights, shape, "layers.0.input_layernorm", embedding)
    b = rms_norm(weights, shape, "layers.0.hidden_norm", state)
    residual = b if norm_before_residual else state
    y = decoder_layer(weights, shape, 0, torch.cat([a, b], -1), residual, positions, caches[0])
    y = pre_norm_layers(weights, shape, 1, y, positions, caches)
    hidden = rms_norm(weights, shape, "norm", y)
    logits = F.linear(hidden, weights["lm_head.weight"] if head is None else head)
    return StepOutput(hidden=hidden, feedback=hidden if norm_output else y, logits=logits)


def eagle3(
    weights: Weights,
    shape: Shape,
    aux: Tensor,
    embeddings: list[Tensor],
    head: Tensor | None = None,
    *,
    norm_before_residual: bool = False,
    norm_output: bool = False,
    detaches: bool = False,
) -> list[StepOutput]:
    """EAGLE-3 (arXiv 2503.01840) under TTT.

    aux [s, b, n*h] are the concatenated aux hidden states; embeddings[k] [s, b, h] has e(x[t+1+k]) in row t,
    one for every step. The head is `lm_head.weight` unless one is given.
    """
    caches: list[Cache] = [TrainingCache() for _ in range(shape.num_layers)]
    state = eagle3_start(weights, shape, aux)
    outputs = []
    for step, embedding in enumerate(embeddings):
        output = eagle3_step(
            weights,
            shape,
            state,
            embedding,
            head,
            [t + step for t in range(aux.shape[0])],
            caches,
            norm_before_residual=norm_before_residual,
            norm_output=norm_output,
        )
        outputs.append(output)
        state = output.feedback.detach() if detaches else output.feedback
    return outputs


def eagle3_mixed(
    weights: Weights,
    shape: Shape,
    aux: Tensor,
    embedding: Tensor,
    head: Tensor | None,
    replaced: list[list[bool]],
) -> list[StepOutput]:
    """EAGLE-3 with mixed states: row p reads x[p+1] at every step, sees rows 0..p of its step and predicts x[p+2].

    `embedding` [s, b, h] has e(x[p+1]) in row p. Where `replaced[k][p]`, row p reads from step k + 1 on what row p - 1
    fed back at step k.
    """
    states = list(eagle3_start(weights, shape, aux).unbind(0))
    positions, outputs = list(range(len(states))), []
    for step in range(len(replaced) + 1):
        caches: list[Cache] = [TrainingCache() for _ in range(shape.num_layers)]
        output = eagle3_step(
            weights,
            shape,
            torch.stack(states),
            embedding,
            head,
            positions,
            caches,
            norm_before_residual=False,
            norm_output=False,
        )
        outputs.append(output)
        if step < len(replaced):
            states = [output.feedback[p - 1] if replaced[step][p] else states[p] for p in positions]
    return outputs


def eagle3_serve(
    weights: Weights,
    shape: Shape,
    aux: Tensor,
    token_embeddings: Tensor,
    head: Tensor | None,
    row: int,
    steps: int,
    *,
    norm_before_residual: bool = False,
    norm_output: bool = False,
) -> list[StepOutput]:
    """Draft `steps` tokens after the prefix 0..row as an engine does, over one growing cache.

    token_embeddings [n, b, h] are e(x[0..n)), n > row + steps. The outputs are those of `row`, [b, ...].
    """
    caches: list[Cache] = [ServingCache() for _ in range(shape.num_layers)]
    prefix = eagle3_start(weights, shape, aux)
    outputs: list[StepOutput] = []
    for position in range(row + steps):
        state = prefix[position] if position <= row else outputs[-1].feedback
        output = eagle3_step(
            weights,
            shape,
            state[None],
            token_embeddings[position + 1][None],
            head,
            [position],
            caches,
            norm_before_residual=norm_before_residual,
            norm_output=norm_output,
        )
        if position >= row:
            outputs.append(StepOutput(*(tensor[0] for tensor in output)))
    return outputs


def mixed(one_step: Callable[[Tensor], StepOutput], features: Tensor, replaced: list[list[bool]]) -> list[StepOutput]:
    """Mixed states of a draft whose state has the features' form; rows and `replaced` as in `eagle3_mixed`.

    `one_step` computes step 0 of every row from states [s, b, h].
    """
    states = list(features.unbind(0))
    outputs = []
    for step in range(len(replaced) + 1):
        outputs.append(one_step(torch.stack(states)))
        if step < len(replaced):
            feedback = outputs[-1].feedback
            states = [feedback[p - 1] if replaced[step][p] else state for p, state in enumerate(states)]
    return outputs


def eagle1(
    weights: Weights, shape: Shape, features: Tensor, embeddings: list[Tensor], head: Tensor
) -> list[StepOutput]:
    """EAGLE-1 (arXiv 2401.15077), HASS with several steps: the state is the estimate of the next feature.

    features [s, b, h] are the base's last hidden states after its final norm; embeddings as in `eagle3`.
    """
    caches: list[Cache] = [TrainingCache() for _ in range(shape.num_layers)]
    state, outputs = features, []
    for step, embedding in enumerate(embeddings):
        positions = [t + step for t in range(features.shape[0])]
        x = linear(weights, "fc", torch.cat([embedding, state], -1))
        x = decoder_layer(weights, shape, 0, x, x, positions, caches[0])
        state = pre_norm_layers(weights, shape, 1, x, positions, caches)
        outputs.append(StepOutput(hidden=state, feedback=state, logits=F.linear(state, head)))
    return outputs


def eagle_mtp(
    weights: Weights,
    shape: Shape,
    hidden: Tensor,
    embeddings: list[Tensor],
    head: Tensor,
    *,
    is_mimo: bool = False,
) -> list[StepOutput]:
    """EAGLE-MTP (DeepSeek-V3 style, arXiv 2412.19437): one module applied recurrently.

    hidden [s, b, h] are the base's last hidden states; embeddings as in `eagle3`. The state that the next
    step reads is the output after the final norm, which the head reads too. MiMo's engines read zeros in place of the
    embedding at position 0, and join the state and the embedding in this order.
    """
    caches: list[Cache] = [TrainingCache() for _ in range(shape.num_layers)]
    state, outputs = hidden, []
    for step, embedding in enumerate(embeddings):
        positions = [t + step for t in range(hidden.shape[0])]
        if is_mimo:
            embedding = torch.stack([row if at > 0 else 0 * row for at, row in zip(positions, embedding, strict=True)])
        e = rms_norm(weights, shape, "enorm", embedding)
        joined = [e, rms_norm(weights, shape, "hnorm", state)]
        x = linear(weights, "eh_proj", torch.cat(joined[::-1] if is_mimo else joined, -1))
        x = pre_norm_layers(weights, shape, 0, x, positions, caches)
        state = rms_norm(weights, shape, "norm", x)
        outputs.append(StepOutput(hidden=state, feedback=state, logits=F.linear(state, head)))
    return outputs


def medusa(weights: Weights, hidden: Tensor, num_heads: int, num_layers: int) -> list[Tensor]:
    """Medusa (arXiv 2401.10774): the logits [s, b, v] of each head, of the base's last hidden [s, b, h]."""
    logits = []
    for head in range(num_heads):
        z = hidden
        for block in range(num_layers):
            z = z + F.silu(linear(weights, f"heads.{head}.blocks.{block}.linear", z))
        logits.append(linear(weights, f"heads.{head}.lm_head", z))
    return logits

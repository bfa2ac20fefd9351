"""Causal self-attention of a draft, over training-time-test (TTT) steps.

Row t at step k sees the step-0 keys of rows 0..t and its own row's keys of steps 1..k: what a draft
sees in an engine after k tokens of its own. The step-0 part is one causal attention; the rest is k dot
products a row. The two are merged by their log-sum-exp, so that nothing of size [s, s] is kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from mcore_spec.config import RopeConfig
from mcore_spec.layers.linear import ShardedLinear
from mcore_spec.layers.norm import RMSNorm
from mcore_spec.layers.rotary import RotaryEmbedding, apply_rotary
from mcore_spec.parallel.tensor_parallel import Placement


class KeyValue(NamedTuple):
    """Keys and values of one TTT step, each [s, b, kv heads / size, d]."""

    key: Tensor
    value: Tensor


class AttentionShape(NamedTuple):
    """Whole (unsharded) sizes of an attention block."""

    input_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False


class TTTAttention(nn.Module):
    """Grouped-query attention with rotary positions; heads sharded over the tensor-parallel group."""

    def __init__(
        self,
        shape: AttentionShape,
        rope: RopeConfig,
        *,
        place: Placement,
    ) -> None:
        """Allocate this rank's heads.

        Args:
            shape: whole sizes.
            rope: rotary embedding.
            place: group, dtype and device.
        """
        super().__init__()
        self.shape, self.tp = shape, place.tp
        self.num_local_heads = place.tp.local(shape.num_heads, what="num_attention_heads")
        self.num_local_kv_heads = place.tp.local(shape.num_kv_heads, what="num_key_value_heads")
        query_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        bias = shape.qkv_bias
        self.q_proj = ShardedLinear(shape.input_size, query_size, shard_dim=0, bias=bias, place=place)
        self.k_proj = ShardedLinear(shape.input_size, kv_size, shard_dim=0, bias=bias, place=place)
        self.v_proj = ShardedLinear(shape.input_size, kv_size, shard_dim=0, bias=bias, place=place)
        self.o_proj = ShardedLinear(query_size, shape.hidden_size, shard_dim=1, bias=shape.output_bias, place=place)
        # The norms of single heads stand inside the parallel region: each rank sees other heads of
        # every row, so their gradients are summed over the group with and without sequence parallelism.
        inside = replace(place, tp=replace(place.tp, sequence_parallel=place.tp.size > 1))
        self.q_norm = RMSNorm(shape.head_dim, eps=shape.eps, place=inside) if shape.qk_norm else None
        self.k_norm = RMSNorm(shape.head_dim, eps=shape.eps, place=inside) if shape.qk_norm else None
        self.rotary = RotaryEmbedding(rope, shape.head_dim)

    def forward(self, x: Tensor, *, step: int, past: list[KeyValue]) -> Tensor:
        """One TTT step; appends this step's keys and values to `past`.

        Args:
            x: [s or s/size, b, input_size].
            step: TTT step k; row t has rotary position t + k.
            past: keys and values of steps 0..k-1.

        Returns:
            [s or s/size, b, hidden_size].
        """
        x = self.tp.enter(x)
        query = self._heads(self.q_proj(x), self.num_local_heads)
        key = self._heads(self.k_proj(x), self.num_local_kv_heads)
        value = self._heads(self.v_proj(x), self.num_local_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        length = x.shape[0]
        positions = torch.arange(step, length + step, device=x.device)
        # LongRoPE's table is that of the sequence, so that all steps of a row are rotated alike.
        cos, sin = self.rotary(positions, sequence_length=length, dtype=x.dtype)
        cos, sin = cos[:, None, None, :], sin[:, None, None, :]
        past.append(KeyValue(apply_rotary(key, cos, sin), value))
        mixed = ttt_attention(apply_rotary(query, cos, sin), past)
        output = self.tp.leave(self.o_proj(mixed.flatten(2)))
        if self.o_proj.bias is not None:
            output = output + self.tp.replicated(self.o_proj.bias)
        return output

    def _heads(self, x: Tensor, num_heads: int) -> Tensor:
        return x.unflatten(-1, (num_heads, self.shape.head_dim))


def ttt_attention(query: Tensor, steps: list[KeyValue]) -> Tensor:
    """Attention of the last step's queries; scale 1 / sqrt(d).

    Args:
        query: [s, b, heads, d] of step k.
        steps: keys and values of steps 0..k.

    Returns:
        [s, b, heads, d].
    """
    first = steps[0]
    if len(steps) == 1:
        return _from_bhsd(
            F.scaled_dot_product_attention(
                _to_bhsd(query), _to_bhsd(first.key), _to_bhsd(first.value), is_causal=True, enable_gqa=True
            )
        )
    own_keys = torch.stack([step.key for step in steps[1:]])
    own_values = torch.stack([step.value for step in steps[1:]])
    if query.device.type == "cpu":
        return _MergedAttention.apply(query, first.key, first.value, own_keys, own_values)
    return ttt_attention_reference(query, first, own_keys, own_values)


def ttt_attention_reference(query: Tensor, first: KeyValue, own_keys: Tensor, own_values: Tensor) -> Tensor:
    """The specification: one softmax over step-0 scores [s, s] and the row's own k scores.

    Args:
        query: [s, b, heads, d].
        first: step 0.
        own_keys: [k, s, b, kv heads, d] of steps 1..k.
        own_values: like `own_keys`.
    """
    group = query.shape[2] // first.key.shape[2]
    key, value = (x.repeat_interleave(group, dim=2) for x in first)
    own_keys, own_values = (x.repeat_interleave(group, dim=3) for x in (own_keys, own_values))
    scale = query.shape[-1] ** -0.5
    causal = torch.ones(query.shape[0], key.shape[0], dtype=torch.bool, device=query.device).tril()
    scores = torch.einsum("sbhd,tbhd->bhst", query, key).masked_fill(~causal, float("-inf"))
    own_scores = torch.einsum("sbhd,ksbhd->bhsk", query, own_keys)
    weights = (torch.cat((scores, own_scores), dim=-1) * scale).softmax(dim=-1)
    shared, own = weights.split((key.shape[0], own_keys.shape[0]), dim=-1)
    return torch.einsum("bhst,tbhd->sbhd", shared, value) + torch.einsum("bhsk,ksbhd->sbhd", own, own_values)


def _to_bhsd(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3)


def _from_bhsd(x: Tensor) -> Tensor:
    return x.permute(2, 0, 1, 3)


class _MergedAttention(Function):
    """Flash attention on step-0 keys, merged with the row's own keys by log-sum-exp (host kernels).

    The flash kernel's backward needs only the output and the log-sum-exp of the whole softmax: called
    with the merged ones it gives exactly the step-0 part of the gradients. The own part is written out:
    with p = exp(score - lse), d score = p (dO . v - dO . O).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, own_keys: Tensor, own_values: Tensor) -> Tensor:
        q, k, v = _to_bhsd(query), _to_bhsd(key), _to_bhsd(value)
        shared, shared_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        scale = query.shape[-1] ** -0.5
        grouped = _grouped(query, key.shape[2])
        own_scores = torch.einsum("sbghd,ksbgd->ksbgh", grouped, own_keys) * scale
        # The kernel's log-sum-exp is [b, heads, s] and at least float32.
        shared_lse = shared_lse.permute(2, 0, 1).unflatten(2, grouped.shape[2:4])
        wide_scores = own_scores.to(shared_lse.dtype)
        lse = torch.logsumexp(torch.cat((shared_lse[None], wide_scores)), dim=0)
        own_weights = (wide_scores - lse).exp().to(query.dtype)
        shared_weight = (shared_lse - lse).exp().to(query.dtype)[..., None]
        output = shared_weight * _grouped(_from_bhsd(shared), key.shape[2])
        output = output + torch.einsum("ksbgh,ksbgd->sbghd", own_weights, own_values)
        ctx.save_for_backward(query, key, value, own_keys, own_values, output, lse, own_weights)
        return output.flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, own_keys, own_values, output, lse, own_weights = ctx.saved_tensors
        num_groups, scale = key.shape[2], query.shape[-1] ** -0.5
        d_query, d_key, d_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _to_bhsd(grads[0]).contiguous(),
            *(_to_bhsd(x) for x in (query, key, value)),
            _to_bhsd(output.flatten(2, 3)).contiguous(),
            lse.flatten(2, 3).permute(1, 2, 0).contiguous(),
            0.0,
            True,
        )
        grad = _grouped(grads[0], num_groups)
        delta = (grad * output).sum(-1)
        d_scores = own_weights * (torch.einsum("sbghd,ksbgd->ksbgh", grad, own_values) - delta) * scale
        d_query = _from_bhsd(d_query) + torch.einsum("ksbgh,ksbgd->sbghd", d_scores, own_keys).flatten(2, 3)
        d_own_keys = torch.einsum("ksbgh,sbghd->ksbgd", d_scores, _grouped(query, num_groups))
        d_own_values = torch.einsum("ksbgh,sbghd->ksbgd", own_weights, grad)
        return d_query, _from_bhsd(d_key), _from_bhsd(d_value), d_own_keys, d_own_values


def _grouped(x: Tensor, num_groups: int) -> Tensor:
    """[s, b, heads, d] -> [s, b, kv heads, heads of each, d]."""
    return x.unflatten(2, (num_groups, -1))

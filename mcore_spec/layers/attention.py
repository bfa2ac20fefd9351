"""Causal self-attention of a draft, over training-time-test (TTT) steps; `layers.cache` has the rows of serving.

Row t at step k sees the step-0 keys of rows 0..t and its own row's keys of steps 1..k: what a draft
sees in an engine after k tokens of its own. The step-0 part is one causal attention for each document; the
rest is k dot products a row. The parts are merged by their log-sum-exp (`layers.flash`). Under context
parallelism a rank has some rows: step-0 keys are joined over the ranks, later keys stay with their row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mcore_spec.config import RopeConfig
from mcore_spec.layers.flash import Kernel, attend, from_bhsd, to_bhsd
from mcore_spec.layers.linear import ShardedLinear
from mcore_spec.layers.norm import RMSNorm
from mcore_spec.layers.rotary import RotaryEmbedding, apply_rotary
from mcore_spec.parallel.collectives import group_size
from mcore_spec.parallel.documents import Documents, Piece
from mcore_spec.parallel.tensor_parallel import Placement


class KeyValue(NamedTuple):
    """Keys and values of one TTT step, each [s, b, kv heads / size, d]."""

    key: Tensor
    value: Tensor


class Places(NamedTuple):
    """Where rows stand, each int64 [rows].

    Attributes:
        positions: rotary positions inside of their sequences.
        lengths: of the sequences, which choose LongRoPE's table.
    """

    positions: Tensor
    lengths: Tensor


class Rows(Protocol):
    """What a layer is told about its rows: in training the rows of one TTT step, in serving rows with a cache."""

    def places(self, num_rows: int, device: torch.device) -> Places:
        """Where the layer's rows stand, on `device`."""
        ...

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of rotated queries [s, b, heads, d] over what each row sees; keys and values are remembered.

        Args:
            query: rotated.
            key: rotated, [s, b, kv heads, d] of the same rows.
            value: like `key`.
        """
        ...


class TTTRows:
    """The rows of one TTT step of one layer."""

    def __init__(self, *, step: int, past: Sequence[KeyValue], documents: Documents | None = None) -> None:
        """Take what the steps before left.

        Args:
            step: TTT step k; the row at position t of its document has rotary position t + k.
            past: keys and values of steps 0..k-1; those of step 0 are of the whole row.
            documents: which rows see each other, of which these are this context-parallel rank's; ``None``: each
                of the b columns is one document.
        """
        self.step, self.documents = step, documents
        self.steps = list(past)

    def places(self, num_rows: int, device: torch.device) -> Places:
        """Positions moved on by the step. LongRoPE's table is the document's: all steps of a row rotate alike."""
        if self.documents is None:
            positions = torch.arange(num_rows, device=device)
            return Places(positions + self.step, torch.full_like(positions, num_rows))
        assert num_rows == self.documents.num_local_rows, "x is this rank's part of one packed row"
        _, positions, lengths = self.documents.local_rows(device)
        return Places(positions + self.step, lengths)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention over step 0 and the row's own later steps; appends this step to `steps`."""
        assert self.documents is None or query.shape[1] == 1, "documents lie in one packed row"
        own = KeyValue(key, value)
        self.steps.append(own if self.step or self.documents is None else join_rows(own, self.documents))
        return ttt_attention(query, self.steps, documents=self.documents)


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

    def forward(self, x: Tensor, *, rows: Rows) -> Tensor:
        """Attention of the rows in `x`.

        Args:
            x: [s or s/size, b, input_size].
            rows: where they stand, what they see and where their keys and values are kept.

        Returns:
            [s or s/size, b, hidden_size].
        """
        x = self.tp.enter(x)
        query = self._heads(self.q_proj(x), self.num_local_heads)
        key = self._heads(self.k_proj(x), self.num_local_kv_heads)
        value = self._heads(self.v_proj(x), self.num_local_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        positions, lengths = rows.places(x.shape[0], x.device)
        cos, sin = self.rotary(positions, sequence_length=lengths, dtype=x.dtype)
        cos, sin = cos[:, None, None, :], sin[:, None, None, :]
        mixed = rows.attend(apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value)
        output = self.tp.leave(self.o_proj(mixed.flatten(2)))
        if self.o_proj.bias is not None:
            output = output + self.tp.replicated(self.o_proj.bias)
        return output

    def _heads(self, x: Tensor, num_heads: int) -> Tensor:
        return x.unflatten(-1, (num_heads, self.shape.head_dim))


def join_rows(own: KeyValue, documents: Documents) -> KeyValue:
    """This context-parallel rank's rows -> the whole row, in one exchange; gradients of all ranks are summed."""
    if group_size(documents.group) == 1:
        return own
    return KeyValue(*documents.join(torch.cat(own, dim=2), with_grad=True).chunk(2, dim=2))


def ttt_attention(
    query: Tensor,
    steps: Sequence[KeyValue],
    *,
    documents: Documents | None = None,
    kernel: Kernel | None = None,
) -> Tensor:
    """Attention of the last step's queries; scale 1 / sqrt(d).

    Args:
        query: [s, b, heads, d] of step k; with `documents` this rank's rows, b = 1.
        steps: keys and values of steps 0..k, [s, b, kv heads, d]; with `documents` step 0 has the whole row.
        documents: which rows see each other; ``None``: each of the b columns is one document.
        kernel: of the step-0 part; ``None``: the fastest there is.

    Returns:
        [s, b, heads, d].
    """
    first, *own = steps
    if documents is None or documents.is_single:
        pieces: tuple[Piece, ...] = (Piece(0, query.shape[0], 0, query.shape[0], True),)
    else:
        pieces = documents.pieces
    if len(steps) == 1 and len(pieces) == 1 and kernel is None:
        q, k, v = (to_bhsd(x) for x in (query, first.key, first.value))
        return from_bhsd(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    return attend(
        query,
        first.key,
        first.value,
        pieces=pieces,
        own_keys=[step.key for step in own],
        own_values=[step.value for step in own],
        kernel=kernel,
    )


def ttt_attention_reference(
    query: Tensor, first: KeyValue, own_keys: Tensor, own_values: Tensor, *, documents: Documents | None = None
) -> Tensor:
    """The specification: one softmax over step-0 scores [s, s] and the row's own k scores.

    Args:
        query: [s, b, heads, d], whole rows: there is no context parallelism here.
        first: step 0.
        own_keys: [k, s, b, kv heads, d] of steps 1..k.
        own_values: like `own_keys`.
        documents: rows see earlier rows of their document; ``None``: each of the b columns is one document.
    """
    group = query.shape[2] // first.key.shape[2]
    key, value = (x.repeat_interleave(group, dim=2) for x in first)
    own_keys, own_values = (x.repeat_interleave(group, dim=3) for x in (own_keys, own_values))
    scale = query.shape[-1] ** -0.5
    visible = torch.ones(query.shape[0], key.shape[0], dtype=torch.bool, device=query.device).tril()
    if documents is not None:
        ends = torch.tensor(documents.bounds[1:], device=query.device)
        number = torch.bucketize(torch.arange(query.shape[0], device=query.device), ends, right=True)
        visible = visible & (number[:, None] == number)
    scores = torch.einsum("sbhd,tbhd->bhst", query, key).masked_fill(~visible, float("-inf"))
    own_scores = torch.einsum("sbhd,ksbhd->bhsk", query, own_keys)
    weights = (torch.cat((scores, own_scores), dim=-1) * scale).softmax(dim=-1)
    shared, own = weights.split((key.shape[0], own_keys.shape[0]), dim=-1)
    return torch.einsum("bhst,tbhd->sbhd", shared, value) + torch.einsum("bhsk,ksbhd->sbhd", own, own_values)

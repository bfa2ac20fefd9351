"""Causal attention computed in pieces and merged by log-sum-exp; nothing of size [s, s] is kept.

A row's softmax may run over keys that lie apart: its own chunk (a triangle), earlier chunks of its document
(a rectangle), and keys that only this row sees. Each part is computed alone; with l the log-sum-exp of all
scores and l_i that of a part, the output is sum_i exp(l_i - l) output_i. Backward, a flash kernel needs only the
output and the log-sum-exp of the whole softmax: given the merged ones it returns exactly its part of the
gradients (Dao, arXiv 2307.08691, section 3.1: they enter through P = exp(S - l) and rowsum(dO * O) alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mcore_spec.parallel.documents import Piece

# What torch's flash kernels for CUDA take (aten/src/ATen/native/transformers/cuda/flash_attn).
CUDA_DTYPES = (torch.bfloat16, torch.float16)
CUDA_MAX_HEAD_DIM, CUDA_HEAD_DIM_MULTIPLE = 256, 8
CUDA_CAPABILITY = (8, 0)


class Flash(NamedTuple):
    """Attention of some queries over some keys.

    Attributes:
        output: [b, heads, s, d].
        lse: log-sum-exp of each query's scaled scores, [b, heads, s], at least float32.
        saved: what the kernel's own backward wants back.
    """

    output: Tensor
    lse: Tensor
    saved: tuple[Any, ...] = ()


class Gradients(NamedTuple):
    """Gradients in the shapes of query, key and value."""

    query: Tensor
    key: Tensor
    value: Tensor


class Kernel(Protocol):
    """One attention without dropout: query [b, heads, s, d]; key and value [b, kv heads, t, d], heads shared evenly.

    Where `is_causal`, s = t and query i sees keys 0..i; otherwise every query sees every key.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float) -> Flash:
        """Output and log-sum-exp."""

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, flash: Flash, *, is_causal: bool, scale: float
    ) -> Gradients:
        """Gradients of these keys' part of a softmax whose whole output and log-sum-exp are in `flash`."""


class HostKernel:
    """torch's flash kernels for the host: float64, float32, bfloat16 and float16."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float) -> Flash:
        """Output and log-sum-exp."""
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, scale=scale
        )
        return Flash(*found)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, flash: Flash, *, is_causal: bool, scale: float
    ) -> Gradients:
        """Gradients of these keys' part of the softmax in `flash`."""
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad,
            query,
            key,
            value,
            flash.output,
            flash.lse,
            0.0,
            is_causal,
            scale=scale,
        )
        return Gradients(*found)


class CudaKernel:
    """torch's flash kernels for CUDA; they share key heads themselves, backward too."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float) -> Flash:
        """Output and log-sum-exp; the rest, sequence bounds and random state, goes back as it came."""
        output, lse, *rest = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, False, scale=scale
        )
        return Flash(output, lse, tuple(rest[:6]))

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, flash: Flash, *, is_causal: bool, scale: float
    ) -> Gradients:
        """Gradients of these keys' part of the softmax in `flash`."""
        *bounds, seed, offset = flash.saved
        found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad,
            query,
            key,
            value,
            flash.output,
            # The op makes the others contiguous itself, and takes this one for so.
            flash.lse.contiguous(),
            *bounds,
            0.0,
            is_causal,
            seed,
            offset,
            scale=scale,
        )
        return Gradients(*found)


class ReadableKernel:
    """The formulas, with scores [s, t] of one piece at a time; any device and dtype, in float32 or better."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float) -> Flash:
        """Output and log-sum-exp."""
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = _scores(query.to(wide), key.to(wide), is_causal=is_causal, scale=scale)
        output = torch.einsum("bghst,bgtd->bghsd", scores.softmax(-1), value.to(wide))
        return Flash(output.flatten(1, 2).to(query.dtype), scores.logsumexp(-1).flatten(1, 2))

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, flash: Flash, *, is_causal: bool, scale: float
    ) -> Gradients:
        """Gradients of these keys' part of the softmax in `flash`: d score = p (dO . v - dO . O)."""
        wide, groups = flash.lse.dtype, key.shape[1]
        q, k, v = query.to(wide), key.to(wide), value.to(wide)
        d_output = grad.to(wide).unflatten(1, (groups, -1))
        delta = (d_output * flash.output.to(wide).unflatten(1, (groups, -1))).sum(-1, keepdim=True)
        lse = flash.lse.unflatten(1, (groups, -1)).unsqueeze(-1)
        weights = (_scores(q, k, is_causal=is_causal, scale=scale) - lse).exp()
        d_scores = weights * (torch.einsum("bghsd,bgtd->bghst", d_output, v) - delta) * scale
        d_query = torch.einsum("bghst,bgtd->bghsd", d_scores, k).flatten(1, 2)
        d_key = torch.einsum("bghst,bghsd->bgtd", d_scores, q.unflatten(1, (groups, -1)))
        d_value = torch.einsum("bghst,bghsd->bgtd", weights, d_output)
        return Gradients(*(x.to(query.dtype) for x in (d_query, d_key, d_value)))


def _scores(query: Tensor, key: Tensor, *, is_causal: bool, scale: float) -> Tensor:
    """[b, kv heads, heads of each, s, t]; what a query does not see is -inf."""
    scores = torch.einsum("bghsd,bgtd->bghst", query.unflatten(1, (key.shape[1], -1)), key) * scale
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores


def kernel_for(query: Tensor) -> Kernel:
    """The fastest kernel that takes queries [..., d] of this device, dtype and width."""
    if query.device.type == "cpu":
        return HostKernel()
    if query.device.type == "cuda" and query.dtype in CUDA_DTYPES:
        fits = query.shape[-1] <= CUDA_MAX_HEAD_DIM and query.shape[-1] % CUDA_HEAD_DIM_MULTIPLE == 0
        if fits and torch.cuda.get_device_capability(query.device) >= CUDA_CAPABILITY:
            return CudaKernel()
    return ReadableKernel()


class _Plan(NamedTuple):
    kernel: Kernel
    pieces: Sequence[Piece]
    scale: float


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pieces: Sequence[Piece],
    own_keys: Sequence[Tensor] = (),
    own_values: Sequence[Tensor] = (),
    scale: float | None = None,
    kernel: Kernel | None = None,
) -> Tensor:
    """Attention over shared keys, piece by piece, and over keys that only the row itself sees.

    Args:
        query: [s, b, heads, d].
        key: [t, b, kv heads, d].
        value: like `key`.
        pieces: which keys the queries see; every query is in at least one piece.
        own_keys: each [s, b, kv heads, d]; row i of a query sees row i alone.
        own_values: like `own_keys`.
        scale: of the scores; ``None``: 1 / sqrt(d).
        kernel: of the pieces; ``None``: the fastest there is.

    Returns:
        [s, b, heads, d].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    plan = _Plan(kernel_for(query) if kernel is None else kernel, pieces, scale)
    return _Attend.apply(plan, query, key, value, *own_keys, *own_values)


def to_bhsd(x: Tensor) -> Tensor:
    """[s, b, heads, d] -> [b, heads, s, d]."""
    return x.permute(1, 2, 0, 3)


def from_bhsd(x: Tensor) -> Tensor:
    """[b, heads, s, d] -> [s, b, heads, d]."""
    return x.permute(2, 0, 1, 3)


def _forward_pieces(plan: _Plan, query: Tensor, key: Tensor, value: Tensor) -> Flash:
    """All pieces of [b, heads, s, d], merged; `saved` has one entry a piece."""
    chunks, saved = [], []
    for (start, stop), pieces in groupby(plan.pieces, key=lambda piece: (piece.start, piece.stop)):
        parts = []
        for piece in pieces:
            keys = slice(piece.key_start, piece.key_stop)
            parts.append(
                plan.kernel.forward(
                    query[:, :, start:stop],
                    key[:, :, keys],
                    value[:, :, keys],
                    is_causal=piece.is_causal,
                    scale=plan.scale,
                )
            )
        saved += [part.saved for part in parts]
        chunks.append(_merge(parts))
    if len(chunks) == 1:
        return Flash(chunks[0].output, chunks[0].lse, tuple(saved))
    output = torch.cat([chunk.output for chunk in chunks], dim=2)
    return Flash(output, torch.cat([chunk.lse for chunk in chunks], dim=2), tuple(saved))


def _merge(parts: list[Flash]) -> Flash:
    """The same queries over several sets of keys; sums in the dtype of the log-sum-exp."""
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([part.lse for part in parts]).logsumexp(0)
    output = torch.stack([(part.lse - lse).exp().unsqueeze(-1) * part.output for part in parts]).sum(0)
    return Flash(output.to(parts[0].output.dtype), lse)


def _backward_pieces(plan: _Plan, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, whole: Flash) -> Gradients:
    """Gradients of all pieces; `whole` is the merged softmax with the pieces' `saved`."""
    if len(plan.pieces) == 1:
        flash = whole._replace(saved=whole.saved[0])
        return plan.kernel.backward(
            grad, query, key, value, flash, is_causal=plan.pieces[0].is_causal, scale=plan.scale
        )
    # A key may stand in several pieces: its terms are added in the dtype of the log-sum-exp.
    sums = Gradients(*(torch.zeros_like(x, dtype=whole.lse.dtype) for x in (query, key, value)))
    for piece, saved in zip(plan.pieces, whole.saved, strict=True):
        rows, keys = slice(piece.start, piece.stop), slice(piece.key_start, piece.key_stop)
        part = plan.kernel.backward(
            grad[:, :, rows],
            query[:, :, rows],
            key[:, :, keys],
            value[:, :, keys],
            Flash(whole.output[:, :, rows], whole.lse[:, :, rows], saved),
            is_causal=piece.is_causal,
            scale=plan.scale,
        )
        sums.query[:, :, rows] += part.query
        sums.key[:, :, keys] += part.key
        sums.value[:, :, keys] += part.value
    return Gradients(*(x.to(query.dtype) for x in sums))


class _Attend(Function):
    """The pieces through their kernel; the row's own keys written out, d score = p (dO . v - dO . O)."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, query: Tensor, key: Tensor, value: Tensor, *own: Tensor) -> Tensor:
        flash = _forward_pieces(plan, to_bhsd(query), to_bhsd(key), to_bhsd(value))
        ctx.plan, ctx.saved = plan, flash.saved
        shared = from_bhsd(flash.output)
        if not own:
            ctx.save_for_backward(query, key, value, shared, flash.lse)
            return shared
        own_keys, own_values = _stacks(own)
        grouped = _grouped(query, key.shape[2])
        own_scores = torch.einsum("sbghd,ksbgd->ksbgh", grouped, own_keys) * plan.scale
        shared_lse = flash.lse.permute(2, 0, 1).unflatten(2, grouped.shape[2:4])
        wide_scores = own_scores.to(shared_lse.dtype)
        lse = torch.logsumexp(torch.cat((shared_lse[None], wide_scores)), dim=0)
        own_weights = (wide_scores - lse).exp().to(query.dtype)
        shared_weight = (shared_lse - lse).exp().to(query.dtype)[..., None]
        merged = shared_weight * _grouped(shared, key.shape[2])
        merged = merged + torch.einsum("ksbgh,ksbgd->sbghd", own_weights, own_values)
        output = merged.flatten(2, 3)
        lse = lse.flatten(2, 3).permute(1, 2, 0)
        # The own keys and values are saved as they came: their stacks would be new memory at every step.
        ctx.save_for_backward(query, key, value, output, lse, own_weights, *own)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, *rest = ctx.saved_tensors
        plan, grad = ctx.plan, grads[0]
        whole = Flash(to_bhsd(output), lse, ctx.saved)
        found = _backward_pieces(plan, to_bhsd(grad), to_bhsd(query), to_bhsd(key), to_bhsd(value), whole)
        d_query, d_key, d_value = (from_bhsd(x) for x in found)
        if not rest:
            return None, d_query, d_key, d_value
        own_weights, *own = rest
        own_keys, own_values = _stacks(own)
        num_groups = key.shape[2]
        grouped_grad = _grouped(grad, num_groups)
        delta = (grouped_grad * _grouped(output, num_groups)).sum(-1)
        d_scores = torch.einsum("sbghd,ksbgd->ksbgh", grouped_grad, own_values) - delta
        d_scores = own_weights * d_scores * plan.scale
        d_query = d_query + torch.einsum("ksbgh,ksbgd->sbghd", d_scores, own_keys).flatten(2, 3)
        d_own_keys = torch.einsum("ksbgh,sbghd->ksbgd", d_scores, _grouped(query, num_groups))
        d_own_values = torch.einsum("ksbgh,sbghd->ksbgd", own_weights, grouped_grad)
        return None, d_query, d_key, d_value, *d_own_keys.unbind(), *d_own_values.unbind()


def _stacks(own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """k keys and then k values -> keys and values, each [k, s, b, kv heads, d]."""
    half = len(own) // 2
    return torch.stack(tuple(own[:half])), torch.stack(tuple(own[half:]))


def _grouped(x: Tensor, num_groups: int) -> Tensor:
    """[s, b, heads, d] -> [s, b, kv heads, heads of each, d]."""
    return x.unflatten(2, (num_groups, -1))

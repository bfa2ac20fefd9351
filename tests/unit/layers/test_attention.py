"""The merged attention kernel against its specification, and the specification against a loop over rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mcore_spec.layers.attention import KeyValue, ttt_attention, ttt_attention_reference

# float64, a softmax over a dozen scores.
ROUNDING = 1e-12
LENGTH, BATCH, HEAD_DIM = 9, 2, 8


def steps_of(num_steps: int, num_kv_heads: int, *, seed: int, length: int = LENGTH) -> list[KeyValue]:
    generator = torch.Generator().manual_seed(seed)
    shape = (length, BATCH, num_kv_heads, HEAD_DIM)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2 * num_steps)]
    for value in values:
        value.requires_grad_()
    return [KeyValue(*values[2 * k : 2 * k + 2]) for k in range(num_steps)]


def query_of(num_heads: int, *, seed: int, scale: float = 1.0, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(length, BATCH, num_heads, HEAD_DIM, generator=generator, dtype=torch.float64) * scale
    return query.requires_grad_()


def gradients(output: Tensor, query: Tensor, steps: list[KeyValue]) -> list[Tensor]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    weight = weight.to(output.dtype)
    leaves = [query, *(tensor for step in steps for tensor in step)]
    return list(torch.autograd.grad((output * weight).sum(), leaves))


def reference(query: Tensor, steps: list[KeyValue]) -> Tensor:
    first, *own = steps
    empty = first.key.new_zeros(0, *first.key.shape)
    keys = torch.stack([step.key for step in own]) if own else empty
    values = torch.stack([step.value for step in own]) if own else empty
    return ttt_attention_reference(query, first, keys, values)


def by_rows(query: Tensor, steps: list[KeyValue]) -> Tensor:
    """Row t sees step 0's rows 0..t and its own row of every later step; one softmax over them."""
    length, batch, num_heads, head_dim = query.shape
    group = num_heads // steps[0].key.shape[2]
    output = torch.empty_like(query)
    for t in range(length):
        for b in range(batch):
            for head in range(num_heads):
                kv = head // group
                keys = torch.cat([steps[0].key[: t + 1, b, kv], *(step.key[t : t + 1, b, kv] for step in steps[1:])])
                values = torch.cat(
                    [steps[0].value[: t + 1, b, kv], *(step.value[t : t + 1, b, kv] for step in steps[1:])]
                )
                weights = (keys @ query[t, b, head] / head_dim**0.5).softmax(0)
                output[t, b, head] = weights @ values
    return output


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 2), (4, 1), (1, 1)])
def test_the_kernel_equals_its_specification(num_steps: int, num_heads: int, num_kv_heads: int) -> None:
    query, steps = query_of(num_heads, seed=1), steps_of(num_steps, num_kv_heads, seed=2)
    found, expected = ttt_attention(query, steps), reference(query, steps)
    assert found.shape == query.shape
    assert (found - expected).abs().max() < ROUNDING
    for mine, theirs in zip(gradients(found, query, steps), gradients(expected, query, steps), strict=True):
        assert (mine - theirs).abs().max() < ROUNDING


@pytest.mark.parametrize("num_steps", [1, 4])
def test_the_specification_equals_a_loop_over_rows(num_steps: int) -> None:
    query, steps = query_of(4, seed=3), steps_of(num_steps, 2, seed=4)
    with torch.no_grad():
        assert (reference(query, steps) - by_rows(query, steps)).abs().max() < ROUNDING


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_flat_and_sharp_attention(scale: float) -> None:
    """Merging by log-sum-exp must not overflow where one score is far above the others."""
    query, steps = query_of(4, seed=5, scale=scale), steps_of(3, 2, seed=6)
    found, expected = ttt_attention(query, steps), reference(query, steps)
    assert (found - expected).abs().max() < ROUNDING
    for mine, theirs in zip(gradients(found, query, steps), gradients(expected, query, steps), strict=True):
        assert (mine - theirs).abs().max() < ROUNDING * max(1.0, scale)


@pytest.mark.parametrize("length", [1, 2, 200])
def test_lengths(length: int) -> None:
    """One row, and more rows than a block of the kernel."""
    query, steps = query_of(2, seed=8, length=length), steps_of(3, 1, seed=9, length=length)
    found, expected = ttt_attention(query, steps), reference(query, steps)
    assert (found - expected).abs().max() < ROUNDING
    for mine, theirs in zip(gradients(found, query, steps), gradients(expected, query, steps), strict=True):
        assert (mine - theirs).abs().max() < 10 * ROUNDING


def test_nothing_of_the_future_is_seen() -> None:
    query, steps = query_of(4, seed=10), steps_of(3, 2, seed=11)
    with torch.no_grad():
        before = ttt_attention(query, steps)
        for step in steps:
            step.key[5:] += 1
            step.value[5:] -= 1
        after = ttt_attention(query, steps)
    assert torch.equal(before[:5], after[:5])
    assert not torch.equal(before[5:], after[5:])


def test_a_step_sees_its_own_row_only() -> None:
    """Keys of later steps stay with their row; step 0's reach every later row."""
    query, steps = query_of(4, seed=12), steps_of(3, 2, seed=13)
    with torch.no_grad():
        before = ttt_attention(query, steps)
        steps[1].value[3] += 1
        changed = (ttt_attention(query, steps) != before).flatten(1).any(1)
    assert changed.tolist() == [row == 3 for row in range(LENGTH)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_stay_what_they_are(dtype: torch.dtype) -> None:
    query, steps = query_of(4, seed=14), steps_of(3, 2, seed=15)
    expected = reference(query, steps)
    low_query = query.detach().to(dtype).requires_grad_()
    low_steps = [KeyValue(*(x.detach().to(dtype).requires_grad_() for x in step)) for step in steps]
    found = ttt_attention(low_query, low_steps)
    assert found.dtype is dtype
    tolerance = 8 * torch.finfo(dtype).eps
    assert (found - expected).abs().max() < tolerance
    for mine, theirs in zip(gradients(found, low_query, low_steps), gradients(expected, query, steps), strict=True):
        assert mine.dtype is dtype
        assert (mine - theirs).abs().max() < 8 * tolerance

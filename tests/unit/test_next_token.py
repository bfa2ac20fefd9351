"""The fused next-token loss against torch's cross-entropy over all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mcore_spec.errors import ConfigError
from mcore_spec.losses.next_token import next_token_loss
from mcore_spec.parallel.tensor_parallel import TensorParallel

ROWS, WIDTH, VOCAB_SIZE, PADDED = 11, 6, 13, 16


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(PADDED, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCAB_SIZE, (ROWS,), generator=generator)
    counted = torch.rand(ROWS, generator=generator) < 0.6
    return hidden.requires_grad_(), head.requires_grad_(), labels, counted


@pytest.mark.parametrize("max_logits", [None, 1, 3 * VOCAB_SIZE])
def test_loss_and_gradients_are_those_of_the_whole(max_logits: int | None) -> None:
    hidden, head, labels, counted = inputs(torch.float64)
    found = next_token_loss(
        hidden, head, labels=labels, counted=counted, vocab_size=VOCAB_SIZE, tp=TensorParallel(), max_logits=max_logits
    )
    (0.25 * found.loss).backward()
    gradients, hidden.grad, head.grad = (hidden.grad, head.grad), None, None
    whole = F.cross_entropy(F.linear(hidden, head[:VOCAB_SIZE])[counted], labels[counted], reduction="sum")
    (0.25 * whole).backward()
    assert 0 < int(found.num_rows) == int(counted.sum()) < ROWS
    torch.testing.assert_close(found.loss, whole, rtol=1e-13, atol=0)
    for gradient, expected in zip(gradients, (hidden.grad, head.grad), strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_sums_are_wide_where_the_weights_are_narrow() -> None:
    hidden, head, labels, counted = inputs(torch.bfloat16)
    found = next_token_loss(hidden, head, labels=labels, counted=counted, vocab_size=VOCAB_SIZE, tp=TensorParallel())
    found.loss.backward()
    assert found.loss.dtype is torch.float32
    assert hidden.grad is not None
    assert head.grad is not None
    wide = F.linear(hidden, head[:VOCAB_SIZE]).float().detach()
    expected = F.cross_entropy(wide[counted], labels[counted], reduction="sum")
    torch.testing.assert_close(found.loss.detach(), expected, rtol=1e-6, atol=0)
    assert (hidden.grad.dtype, head.grad.dtype) == (torch.bfloat16, torch.bfloat16)


def test_no_rows_are_no_loss() -> None:
    hidden, head, labels, counted = inputs(torch.float64)
    found = next_token_loss(
        hidden, head, labels=labels, counted=torch.zeros_like(counted), vocab_size=VOCAB_SIZE, tp=TensorParallel()
    )
    found.loss.backward()
    assert (found.loss.item(), int(found.num_rows)) == (0.0, 0)
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_a_block_holds_something() -> None:
    hidden, head, labels, counted = inputs(torch.float64)
    with pytest.raises(ConfigError, match="max_logits = 0"):
        next_token_loss(
            hidden, head, labels=labels, counted=counted, vocab_size=VOCAB_SIZE, tp=TensorParallel(), max_logits=0
        )

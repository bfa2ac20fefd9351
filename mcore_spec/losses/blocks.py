"""Blocks of logits: how large, in which memory, and the two products with a head that every fused loss makes."""

from __future__ import annotations

import torch
from torch import Tensor

from mcore_spec.errors import ConfigError

# Elements of a block, 64 MiB in float32. Measured on two cores with 49,152 entries of 576: up to 2**24 the heads'
# matrix products gain from more rows at a time, and what the passes over a larger block lose stays below it.
HOST_MAX_LOGITS = 2**24
# 512 MiB in float32, 883 rows of 151,936 entries: enough for a matrix product to be bound by arithmetic, not by reading
# the head. Reckoned, not measured.
DEVICE_MAX_LOGITS = 2**27


def block_rows(width: int, *, device: torch.device, max_logits: int | None = None) -> int:
    """Rows of a block of logits, at least one.

    Args:
        width: vocabulary entries on this rank.
        device: of the logits.
        max_logits: elements of a block; ``None``: by device.

    Raises:
        ConfigError: `max_logits` below 1.
    """
    if max_logits is None:
        max_logits = HOST_MAX_LOGITS if device.type == "cpu" else DEVICE_MAX_LOGITS
    if max_logits < 1:
        raise ConfigError(f"max_logits = {max_logits}; give the elements of a block of logits, 1 or more")
    return max(1, max_logits // max(1, width))


class Scratch:
    """Memory for one block at a time; it grows to the largest that is asked for and is used again."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """Take nothing yet."""
        self._flat = torch.empty(0, dtype=dtype, device=device)

    def block(self, num_rows: int, width: int) -> Tensor:
        """An uninitialised, contiguous [num_rows, width]; the one before is overwritten."""
        if self._flat.numel() < num_rows * width:
            # The small one is let go first: the two together would be a block more at the peak.
            self._flat = self._flat.new_empty(0)
            self._flat = self._flat.new_empty(num_rows * width)
        return self._flat[: num_rows * width].view(num_rows, width)


def project(hidden: Tensor, head: Tensor, wide: Scratch, narrow: Scratch) -> Tensor:
    """[n, h] times a head [width, h] -> [n, width], multiplied in the tensors' dtype and widened.

    Args:
        hidden: states.
        head: rows of a head.
        wide: memory of the result.
        narrow: memory of the product, in the dtype of `hidden`.
    """
    out = wide.block(hidden.shape[0], head.shape[0])
    if hidden.dtype == out.dtype:
        return torch.mm(hidden, head.t(), out=out)
    return out.copy_(torch.mm(hidden, head.t(), out=narrow.block(*out.shape)))


def add_head_gradient(grad: Tensor, descent: Tensor, hidden: Tensor, *, factor: float) -> None:
    """Add ``factor * descent^T hidden`` to the gradient of a head, in place.

    Args:
        grad: [width, h], as wide as the sums.
        descent: [n, width], in the dtype of `hidden`.
        hidden: [n, h].
        factor: of the rows.
    """
    if hidden.dtype == grad.dtype:
        grad.addmm_(descent.t(), hidden, alpha=factor)
    else:
        grad.add_(torch.mm(descent.t(), hidden), alpha=factor)

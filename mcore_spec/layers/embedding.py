"""Looking token ids up in a vocabulary whose rows are sharded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mcore_spec.parallel.tensor_parallel import TensorParallel


@torch.no_grad()
def embed_tokens(token_ids: Tensor, table: Tensor, tp: TensorParallel) -> Tensor:
    """Frozen embedding of `token_ids`.

    Args:
        token_ids: [b, s], in the whole vocabulary.
        table: this rank's rows [padded vocabulary / size, h].
        tp: the tensor-parallel group.

    Returns:
        [s or s/size, b, h], without gradient.
    """
    local = token_ids - tp.rank * table.shape[0]
    is_here = (local >= 0) & (local < table.shape[0])
    rows = F.embedding(local.clamp(0, table.shape[0] - 1), table)
    rows = rows.masked_fill(~is_here.unsqueeze(-1), 0)
    return tp.leave(rows.transpose(0, 1).contiguous())

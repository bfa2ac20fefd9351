"""What vLLM loads into its workers to hand hidden states out; imported by name, in vLLM's processes alone.

vLLM's own `ExampleHiddenStatesConnector` copies through pinned memory and a CUDA stream, which a machine without a GPU
does not have (0.32). Here the states of a request that ended are copied and written at once, under another name
until they are whole.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    extract_from_kv_cache,
)


class Written:
    """In the place of the CUDA event that tells when a copy is through."""

    def query(self) -> bool:
        """It is."""
        return True


class StatesConnector(ExampleHiddenStatesConnector):
    """Writes `hidden_states` [n, states, h] and `token_ids` [n] to the path that vLLM tells the client."""

    def _submit_async_write(self, pending: Any) -> None:
        """Called on every worker for a request that ended.

        Args:
            pending: vLLM's `PendingSave`: the request, its file, its token ids and its blocks of the cache.
        """
        if not self._is_tp_rank_zero:
            return
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)
        slots = (blocks[:, None] * self._block_size + torch.arange(self._block_size)).flatten()
        cache = self._kv_cache
        hidden = extract_from_kv_cache(cache, slots.to(cache.device), len(pending.token_ids))
        path = Path(pending.filename)
        partial = path.with_name(f".{path.name}")
        save_file({"hidden_states": hidden.cpu().contiguous(), "token_ids": pending.token_ids.clone()}, partial)
        os.replace(partial, path)
        self._req_copy_events[pending.req_id] = Written()

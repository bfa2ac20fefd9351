"""Writing the ``torch_dist`` format from this process.

megatron-core's own strategy writes from forked processes and collects their results through a manager
process. A fork of a process whose OpenMP threads have run hangs in the child's first parallel region,
which on a host without CUDA is the rule. The format is the same; only who writes differs. Remove this
once megatron-core can write without forking.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as torch_checkpoint


class InProcessSaveStrategy(TorchDistSaveShardedStrategy):
    """Same files, written by the ranks themselves; an error on one rank is raised on all."""

    def __init__(self) -> None:
        """The format's name and version are megatron-core's."""
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Write this rank's shards, and from rank 0 the index."""
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        planner = MCoreSavePlanner(
            dedup_replicated_tensors=False, flatten_state_dict=False, can_run_decentralized_global_plan=False
        )
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir, single_file_per_rank=True),
            planner=planner,
        )

"""Writing the ``torch_dist`` format from this process, and every error of it on every rank.

megatron-core's own strategy writes from forked processes and collects their results through a manager
process. A fork of a process whose OpenMP threads have run hangs in the child's first parallel region,
which on a host without CUDA is the rule. The format is the same; only who writes differs. Remove this
once megatron-core can write without forking.

Its `dist_checkpointing.save` also lets rank 0 alone write ``common.pt`` and ``metadata.json``, between
collectives: a disk that is full by then stops rank 0 and leaves the others waiting.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as torch_checkpoint

from mcore_spec.parallel.layout import run_on_rank_zero


def write_state(state: dict[str, Any], directory: Path) -> None:
    """What `dist_checkpointing.save` writes, in its order; all ranks take part.

    Args:
        state: sharded tensors and objects; what else is in it rank 0 keeps for all.
        directory: exists, is empty.

    Raises:
        OSError: rank 0 could not write what it keeps for all; on every rank.
        CheckpointException: torch's, a rank could not write its tensors; on every rank. A `BaseException`.
    """
    sharded, common = save_preprocess(state)
    strategy = InProcessSaveStrategy()
    run_on_rank_zero(lambda: _write_common(common, directory / COMMON_STATE_FNAME))
    strategy.save(sharded, directory)
    # The file that makes the directory a checkpoint comes last.
    config = CheckpointingConfig(strategy.backend, strategy.version)
    run_on_rank_zero(lambda: save_config(config, str(directory)))


def _write_common(common: dict[str, Any], path: Path) -> None:
    # torch's own writer tells of a full disk by a RuntimeError about positions in the file.
    buffer = io.BytesIO()
    torch.save(common, buffer)
    path.write_bytes(buffer.getbuffer())


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

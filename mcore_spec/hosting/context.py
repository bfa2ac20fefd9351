"""Which ranks share the rows of a batch, as accelerate was told."""

from __future__ import annotations

import sys
from typing import Any

from mcore_spec.parallel.collectives import Group


def context_group() -> Group:
    """The context-parallel group of accelerate's ``ParallelismConfig(cp_size=...)``; ``None`` without one."""
    state_module: Any = sys.modules.get("accelerate.state")
    # accelerate is optional, and a state that nobody made would be made by asking for it.
    if state_module is None or not state_module.AcceleratorState._shared_state:
        return None
    state = state_module.AcceleratorState()
    if state.parallelism_config is None or not state.parallelism_config.cp_enabled:
        return None
    group: Group = state.device_mesh["cp"].get_group()
    return group

"""What the ranks do for `test_draft_init.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.conversion import convert
from mcore_spec.errors import ConfigError
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.parallel.sharding import gather_whole, sharded_tensors
from tests.tiny import VOCAB_SIZE, import_base

TOKENS = torch.randint(VOCAB_SIZE, (2, 10), generator=torch.Generator().manual_seed(3))

MODES: dict[str, Any] = {
    "the base's sizes": "eagle",
    "two layers": [("eagle", {"eagle_architecture_config": {"num_hidden_layers": 2}})],
    "other sizes": [("eagle", {"eagle_architecture_config": {"intermediate_size": 48}})],
    "a norm of each aux state": [("eagle", {"eagle_architecture_config": {"fc_norm": True}})],
    "another activation": [("eagle", {"eagle_architecture_config": {"hidden_act": "gelu"}})],
    "Medusa": "medusa",
}


def started(*, layout: Layout, directory: Path, draft_init: Any) -> dict[str, Any] | None:
    """The draft's whole weights, and on given tokens the base's and the draft's last states and logits."""
    with parallel_runtime(layout):
        model = import_base(directory, layout).model
        # The last aux layer is the one before the base's last.
        architecture = {"eagle_aux_hidden_state_layer_ids": [0, 2, 4]}
        convert(model, [("eagle", {"eagle_architecture_config": architecture})], draft_init=draft_init)
        base = MegatronBase(model)
        draft = base.draft()
        features = base.features(TOKENS, aux_layer_ids=(0, 2, 4))
        if draft is None or features is None:
            return None
        with torch.no_grad():
            (output,) = draft(features.aux, [base.embed(TOKENS.roll(-1, dims=1))])
            logits: Tensor = base.logits(output.hidden)
        return {
            "weights": {e.name: gather_whole(e.tensor, e.shard, draft.tp) for e in sharded_tensors(draft)},
            "base": features.last,
            "draft": output.hidden,
            "logits": logits,
        }


def chosen_for(*, directory: Path) -> bool:
    """Whether an ordinary draft starts as this base's layer."""
    with parallel_runtime(Layout()):
        model = import_base(directory, Layout()).model
        convert(model, "eagle")
        draft = MegatronBase(model).draft()
        assert draft is not None
        return draft.is_warm_started


def chosen(*, directory: Path) -> dict[str, bool | str]:
    """What a draft of some sizes starts as when nothing is said: as the base's layer or not."""
    found: dict[str, bool | str] = {}
    with parallel_runtime(Layout()):
        for name, mode in MODES.items():
            model = import_base(directory, Layout()).model
            convert(model, mode)
            draft = MegatronBase(model).draft()
            assert draft is not None
            found[name] = draft.is_warm_started
        try:
            convert(import_base(directory, Layout()).model, MODES["other sizes"], draft_init="base")
        except ConfigError as error:
            found["refusal"] = str(error)
    return found

"""A draft trained on one library's model goes on on the other's, bit for bit, in both directions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mcore_spec
from mcore_spec.bases.transformers import TransformersBase
from mcore_spec.config import eagle_preset
from mcore_spec.conversion import Mode
from tests.pool import RankPool
from tests.tiny import draft_to_target, drawn, write_hf_model

MODES: dict[str, Mode] = {
    "eagle3": eagle_preset("eagle3"),
    "eagle1": eagle_preset("eagle1"),
    "eagle-mtp": eagle_preset("eagle-mtp"),
    "medusa": "medusa",
}


@pytest.mark.parametrize("name", MODES)
def test_there_and_back(name: str, rank_pool: RankPool, tmp_path: Path) -> None:
    """From transformers to two tensor-parallel ranks of Megatron-core and back."""
    base = write_hf_model(tmp_path / "base", "llama", tied=False)
    model = AutoModelForCausalLM.from_pretrained(base)
    mcore_spec.convert(model, MODES[name], d2t=draft_to_target() if name == "eagle3" else None)
    draft = TransformersBase(model).draft()
    assert draft is not None
    with torch.no_grad():
        for key, parameter in draft.named_parameters():
            parameter.copy_(drawn(key, tuple(parameter.shape)))
    mcore_spec.save(model, tmp_path / "of_transformers")
    rank_pool.run(
        "tests.parity.host_cases:hand_over",
        world_size=2,
        base=base,
        source=tmp_path / "of_transformers",
        destination=tmp_path / "of_megatron",
    )
    back = AutoModelForCausalLM.from_pretrained(base)
    mcore_spec.restore(back, tmp_path / "of_megatron")
    expected, found = draft.state_dict(), TransformersBase(back).draft().state_dict()
    assert found.keys() == expected.keys()
    # The ranks changed what they were given, so that nothing can be left over from here.
    for key, value in expected.items():
        assert torch.equal(found[key], value + 1 if value.is_floating_point() else value), key

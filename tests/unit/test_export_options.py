"""The options for TensorRT-LLM beside an exported EAGLE-3 draft."""

from __future__ import annotations

import pytest
import torch
import yaml

from mcore_spec.algorithms.eagle3 import plan_eagle3
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.config import BaseArchitecture, BaseIdentity, EagleConfig, RopeConfig
from mcore_spec.drafts.eagle3 import Eagle3Draft
from mcore_spec.drafts.resolve import resolve_eagle
from mcore_spec.parallel.tensor_parallel import Placement

BASE = BaseArchitecture(
    family="llama",
    num_layers=12,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=32,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope=RopeConfig(theta=10000.0),
)


@pytest.mark.parametrize(("layers", "named"), [([], None), ([1, 5, 8], None), ([1, 5, 10], [1, 5, 10])])
def test_layers_that_are_not_the_engines_own_are_named(layers: list[int], named: list[int] | None) -> None:
    """By their outputs, counted from 0, as TensorRT-LLM counts its default three."""
    given = {"eagle_aux_hidden_state_layer_ids": layers}
    config = resolve_eagle(EagleConfig.parse({"eagle_architecture_config": given}), BASE)
    draft = Eagle3Draft(config, BASE, place=Placement(device=torch.device("meta")))
    identity = BaseIdentity(source="base", fingerprint="none")
    record = CheckpointRecord(base=BASE, identity=identity, conversion=None, packages={})
    options = yaml.safe_load(plan_eagle3(draft, record, "hf").extra_files["extra_llm_api.yaml"])["speculative_config"]
    assert options.pop("eagle3_layers_to_capture", None) == named
    assert options == {"decoding_type": "Eagle", "max_draft_len": 3, "speculative_model_dir": "."}

"""ModelOpt's EAGLE-3 on a transformers model: what its own trainer calls, without the optimizer.

Its options: no `torch.compile` (minutes on a host), everything else its default. Base and draft are one model.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modelopt.torch.speculative as mtsp  # type: ignore[import-not-found]
import torch
from transformers import AutoModelForCausalLM

from tools.benchmark.cases import LOSS_DECAY, BaseSizes, Case, Inputs
from tools.benchmark.harness import Contender, load_draft, run


def architecture(sizes: BaseSizes, case: Case) -> dict[str, Any]:
    """`eagle_architecture_config`: one layer with the base's sizes and rotary embedding."""
    config = sizes.config
    theta = config["rope_theta"]
    return {
        "num_hidden_layers": 1,
        "intermediate_size": sizes.intermediate_size,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": config["hidden_act"],
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_theta": theta,
        "rope_scaling": {"rope_type": "default", "rope_theta": theta},
        "draft_vocab_size": case.draft_vocab_size or sizes.vocab_size,
        "eagle_aux_hidden_state_layer_ids": list(sizes.aux_layer_ids),
    }


def eagle_config(sizes: BaseSizes, case: Case) -> dict[str, Any]:
    """What is asked of ModelOpt; everything else is its default."""
    return {
        "eagle_ttt_steps": case.num_steps,
        "eagle_loss_decay_factor": LOSS_DECAY,
        "eagle_use_torch_compile": False,
        "eagle_architecture_config": architecture(sizes, case),
    }


def build(base: Path, case: Case, inputs: Inputs) -> Contender:
    """Convert the base, and give the draft the shared weights (its own head the base's rows)."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = mtsp.convert(model, [("eagle", eagle_config(BaseSizes.read(base), case))])
    draft = model.eagle_module
    load_draft(draft, inputs.draft)
    if inputs.target_ids is not None:
        with torch.no_grad():
            draft.d2t.copy_(inputs.draft_to_target)
            draft.lm_head.weight.copy_(model.lm_head.weight[inputs.target_ids])
    model.train()
    batch = {
        "input_ids": inputs.token_ids[None],
        "attention_mask": torch.ones(1, case.num_tokens, dtype=torch.int64),
        "loss_mask": inputs.loss_mask[None].to(torch.int64),
    }

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        loss.backward()
        return float(loss.detach())

    return Contender(step, draft, "peer_cross_entropy", version("nvidia-modelopt"))


if __name__ == "__main__":
    sys.exit(run("modelopt", build))

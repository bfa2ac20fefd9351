"""This package's EAGLE-3 training step on the base as a transformers model, one process: the peers' own host."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from mcore_spec.bases.transformers import TransformersBase
from mcore_spec.conversion import convert
from mcore_spec.hosting.rows import NO_LABEL
from tools.benchmark.cases import LOSS_DECAY, Case, Inputs
from tools.benchmark.harness import Contender, load_draft, run


def build(base: Path, case: Case, inputs: Inputs) -> Contender:
    """Read, convert, and give the draft the shared weights (its own head starts as the base's rows)."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {"eagle_ttt_steps": case.num_steps, "eagle_loss_decay_factor": LOSS_DECAY, "eagle_architecture_config": {}}
    convert(model, [("eagle", config)], d2t=inputs.draft_to_target)
    draft = TransformersBase(model).draft()
    assert draft is not None, "the whole model is in this process"
    load_draft(draft, inputs.draft)
    model.train()
    token_ids = inputs.token_ids[None]
    labels = token_ids.masked_fill(~inputs.loss_mask[None], NO_LABEL)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=token_ids, labels=labels).loss
        loss.backward()
        return float(loss.detach())

    return Contender(step, draft, "per_token", version("mcore-spec"))


if __name__ == "__main__":
    sys.exit(run("ours_hf", build))

"""This package's EAGLE-3 training step on a megatron-core base, one process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from megatron.core.models.gpt import GPTModel

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.megatron_build import build_gpt_model
from mcore_spec.conversion import convert
from mcore_spec.data.batch import Document, make_batch
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.training.step import DraftStep
from mcore_spec.weights.hf_config import describe_hf, read_hf_config
from mcore_spec.weights.hf_import import import_hf
from mcore_spec.weights.safetensors_io import WeightDirectory
from tools.benchmark.cases import LOSS_DECAY, Case, Inputs
from tools.benchmark.harness import Contender, load_draft, run


def read_base(base: Path) -> GPTModel:
    """The base in float32, as `convert` reads it."""
    architecture = describe_hf(read_hf_config(base), where=str(base / "config.json"))
    model = build_gpt_model(architecture.model_copy(update={"dtype": "float32"}), Layout(), transformer_impl="local")
    with WeightDirectory(base) as weights:
        import_hf(model, weights, cast=True)
    return model


def build_step(model: GPTModel, case: Case, inputs: Inputs) -> Callable[[], float]:
    """What is measured: zero gradients, both forwards, loss, backward.

    Args:
        model: converted, with the shared weights.
        case: sizes.
        inputs: one document.

    Returns:
        A call returns the loss of a token: the sum over rows and steps, by the rows of step 0.
    """
    draft_step = DraftStep(model)
    batch = make_batch(
        [Document(inputs.token_ids.numpy(), inputs.loss_mask.numpy())],
        num_steps=case.num_steps,
        document_multiple=draft_step.document_multiple,
        row_multiple=draft_step.row_multiple,
        num_samples=1,
        pad_to=None,
    )

    def step() -> float:
        model.zero_grad(set_to_none=True)
        output = draft_step(batch)
        assert output is not None, "one process holds the last stage"
        loss = output.loss / output.judged_by_step[0]
        loss.backward()
        return float(loss.detach())

    return step


def build(base: Path, case: Case, inputs: Inputs) -> Contender:
    """Read, convert, and give the draft the shared weights (its own head starts as the base's rows)."""
    model = read_base(base)
    config = {"eagle_ttt_steps": case.num_steps, "eagle_loss_decay_factor": LOSS_DECAY, "eagle_architecture_config": {}}
    convert(model, [("eagle", config)], d2t=inputs.draft_to_target)
    draft = MegatronBase(model).draft()
    assert draft is not None, "one process holds the last stage"
    load_draft(draft, inputs.draft)
    return Contender(build_step(model, case, inputs), draft, "per_token", version("mcore-spec"))


if __name__ == "__main__":
    with parallel_runtime(Layout()):
        exit_code = run("ours", build)
    sys.exit(exit_code)

"""What the ranks do for `test_joint_training.py`: one optimizer step's gradients of base and draft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.config import TrainingConfig
from mcore_spec.data.batch import Batch
from mcore_spec.losses.outcome import LossOutput
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.training.optimizer import DraftOptimizer
from mcore_spec.training.pipeline import accumulate
from mcore_spec.training.step import DraftStep
from mcore_spec.training.totals import Totals
from mcore_spec.weights.hf_export import export_base
from tests.parallel.training_cases import NUM_STEPS, Case, batches, converted, whole_gradients


def gradients_of_both(
    *, layout: Layout, directory: Path, save: Path, cases: Mapping[str, Case], favours: bool
) -> dict[str, dict[str, Any]]:
    """Of each case the reduced totals and the draft's whole gradients.

    The base's are written into a directory of the case's name, as a base whose weights they are: under the names of
    transformers.
    """
    found = {}
    with parallel_runtime(layout):
        for name, case in cases.items():
            model = converted(directory, layout, case, favours=favours)
            step = DraftStep(model, recompute=case.recompute)
            optimizer = DraftOptimizer(model, TrainingConfig(data_path=("x",), train_iters=1), num_iterations=1)
            optimizer.zero_grad()
            totals = Totals.zeros(
                NUM_STEPS,
                device=torch.device("cpu"),
                num_regressed=step.task.num_regressed,
                trains_base=True,
            )

            def count(output: LossOutput, batch: Batch, totals: Totals = totals) -> None:
                totals.add(output, num_tokens=batch.num_tokens)

            accumulate(step, optimizer.ddp, list(batches(model, step, case)), count)
            totals.reduce(data_group=model.pg_collection.dp_cp, pipeline_group=model.pg_collection.pp)
            optimizer.reduce_gradients(num_rows=totals.num_rows)
            found[name] = {"means": totals.means(), "gradients": whole_gradients(model)}
            base = MegatronBase(model)
            for child in model.children():
                for parameter in child.parameters() if child is not base.draft() else ():
                    if parameter.requires_grad:
                        parameter.data = parameter.main_grad.clone()
            if base.is_writer:
                target = save / name
                target.mkdir(exist_ok=True, parents=True)
                export_base(base, target)
    return found

"""Drafts with parallel heads: NVIDIA ModelOpt's names for them; no engine loads them."""

from __future__ import annotations

from dataclasses import replace

from mcore_spec.config import EagleArchitectureConfig
from mcore_spec.errors import UnsupportedError
from mcore_spec.export.plan import ExportFormat, ExportPlan
from mcore_spec.weights.draft_names import Table

_HEADS = "parallel_draft_heads"
NAMES: Table = [
    *(
        (f"{_HEADS}.medusa_heads.{{i}}.{{j}}.linear.{kind}", f"{_HEADS}.{{i}}.medusa_layers.{{j}}.linear.{kind}")
        for kind in ("weight", "bias")
    ),
    (f"{_HEADS}.lm_head.weight", f"{_HEADS}.lm_head.weight"),
]


def check_parallel_format(export_format: ExportFormat, architecture: EagleArchitectureConfig) -> None:
    """Refuse a format whose readers would build the draft without its parallel heads.

    Raises:
        UnsupportedError: another format than hf.
    """
    if architecture.parallel_draft_step > 1 and export_format != "hf":
        raise UnsupportedError(
            f"export_format = {export_format!r} with parallel_draft_step = {architecture.parallel_draft_step}: what "
            "reads this format knows no parallel heads; choose hf, which `validate --draft` reads"
        )


def with_parallel_heads(plan: ExportPlan, architecture: EagleArchitectureConfig) -> ExportPlan:
    """The plan of the draft without such heads, and theirs. Engines refuse it by its architecture."""
    config = {
        **plan.config,
        "architectures": ["EagleParallelDraftModel"],
        # What the rest of it is.
        "draft_architectures": plan.config["architectures"],
        "parallel_draft_step": architecture.parallel_draft_step,
        "parallel_draft_heads_num_layers": architecture.parallel_draft_heads_num_layers,
    }
    remark = (
        f"No engine knows the parallel heads: they propose {architecture.parallel_draft_step - 1} more tokens from the "
        "state of the last step. `mcore-spec validate` does; the names are ModelOpt's."
    )
    return replace(
        plan, config=config, table=[*plan.table, *NAMES], serve={}, extra_files={}, remarks=(*plan.remarks, remark)
    )

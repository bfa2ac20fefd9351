"""``mcore-spec export``: a checkpoint becomes a directory that an inference engine loads."""

from __future__ import annotations

from pathlib import Path

from mcore_spec.bases.megatron_build import BaseGPTModel
from mcore_spec.checkpoint.store import Checkpoint, find_checkpoint, load_checkpoint
from mcore_spec.cli.arguments import ExportArguments, flag_of
from mcore_spec.cli.convert import layout_of
from mcore_spec.cli.terminal import say
from mcore_spec.conversion import conversion_of
from mcore_spec.errors import CheckpointError
from mcore_spec.export.base import export_base_and_draft
from mcore_spec.export.directory import check_export_directory
from mcore_spec.export.draft import export_draft
from mcore_spec.export.quantized import check_form
from mcore_spec.parallel.layout import parallel_runtime, run_on_rank_zero


def run(arguments: ExportArguments) -> None:
    """Load in the given layout and write the draft, or the base with the draft in it."""
    layout = layout_of(arguments)
    directory = Path(arguments.export_dir)
    with parallel_runtime(layout):
        checkpoint = run_on_rank_zero(lambda: find_checkpoint(Path(arguments.load), step=arguments.ckpt_step))
        asked = {"export_extra_modules", "export_format"} & arguments.model_fields_set
        if asked and checkpoint.record.conversion is None:
            raise CheckpointError(
                f"load = {arguments.load} has no draft; convert it first, or leave "
                f"{' and '.join(flag_of(field) for field in sorted(asked))} out"
            )
        check_form(checkpoint.record, arguments.export_quant_format)
        if not arguments.export_extra_modules:
            remedy = "give --export-extra-modules, which writes the draft alone"
            checkpoint.record.check_has_layers("what is exported", remedy=remedy)
        run_on_rank_zero(lambda: check_export_directory(directory, overwrite=arguments.overwrite))
        model = load_checkpoint(checkpoint, layout, transformer_impl=arguments.transformer_impl)
        if arguments.export_extra_modules:
            export_draft(
                model,
                checkpoint.record,
                directory,
                export_format=arguments.export_format,
                overwrite=arguments.overwrite,
                quant_format=arguments.export_quant_format,
            )
        else:
            export_base_and_draft(
                model,
                checkpoint.record,
                directory,
                tokenizer_path=checkpoint.tokenizer_path,
                export_format=arguments.export_format,
                overwrite=arguments.overwrite,
                quant_format=arguments.export_quant_format,
            )
        say(f"exported {directory} ({describe(arguments, checkpoint, model)})")


def describe(arguments: ExportArguments, checkpoint: Checkpoint, model: BaseGPTModel) -> str:
    """Which iteration was written, and what of it."""
    conversion = conversion_of(model)
    parts = [] if arguments.export_extra_modules else ["base"]
    parts += [] if conversion is None else [conversion.draft_class.label]
    quantization = checkpoint.record.quantization
    recipe = "" if quantization is None else f", {quantization.recipe.name}"
    name = checkpoint.path.name
    return f"{name if name == 'release' else f'iteration {checkpoint.iteration}'}, {' and '.join(parts)}{recipe}"

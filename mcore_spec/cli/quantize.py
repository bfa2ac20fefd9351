"""``mcore-spec quantize``: a checkpoint whose base and draft compute as an engine with quantised weights would."""

from __future__ import annotations

from pathlib import Path

from mcore_spec.bases.megatron_build import BaseGPTModel, check_layout
from mcore_spec.checkpoint.store import (
    Checkpoint,
    check_save_directory,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from mcore_spec.cli.convert import layout_of
from mcore_spec.cli.quantization_arguments import QuantizeArguments
from mcore_spec.cli.terminal import say
from mcore_spec.data.store import build_token_store
from mcore_spec.errors import CheckpointError, ConfigError
from mcore_spec.parallel.layout import parallel_runtime, run_on_rank_zero
from mcore_spec.quantization.calibrate import quantize
from mcore_spec.quantization.installed import quantization_of
from mcore_spec.training.calibration import CalibrationLoop


def run(arguments: QuantizeArguments) -> None:
    """Check what can be checked, read the conversations, load, quantise, save."""
    layout, recipe, save = layout_of(arguments), arguments.recipe(), Path(arguments.save)
    with parallel_runtime(layout):
        checkpoint = run_on_rank_zero(lambda: _find(arguments))
        record = checkpoint.record
        check_layout(record.base, layout)
        run_on_rank_zero(lambda: check_save_directory(save, record.identity))
        loop = _calibration_loop(arguments, checkpoint) if recipe.is_calibrated else None
        model = load_checkpoint(checkpoint, layout, transformer_impl=arguments.transformer_impl)
        quantize(
            model,
            recipe,
            loop,
            calibration=arguments.calib_method,
            num_conversations=0 if loop is None else loop.num_conversations,
        )
        _report(model)
        quantization = quantization_of(model)
        assert quantization is not None
        path = save_checkpoint(
            model,
            save,
            record.model_copy(update={"quantization": quantization.record}),
            tokenizer_files=sorted(checkpoint.tokenizer_path.glob("*")),
        )
        say(f"saved {path}")


def _find(arguments: QuantizeArguments) -> Checkpoint:
    checkpoint = find_checkpoint(Path(arguments.load), step=arguments.ckpt_step)
    done = checkpoint.record.quantization
    if done is not None:
        raise CheckpointError(
            f"load = {arguments.load} is quantised already ({done.recipe.name}); quantise the checkpoint that it was "
            "made from"
        )
    checkpoint.record.check_has_layers("quantize", remedy="quantise a checkpoint of the whole base with the draft")
    if Path(arguments.save).resolve() == Path(arguments.load).resolve():
        raise ConfigError(
            f"--save {arguments.save} is --load: its newest iteration would be another model; choose another"
        )
    return checkpoint


def _calibration_loop(arguments: QuantizeArguments, checkpoint: Checkpoint) -> CalibrationLoop:
    base = checkpoint.record.base
    base.check_seq_length(arguments.seq_length)
    store = build_token_store(
        arguments.calib_data,
        checkpoint.choose_tokenizer(arguments.tokenizer_model),
        cache_dir=Path(arguments.data_cache_path or Path(arguments.save) / "data_cache"),
        seq_length=arguments.seq_length,
        on_bad_line=arguments.on_bad_line,
        vocab_size=base.vocab_size,
    )
    loop = CalibrationLoop(store, num_conversations=arguments.calib_size)
    say(f"calibration: {loop.num_conversations:,} conversations of {len(store):,} in {', '.join(arguments.calib_data)}")
    return loop


def _report(model: BaseGPTModel) -> None:
    quantization = quantization_of(model)
    assert quantization is not None
    recipe = quantization.record.recipe
    say(f"{recipe.name}: weights {recipe.weight}; activations {recipe.activation}")
    if recipe.kv_cache is not None:
        say(f"keys and values: {recipe.kv_cache}")
    say(f"{len(quantization.linears):,} linear maps and {len(quantization.attentions):,} attentions on this rank")

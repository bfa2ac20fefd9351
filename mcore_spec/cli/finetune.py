"""``mcore-spec finetune``: trains the draft of a checkpoint, or continues a run that was interrupted."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mcore_spec.bases.megatron_build import BaseGPTModel, check_layout
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.checkpoint.store import TRACKER, Checkpoint, check_save_directory, find_checkpoint, load_checkpoint
from mcore_spec.cli.arguments import flag_of
from mcore_spec.cli.convert import layout_of
from mcore_spec.cli.dry_run import Rehearsal, build_stages, say_weights
from mcore_spec.cli.plan import describe_run, machine_of
from mcore_spec.cli.streaming import Streams, serve
from mcore_spec.cli.terminal import say
from mcore_spec.cli.training_arguments import FinetuneArguments
from mcore_spec.cli.training_data import find_data
from mcore_spec.config import EagleConfig
from mcore_spec.conversion import find_algorithm
from mcore_spec.data.hidden_states import StatesStore
from mcore_spec.data.hidden_states.streamed import Notices, notices_to_extraction
from mcore_spec.data.sources import open_source
from mcore_spec.errors import CheckpointError, ConfigError, UnsupportedError
from mcore_spec.evaluation.prompts import TokenizerPrompts
from mcore_spec.objectives.linear_start import check_linear_start, num_default_rows
from mcore_spec.objectives.objective import Task
from mcore_spec.parallel.imagined import imagined_world_size
from mcore_spec.parallel.layout import (
    Layout,
    is_rank_zero,
    num_data_ranks,
    parallel_runtime,
    run_on_every_rank,
    run_on_rank_zero,
)
from mcore_spec.parallel.sides import split_ranks
from mcore_spec.planning.activations import TrainingSetup
from mcore_spec.planning.layout import PlannedLayout
from mcore_spec.planning.report import describe_model
from mcore_spec.planning.shapes import ModelShape
from mcore_spec.quantization.installed import quantization_of
from mcore_spec.quantization.modes import compute_in_fp8, learn_scales
from mcore_spec.training.data import Conversations
from mcore_spec.training.log import Entry, Logger, brief, check_loggers, draw_curves, open_loggers, say_above_bar
from mcore_spec.training.signals import StoppedEarly
from mcore_spec.training.step import check_trainable
from mcore_spec.training.trainer import Progress, Trainer

_TRAIN_DTYPE = {False: "float32", True: "bfloat16"}


class Start(NamedTuple):
    """What a run begins with.

    Attributes:
        checkpoint: that is loaded; its record's dtype is that of the training.
        is_resumed: whether it is one of an interrupted run in --save.
    """

    checkpoint: Checkpoint
    is_resumed: bool


def run(arguments: FinetuneArguments) -> None:
    """Check what can be checked, read the conversations, load the weights, train."""
    layout = replace(layout_of(arguments), context=arguments.context_parallel_size)
    if arguments.dry_run:
        _rehearse(arguments, layout)
        return
    if arguments.extract_ranks is None:
        _train(arguments, layout, None)
        return
    with split_ranks(layout, num_extract=arguments.extract_ranks) as bridge:
        if bridge.is_training:
            with notices_to_extraction(bridge) as notices:
                _train(arguments, layout, notices)
        else:
            serve(arguments, bridge, dtype=_TRAIN_DTYPE[arguments.bf16])


def _train(arguments: FinetuneArguments, layout: Layout, notices: Notices | None) -> None:
    """A rank that trains; with `notices` the base runs on others, which these reach."""
    with parallel_runtime(layout, seed=arguments.seed):
        checkpoint, is_resumed = run_on_rank_zero(lambda: _find_start(arguments))
        task = check_trainable(checkpoint.record)
        check_linear_start(task, num_batches=arguments.fit_start)
        check_layout(checkpoint.record.base, layout)
        global_batch_size = _global_batch_size(arguments, num_data=num_data_ranks(layout))
        data = find_data(arguments, checkpoint, task)
        store = data.source
        if isinstance(store, StatesStore):
            arguments = arguments.model_copy(update={"seq_length": store.description.seq_length})
        streams = None if notices is None else Streams(notices, depth=arguments.stream_depth)
        read_states = data.read_states if streams is None else streams.open_reader
        conversations = Conversations(store, arguments, global_batch_size=global_batch_size, read_states=read_states)
        begun = 0 if not is_resumed else checkpoint.iteration
        if begun >= conversations.num_iterations:
            say(f"{checkpoint.path} is the end of the run: {conversations.num_iterations} iterations; nothing to do")
            return
        run_on_rank_zero(lambda: check_loggers(arguments.loggers))
        arguments = _with_fit_start(arguments, checkpoint.record, task, conversations, is_resumed=is_resumed)
        model = load_checkpoint(checkpoint, layout, transformer_impl=arguments.transformer_impl)
        _set_up_quantization(model, arguments, is_resumed=is_resumed)
        record = checkpoint.record
        if record.quantization is not None:
            update = {"quantization": arguments.trained_as(record.quantization)}
            record = record.model_copy(update=update)
        try:
            trainer = Trainer(
                model,
                conversations.batches,
                arguments,
                record=record,
                save=Path(arguments.save),
                num_iterations=conversations.num_iterations,
                global_batch_size=global_batch_size,
                tokenizer_files=sorted(checkpoint.tokenizer_path.glob("*")),
                end_ids=_end_ids(arguments, checkpoint),
                resume_from=checkpoint if is_resumed else None,
                make_features=data.make_features,
            )
        except StoppedEarly:
            say("stopped before the first step: nothing was saved; give the same command to begin")
            return
        # Nothing is refused any more: the log may lose what stands behind the iteration that is gone on from.
        loggers = run_on_every_rank(lambda: _open_loggers(arguments, begun))
        say(f"{'resumed' if is_resumed else 'loaded'} {checkpoint.path}; {_describe_run(conversations, trainer)}")
        progress = trainer.run(loggers)
        _say_end(arguments, progress, conversations.num_iterations, trainer)


def _set_up_quantization(model: BaseGPTModel, arguments: FinetuneArguments, *, is_resumed: bool) -> None:
    """As the options say; a model that is not quantised has none of them."""
    if quantization_of(model) is None:
        return
    compute_in_fp8(model, arguments.gradient_scaling, backend=arguments.fp8_backend, is_resumed=is_resumed)
    if arguments.learn_scales:
        learn_scales(model)


def _with_fit_start(
    arguments: FinetuneArguments,
    record: CheckpointRecord,
    task: Task,
    conversations: Conversations,
    *,
    is_resumed: bool,
) -> FinetuneArguments:
    """--fit-start as a number: by default what a draft needs that was not trained yet."""
    # Behind a calibration the scales are those of the weights that it saw.
    num_batches = arguments.fit_start
    is_trained = record.training is not None or record.quantization is not None
    if num_batches is None:
        num_rows = 0 if is_trained else num_default_rows(task, record.base)
        num_batches = conversations.num_fit_batches(num_rows=num_rows)
    if num_batches > 0 and not is_resumed:
        instead = ", not as it was trained" if is_trained else ""
        say(f"the draft starts as the least-squares solution of {num_batches} global batches (--fit-start){instead}")
    return arguments.model_copy(update={"fit_start": num_batches})


def _rehearse(arguments: FinetuneArguments, layout: Layout) -> None:
    """The same checks, base and draft without memory, the plan of the run; conversations are not read."""
    if arguments.offline_distillation_data is not None:
        raise UnsupportedError("--dry-run plans a run whose base runs; leave --offline-distillation-data or it out")
    world_size = imagined_world_size(layout, num_gpus=arguments.num_gpus)
    checkpoint, is_resumed = _find_start(arguments)
    check_linear_start(check_trainable(checkpoint.record), num_batches=arguments.fit_start)
    base, conversion = checkpoint.record.base, checkpoint.record.conversion
    check_layout(base, layout)
    checkpoint.record.base.check_seq_length(arguments.seq_length)
    for path in arguments.data_path:
        open_source(path)
    assert conversion is not None, "a trainable checkpoint has a draft"
    draft = find_algorithm(conversion.algorithm).config_class.parse(conversion.config)
    if not isinstance(draft, EagleConfig):
        raise UnsupportedError(
            f"{conversion.algorithm}: only the training of EAGLE drafts is planned; leave --dry-run out"
        )
    setup = _planned(arguments, layout, checkpoint.record, draft, world_size=world_size)
    global_batch_size = _global_batch_size(arguments, num_data=setup.layout.data)
    built = Rehearsal(base, layout, world_size, (conversion.algorithm, draft), arguments.transformer_impl)
    stages = build_stages(built)
    say(f"would {'go on with' if is_resumed else 'begin with'} {checkpoint.path}")
    machine = machine_of(arguments)
    for line in (*describe_model(setup), *describe_run(setup, machine, global_batch_size=global_batch_size)):
        say(line)
    say_weights(layout, stages)
    say("dry run: conversations were not read, nothing was written")


def _planned(
    arguments: FinetuneArguments, layout: Layout, record: CheckpointRecord, draft: EagleConfig, *, world_size: int
) -> TrainingSetup:
    """The run as a plan takes it, on GPUs."""
    planned = PlannedLayout(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        context=layout.context,
        sequence_parallel=layout.sequence_parallel,
        last_stage_layers=layout.last_stage_layers,
    )
    return TrainingSetup(
        shape=ModelShape(record.identity.source, record.base),
        draft=draft,
        layout=replace(planned, data=world_size // planned.num_model_gpus),
        seq_length=arguments.seq_length,
        micro_batch_size=arguments.micro_batch_size,
        packed=arguments.packing,
        bf16=arguments.bf16,
        # The default where CUDA is used.
        use_distributed_optimizer=arguments.use_distributed_optimizer is not False,
        recompute=arguments.recompute_granularity == "draft",
    )


def _find_start(arguments: FinetuneArguments) -> Start:
    """The interrupted run in --save, or else --load.

    Raises:
        CheckpointError: there is nothing to train.
    """
    save, dtype = Path(arguments.save), _TRAIN_DTYPE[arguments.bf16]
    given = find_checkpoint(Path(arguments.load), step=arguments.ckpt_step)
    check_save_directory(save, given.record.identity)
    newest = find_checkpoint(save) if (save / TRACKER).exists() else None
    is_resumed = newest is not None and newest.record.training is not None and arguments.ckpt_step is None
    if newest is not None and not is_resumed:
        raise CheckpointError(
            f"save = {save} holds iteration {newest.iteration} already, and this run begins anew; choose another "
            "directory (to go on with the newest iteration of a run, leave --ckpt-step out)"
        )
    start = newest if is_resumed and newest is not None else given
    if is_resumed and start.record.conversion != given.record.conversion:
        raise CheckpointError(
            f"save = {save} holds a run that trains another draft than the one in --load {arguments.load}; choose "
            "another directory"
        )
    _check_quantization(arguments, given.record, start.record)
    changes: dict[str, Any] = {"dtype": dtype}
    if arguments.extract_ranks is not None:
        # Whoever runs the base loads it from there, also when a run is resumed, which is saved without layers.
        given.record.check_has_layers("--extract-ranks", remedy="give the checkpoint of the whole base as --load")
        changes["has_layers"] = False
    base = start.record.base.model_copy(update=changes)
    record = start.record.model_copy(update={"base": base})
    return Start(start._replace(record=record), is_resumed)


def _check_quantization(arguments: FinetuneArguments, given: CheckpointRecord, start: CheckpointRecord) -> None:
    """Refuse what does not go with a quantised base, or with one that is not.

    Raises:
        CheckpointError: a run on another quantisation is to be resumed.
        ConfigError: weights with scales would be replaced, or there is no other teacher.
    """
    is_resumed = start is not given
    expected = given.quantization and (arguments.trained_as(given.quantization) if is_resumed else given.quantization)
    if start.quantization != expected:
        raise CheckpointError(
            f"save = {arguments.save} holds a run on another quantisation than that of --load {arguments.load}, or one "
            "with other options --learn-scales, --fp8-compute and --fp8-gradient-scaling; choose another directory, or "
            "give the same"
        )
    for option in ("learn_scales", "fp8_compute"):
        if given.quantization is None and option in arguments.model_fields_set:
            raise ConfigError(
                f"{flag_of(option)}: --load {arguments.load} is not quantised; quantise it first (quantize "
                "--export-quant-cfg), or leave it out"
            )
    if given.quantization is not None and arguments.fp8_compute and not given.quantization.recipe.is_fp8:
        raise ConfigError(
            f"--fp8-compute: recipe {given.quantization.recipe.name} of --load {arguments.load} has no FP8 numbers; "
            "leave it out, or quantise with fp8, fp8_per_channel or fp8_blockwise"
        )
    if given.quantization is not None and arguments.fit_start:
        raise ConfigError(
            f"--fit-start {arguments.fit_start} would replace weights that --load {arguments.load} has scales for: "
            "leave it out, or train first and quantise then"
        )
    if given.quantization is None and arguments.teacher == "unquantized":
        raise ConfigError(f"--teacher unquantized: --load {arguments.load} is not quantised; leave it out")


def _global_batch_size(arguments: FinetuneArguments, *, num_data: int) -> int:
    """Samples in a step.

    Raises:
        ConfigError: micro-batches of the ranks that do not make it up.
    """
    smallest = arguments.micro_batch_size * num_data
    given = arguments.global_batch_size
    if given is not None and given % smallest:
        raise ConfigError(
            f"--global-batch-size {given} is not divisible by --micro-batch-size {arguments.micro_batch_size} x "
            f"{num_data} data-parallel ranks; give a multiple of {smallest}"
        )
    return given or smallest


def _end_ids(arguments: FinetuneArguments, checkpoint: Checkpoint) -> tuple[int, ...]:
    """Tokens that end an answer, where answers are measured."""
    if arguments.eval_acceptance_interval is None:
        return ()
    record = checkpoint.record
    path = arguments.tokenizer_model or checkpoint.tokenizer_path
    return TokenizerPrompts(path, vocab_size=record.base.vocab_size, config=record.identity.hf_config).end_ids


def _open_loggers(arguments: FinetuneArguments, iteration: int) -> list[Logger]:
    """On rank 0."""
    if not is_rank_zero():
        return []
    loggers = open_loggers(
        arguments.loggers, Path(arguments.save), iteration=iteration, settings=arguments.model_dump(mode="json")
    )
    return [*loggers, _Lines()]


class _Lines:
    """The figures as lines, where no progress bar shows them; the bar has those of training."""

    def write(self, entry: Entry) -> None:
        """One line, or none."""
        line = f"iteration {entry['iteration']}: {brief(entry)}"
        if not sys.stderr.isatty():
            say(line)
        elif "loss" not in entry:
            say_above_bar(line)

    def close(self) -> None:
        """Nothing to let go."""


def _describe_run(conversations: Conversations, trainer: Trainer) -> str:
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return (
        f"{conversations.num_iterations - trainer.progress.iteration:,} of {conversations.num_iterations:,} "
        f"iterations to go, {conversations.global_batch_size} samples each; {trained:,} parameters trained on this rank"
    )


def _say_end(arguments: FinetuneArguments, progress: Progress, num_iterations: int, trainer: Trainer) -> None:
    """A summary, and the picture where matplotlib is there."""
    state = "done" if progress.iteration == num_iterations else "stopped, give the same command to go on"
    say(
        f"{state}: iteration {progress.iteration:,} of {num_iterations:,}, {progress.consumed_samples:,} samples, "
        f"{progress.consumed_tokens:,} tokens, {progress.num_skipped:,} steps skipped; saved in {arguments.save}"
    )
    if trainer.newest_entry is not None:
        say(brief(trainer.newest_entry))
    if is_rank_zero():
        path = draw_curves(Path(arguments.save))
        say("install matplotlib for a picture of the run" if path is None else f"curves: {path}")

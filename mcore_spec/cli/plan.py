"""``mcore-spec plan``: bytes, work and speed of a training run, before anything is allocated. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from mcore_spec.cli.arguments import MachineArguments
from mcore_spec.cli.plan_arguments import PlanArguments
from mcore_spec.cli.terminal import say
from mcore_spec.config import EagleConfig
from mcore_spec.config.files import ConfigFile, configure_eagle, read_config_file
from mcore_spec.drafts.resolve import resolve_eagle
from mcore_spec.errors import ConfigError
from mcore_spec.planning.activations import TrainingSetup
from mcore_spec.planning.hardware import GPUS, usable_bytes
from mcore_spec.planning.layout import PlannedLayout, check_divides
from mcore_spec.planning.report import (
    Machine,
    describe_layout,
    describe_memory,
    describe_model,
    describe_search,
    describe_states,
    describe_work,
)
from mcore_spec.planning.search import find_layout
from mcore_spec.planning.shapes import ModelShape, known_shape, read_shape


def run(arguments: PlanArguments) -> None:
    """Say what the run needs."""
    shape = _shape(arguments)
    machine = machine_of(arguments)
    setup = TrainingSetup(
        shape=shape,
        draft=resolve_eagle(_draft(arguments), shape.architecture),
        layout=PlannedLayout(),
        seq_length=arguments.seq_length,
        micro_batch_size=arguments.micro_batch_size,
        bf16=arguments.bf16,
        use_distributed_optimizer=arguments.use_distributed_optimizer,
        recompute=arguments.recompute_granularity == "draft",
    )
    if not arguments.find_layout:
        setup = replace(setup, layout=_layout(arguments, shape))
    check_setup(setup)
    for line in describe_model(setup):
        say(line)
    if arguments.find_layout:
        search = find_layout(setup, usable_bytes=usable_bytes(machine.gpu), gpus_per_node=arguments.gpus_per_node)
        for line in describe_search(search):
            say(line)
        if search.found is None:
            return
        setup = search.found.setup
    for line in describe_run(setup, machine, global_batch_size=arguments.global_batch_size):
        say(line)
    for line in describe_states(setup, num_tokens=arguments.num_tokens):
        say(line)


def describe_run(setup: TrainingSetup, machine: Machine, *, global_batch_size: int | None) -> list[str]:
    """Layout, memory, work and speed.

    Raises:
        ConfigError: a batch that the data-parallel ranks do not divide.
    """
    smallest = setup.micro_batch_size * setup.layout.data
    batch = global_batch_size or smallest
    if batch % smallest:
        raise ConfigError(
            f"--global-batch-size {batch} is not divisible by --micro-batch-size {setup.micro_batch_size} x "
            f"{setup.layout.data} data-parallel ranks; give a multiple of {smallest}"
        )
    return [
        f"layout: {describe_layout(setup.layout, num_layers=setup.shape.architecture.num_layers)}; "
        f"samples of {setup.seq_length:,} tokens, {setup.micro_batch_size} in a micro-batch, {batch} in a step",
        *describe_memory(setup, machine),
        *describe_work(setup, machine, global_batch_size=batch),
    ]


def machine_of(arguments: MachineArguments) -> Machine:
    """The GPU that the flags name."""
    return Machine(arguments.gpu, GPUS[arguments.gpu], arguments.utilization)


def check_setup(setup: TrainingSetup) -> None:
    """Refuse what could not be started.

    Raises:
        ConfigError: sizes that the layout does not divide, or samples longer than the base's positions.
        UnsupportedError: a draft whose training is not planned.
    """
    base, layout = setup.shape.architecture, setup.layout
    check_divides(base, tensor=layout.tensor, pipeline=layout.pipeline, last_stage_layers=layout.last_stage_layers)
    assert setup.sizes  # divides the draft too
    if setup.seq_length > base.max_position_embeddings:
        raise ConfigError(
            f"--seq-length {setup.seq_length} is above the base's {base.max_position_embeddings} positions; lower it"
        )


def _shape(arguments: PlanArguments) -> ModelShape:
    if arguments.model_shape is not None:
        return known_shape(arguments.model_shape)
    assert arguments.pretrained_model_path is not None
    return read_shape(arguments.pretrained_model_path)


def _draft(arguments: PlanArguments) -> EagleConfig:
    path = arguments.eagle_config or arguments.algorithm_config
    name = "algorithm_config" if arguments.eagle_config is None else "eagle_config"
    file = ConfigFile({}, where="eagle config") if path is None else read_config_file(path, name=name)
    config = configure_eagle(arguments.export_eagle_algorithm, file)
    if arguments.draft_vocab_size is None:
        return config
    given = config.eagle_architecture_config.draft_vocab_size
    if given not in (None, arguments.draft_vocab_size):
        raise ConfigError(
            f"{file.where} has draft_vocab_size = {given}, --draft-vocab-size says {arguments.draft_vocab_size}; make "
            "the two agree"
        )
    architecture = config.eagle_architecture_config.model_copy(update={"draft_vocab_size": arguments.draft_vocab_size})
    return config.model_copy(update={"eagle_architecture_config": architecture})


def _layout(arguments: PlanArguments, shape: ModelShape) -> PlannedLayout:
    one = PlannedLayout(
        tensor=arguments.tensor_model_parallel_size,
        pipeline=arguments.pipeline_model_parallel_size,
        context=arguments.context_parallel_size,
        sequence_parallel=arguments.sequence_parallel,
        last_stage_layers=arguments.decoder_last_pipeline_num_layers,
    )
    num_gpus = arguments.num_gpus or one.num_model_gpus
    if num_gpus % one.num_model_gpus:
        raise ConfigError(
            f"--num-gpus {num_gpus} is not divisible by the {one.num_model_gpus} GPUs of one copy of the model; give a "
            "multiple"
        )
    return replace(one, data=num_gpus // one.num_model_gpus)

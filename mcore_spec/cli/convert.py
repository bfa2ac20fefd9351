"""``mcore-spec convert``: a base becomes a Megatron-core checkpoint, with a draft on it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_spec.algorithms.mtp import start_as_base_mtp
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.megatron_build import BaseGPTModel, build_gpt_model, check_layout
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.checkpoint.store import (
    check_save_directory,
    find_checkpoint,
    load_checkpoint,
    make_record,
    save_checkpoint,
)
from mcore_spec.cli.arguments import DTYPE_NAMES, NO_DRAFT, ConvertArguments, ParallelArguments
from mcore_spec.cli.dry_run import Rehearsal, build_stages, say_weights
from mcore_spec.cli.terminal import say
from mcore_spec.config import BaseArchitecture, StrictConfig
from mcore_spec.config.files import ConfigFile, read_config_file
from mcore_spec.conversion import convert, find_algorithm, quantized_before
from mcore_spec.drafts.draft import Draft
from mcore_spec.drafts.vocab_map import load_draft_to_target
from mcore_spec.errors import CheckpointError, ConfigError
from mcore_spec.parallel.imagined import imagined_world_size
from mcore_spec.parallel.layout import Layout, parallel_runtime, run_on_rank_zero, tensor_parallel
from mcore_spec.parallel.sharding import sharded_tensors, whole_shape
from mcore_spec.parallel.tensor_parallel import Placement
from mcore_spec.weights.base_directory import find_base
from mcore_spec.weights.families import base_rows
from mcore_spec.weights.hf_config import TOKENIZER_FILES
from mcore_spec.weights.hf_export import stored_specs
from mcore_spec.weights.hf_import import check_tensors, import_hf
from mcore_spec.weights.safetensors_io import WeightDirectory


class Source(NamedTuple):
    """Where the base comes from.

    Attributes:
        record: what it is; `record.base` has the dtype that was asked for.
        directory: of the Hugging Face files, or of the iteration.
        tokenizer_files: to carry along.
        mtp: beginnings of the names of the base's own multi-token-prediction tensors.
    """

    record: CheckpointRecord
    directory: Path
    tokenizer_files: list[Path]
    mtp: tuple[str, ...] = ()


def run(arguments: ConvertArguments) -> None:
    """Check everything that can be checked without weights, then read, convert and save."""
    layout = layout_of(arguments)
    if arguments.dry_run:
        _rehearse(arguments, layout)
        return
    with parallel_runtime(layout, seed=arguments.seed):
        source = run_on_rank_zero(lambda: _find_source(arguments))
        check_layout(source.record.base, layout)
        d2t = _draft_vocabulary(arguments, source)
        mode = _mode(arguments)
        _check_mtp(arguments, source)
        if mode is not None:
            _check_mode(mode, d2t, source, layout)
        save = Path(arguments.save)
        run_on_rank_zero(lambda: check_save_directory(save, source.record.identity))
        model = _load_base(arguments, source, layout)
        if mode is not None:
            draft_init = "random" if arguments.draft_init == "mtp" else arguments.draft_init
            convert(model, [mode], d2t=d2t, seed=arguments.seed, draft_init=draft_init)
        if arguments.draft_init == "mtp":
            start_as_base_mtp(model, source.directory)
        record = make_record(model, source.record.identity)
        _report(model)
        path = save_checkpoint(model, save, record, tokenizer_files=source.tokenizer_files)
        say(f"saved {path}")


def _rehearse(arguments: ConvertArguments, layout: Layout) -> None:
    """The same checks, base and draft without memory, nothing written; weights need not be there."""
    world_size = imagined_world_size(layout, num_gpus=arguments.num_gpus)
    source = _find_source(arguments)
    base = source.record.base
    check_layout(base, layout)
    _check_mtp(arguments, source)
    d2t, mode = _draft_vocabulary(arguments, source), _mode(arguments)
    draft = None if mode is None else (mode[0], find_algorithm(mode[0]).resolve(mode[1], base, d2t))
    stages = build_stages(Rehearsal(base, layout, world_size, draft, arguments.transformer_impl))
    if source.record.identity.fingerprint:
        check_save_directory(Path(arguments.save), source.record.identity)
    else:
        say(f"no weights in {source.directory}: their names and shapes were not checked")
    say(_describe_base(base))
    say_weights(layout, stages)
    say("dry run: nothing was written")


def layout_of(arguments: ParallelArguments) -> Layout:
    """The layout that the flags describe."""
    return Layout(
        tensor=arguments.tensor_model_parallel_size,
        pipeline=arguments.pipeline_model_parallel_size,
        sequence_parallel=arguments.sequence_parallel,
        last_stage_layers=arguments.decoder_last_pipeline_num_layers,
    )


def _find_source(arguments: ConvertArguments) -> Source:
    if arguments.load is not None:
        checkpoint = find_checkpoint(Path(arguments.load), step=arguments.ckpt_step)
        if checkpoint.record.conversion is not None:
            raise CheckpointError(
                f"load = {arguments.load} has a draft already ({checkpoint.record.conversion.algorithm}); "
                "convert the base it was made from"
            )
        if checkpoint.record.quantization is not None:
            recipe = checkpoint.record.quantization.recipe
            raise CheckpointError(quantized_before(f"load = {arguments.load}", recipe.name))
        files = sorted(checkpoint.tokenizer_path.glob("*")) if checkpoint.tokenizer_path.is_dir() else []
        return Source(_as_asked(checkpoint.record, arguments), checkpoint.path, files)
    assert arguments.pretrained_model_path is not None
    directory, base, identity, mtp = find_base(arguments.pretrained_model_path, with_weights=not arguments.dry_run)
    if identity.fingerprint:
        with WeightDirectory(directory, without=mtp) as weights:
            check_tensors(weights, base, cast=arguments.params_dtype != "auto")
    record = CheckpointRecord(base=base, identity=identity, conversion=None, packages={})
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).exists()]
    return Source(_as_asked(record, arguments), directory, files, mtp)


def _check_mtp(arguments: ConvertArguments, source: Source) -> None:
    """Say what becomes of a base's own layer for multi-token prediction.

    Raises:
        ConfigError: --draft-init mtp with a base or a draft that has none.
    """
    if arguments.draft_init != "mtp":
        if source.mtp:
            say(f"note: {source.mtp[0]}* is not read; --draft-init mtp starts an EAGLE-MTP draft as that layer")
        return
    if not source.mtp:
        raise ConfigError(
            f"draft_init = mtp, but {source.directory} is no base with a layer for multi-token prediction in MiMo's "
            "layout; choose draft_init = random"
        )
    if arguments.export_algorithm != "eagle" or arguments.export_eagle_algorithm != "eagle-mtp":
        raise ConfigError("draft_init = mtp is for EAGLE-MTP drafts; give --export-eagle-algorithm eagle-mtp")


def _as_asked(record: CheckpointRecord, arguments: ConvertArguments) -> CheckpointRecord:
    """In another dtype, and without its layers."""
    changes: dict[str, Any] = {}
    if arguments.params_dtype != "auto":
        changes["dtype"] = DTYPE_NAMES[arguments.params_dtype]
    if arguments.export_offline_model:
        changes["has_layers"] = False
    return record.model_copy(update={"base": record.base.model_copy(update=changes)})


def _draft_vocabulary(arguments: ConvertArguments, source: Source) -> Tensor | None:
    path = arguments.draft_vocab_cache
    if path is None:
        return None
    return run_on_rank_zero(lambda: load_draft_to_target(path, vocab_size=source.record.base.vocab_size))


def _mode(arguments: ConvertArguments) -> tuple[str, StrictConfig] | None:
    """Algorithm and configuration that the flags and the file describe."""
    name = arguments.export_algorithm
    if name == NO_DRAFT:
        return None
    algorithm, file = find_algorithm(name), _config_file(arguments)
    if algorithm.configure is None:
        return name, algorithm.config_class.parse(file.values, where=file.where)
    return name, algorithm.configure(arguments.algorithm_flags(), file)


def _config_file(arguments: ConvertArguments) -> ConfigFile:
    name = "algorithm_config" if arguments.eagle_config is None else "eagle_config"
    path = arguments.eagle_config or arguments.algorithm_config
    if path is None:
        return ConfigFile({}, where=f"{arguments.export_algorithm} config")
    return read_config_file(path, name=name)


def _check_mode(mode: tuple[str, StrictConfig], d2t: Tensor | None, source: Source, layout: Layout) -> None:
    """Resolve the configuration and build the draft without memory, before any weight is read."""
    name, config = mode
    algorithm = find_algorithm(name)
    resolved = algorithm.resolve(config, source.record.base, d2t)
    place = Placement(tp=tensor_parallel(layout), device=torch.device("meta"))
    algorithm.build(resolved, source.record.base, place=place)


def _load_base(arguments: ConvertArguments, source: Source, layout: Layout) -> BaseGPTModel:
    if arguments.load is not None:
        checkpoint = find_checkpoint(Path(arguments.load), step=arguments.ckpt_step)
        return load_checkpoint(
            checkpoint._replace(record=source.record), layout, transformer_impl=arguments.transformer_impl
        )
    model = build_gpt_model(source.record.base, layout, transformer_impl=arguments.transformer_impl)
    with WeightDirectory(source.directory, without=source.mtp) as weights:
        import_hf(model, weights, cast=arguments.params_dtype != "auto")
    return model


def _report(model: BaseGPTModel) -> None:
    """What was attached, in numbers; the last stage knows the draft, rank 0 says it."""
    base = MegatronBase(model)
    draft = base.draft()
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    facts: list[tuple[str | None, int]] = [(None, 0)] * dist.get_world_size()
    dist.all_gather_object(facts, (None if draft is None else _describe_draft(draft), num_bytes))
    is_frozen = not any(p.requires_grad for p in model.decoder.parameters())
    say(_describe_base(base.architecture) + (", frozen" if is_frozen else ""))
    for line in dict.fromkeys(line for line, _ in facts if line is not None):
        say(line)
    sizes = sorted({size for _, size in facts})
    say(f"bytes a rank: {' to '.join(f'{size:,}' for size in dict.fromkeys((sizes[0], sizes[-1])))}")


def _describe_base(base: BaseArchitecture) -> str:
    num_parameters = sum(math.prod(spec.shape) for row in base_rows(base) for spec in stored_specs(row, base))
    kept = "" if base.has_layers else ", none of them kept"
    return (
        f"base: {base.family}, {base.num_layers} layers{kept}, hidden {base.hidden_size}, "
        f"vocabulary {base.vocab_size:,}, {base.dtype}; {num_parameters:,} parameters"
    )


def _describe_draft(draft: Draft) -> str:
    num_trained = sum(
        math.prod(whole_shape(entry, draft.tp)) for entry in sharded_tensors(draft) if entry.tensor.requires_grad
    )
    start = ["starts as the base's last layer"] if draft.is_warm_started else []
    return "; ".join([f"draft: {draft.label}", f"{num_trained:,} parameters, trained", *draft.facts(), *start])

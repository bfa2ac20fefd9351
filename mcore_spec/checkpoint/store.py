"""Distributed checkpoints in Megatron-LM's layout, with the conversion recorded beside the weights.

    DIR/latest_checkpointed_iteration.txt      the newest whole iteration, or "release"
    DIR/iter_0000001/                          torch_dist format of megatron.core.dist_checkpointing
    DIR/iter_0000001/mcore_spec.json           base, conversion, package versions
    DIR/iter_0000001/tokenizer/                files that training and export need

Base tensors are named as a plain `GPTModel`'s. An iteration is written under a temporary name, renamed
when it is whole, and announced last, so that an interrupted save leaves the previous one in force.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt import GPTModel

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.megatron_build import BaseGPTModel, TransformerImpl, build_gpt_model, describe
from mcore_spec.checkpoint.megatron_lm import megatron_lm_common, megatron_lm_record
from mcore_spec.checkpoint.record import (
    FORMAT_VERSION,
    LAYERS,
    NOT_MODEL,
    STORAGE_ERRORS,
    CheckpointRecord,
    ConversionRecord,
    storage_reason,
)
from mcore_spec.checkpoint.writer import write_state
from mcore_spec.config import BaseArchitecture, BaseIdentity, StrictConfig
from mcore_spec.conversion import attach, conversion_of, find_algorithm, reads_tokens
from mcore_spec.data.durable_files import sync
from mcore_spec.errors import CheckpointError, ConfigError
from mcore_spec.parallel.layout import Layout, run_on_rank_zero
from mcore_spec.quantization.installed import install, quantization_of

TRACKER = "latest_checkpointed_iteration.txt"
RECORD = "mcore_spec.json"
TOKENIZER = "tokenizer"
_RECORDED_PACKAGES = ("mcore-spec", "torch", "megatron-core", "transformers", "safetensors")


class Checkpoint(NamedTuple):
    """One iteration on disk."""

    path: Path
    iteration: int
    record: CheckpointRecord

    @property
    def tokenizer_path(self) -> Path:
        """Directory of the tokenizer's files; may be empty."""
        return self.path / TOKENIZER

    def choose_tokenizer(self, given: str | None) -> str:
        """`given`, a directory or hub id, or else the directory of the one that was saved with the weights.

        Raises:
            ConfigError: there is neither.
        """
        if given is not None:
            return given
        if not any(self.tokenizer_path.glob("*")):
            raise ConfigError(f"the checkpoint {self.path} has no tokenizer; give the base's with --tokenizer-model")
        return str(self.tokenizer_path)


def find_checkpoint(directory: Path | str, *, step: int | None = None) -> Checkpoint:
    """The newest whole iteration below `directory`, or the given one.

    Raises:
        CheckpointError: there is none, or its record is damaged.
    """
    directory = Path(directory)
    tracker = directory / TRACKER
    if step is not None:
        name = _iteration_name(step)
    else:
        if not tracker.exists():
            raise CheckpointError(f"load = {directory}: no {TRACKER} there; give the directory that was saved to")
        text = tracker.read_text().strip()
        name = text if text == "release" else _iteration_name(_parse_iteration(text, tracker))
    path = directory / name
    if not (path / "metadata.json").exists():
        raise CheckpointError(f"{path} is no checkpoint, or not a whole one; choose another iteration (ckpt_step)")
    iteration = 0 if name == "release" else int(name.removeprefix("iter_"))
    return Checkpoint(path, iteration, read_record(path))


def _iteration_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def _parse_iteration(text: str, tracker: Path) -> int:
    if not text.isdigit():
        raise CheckpointError(f"{tracker} says {text!r}, neither an iteration nor 'release'; correct it")
    return int(text)


def read_record(path: Path) -> CheckpointRecord:
    """The record beside the weights; derived from Megatron-LM's arguments where it saved the checkpoint.

    Raises:
        CheckpointError: damaged, or of a newer format.
    """
    file = path / RECORD
    if not file.exists():
        return megatron_lm_record(path)
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds a {type(values).__name__}, not an object; it is damaged")
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{file} has format_version {version!r}; this package reads {FORMAT_VERSION}: update it")
    try:
        return CheckpointRecord.parse(values, where=str(file))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def make_record(model: GPTModel, identity: BaseIdentity) -> CheckpointRecord:
    """The record of a live model."""
    conversion, quantization = conversion_of(model), quantization_of(model)
    return CheckpointRecord(
        base=describe(model),
        identity=identity,
        conversion=conversion
        and ConversionRecord(algorithm=conversion.algorithm, config=conversion.config.model_dump(mode="json")),
        packages={name: metadata.version(name) for name in _RECORDED_PACKAGES},
        quantization=quantization and quantization.record,
    )


def save_checkpoint(
    model: GPTModel,
    directory: Path | str,
    record: CheckpointRecord,
    *,
    iteration: int | None = None,
    tokenizer_files: Iterable[Path] = (),
    optimizer_state: Mapping[str, Any] | None = None,
) -> Path:
    """Write one iteration; all ranks take part.

    Args:
        model: this rank's part.
        directory: holds the iterations.
        record: what the weights are.
        iteration: its number; ``None`` for the one after the newest.
        tokenizer_files: copied beside the weights.
        optimizer_state: sharded tensors of a run that is to be resumed, by name.

    Returns:
        The directory of the iteration.

    Raises:
        CheckpointError: the directory holds another base, or writing failed; the newest iteration is as before.
    """
    root, files = Path(directory), list(tokenizer_files)
    number, partial = run_on_rank_zero(lambda: _begin(root, record, iteration))
    state = {"model": model_state(model), **megatron_lm_common(record.base, number)}
    if optimizer_state is not None:
        state["optimizer"] = dict(optimizer_state)
    try:
        write_state(state, partial)
        return run_on_rank_zero(lambda: _publish(root, partial, number, record, files))
    except STORAGE_ERRORS as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"save = {root}: writing failed ({storage_reason(error)}); free space or choose another directory. "
            "What was saved before is untouched"
        ) from error


def check_save_directory(directory: Path, identity: BaseIdentity) -> None:
    """Refuse a directory that cannot be written to or that holds another base, before any work is done.

    Raises:
        CheckpointError: it holds checkpoints of another base.
        OSError: it cannot be created or written to.
    """
    # A process that was killed between naming a whole iteration and announcing it left the announcement inside.
    for announcement in sorted(directory.glob(f"iter_*/{TRACKER}")):
        announcement.replace(directory / TRACKER)
    created = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # One name for all: what a killed process left is removed by the next.
        probe = directory / ".write-probe"
        probe.touch()
        probe.unlink(missing_ok=True)
    finally:
        for path in created:
            if path.is_dir():
                path.rmdir()
    if (directory / TRACKER).exists():
        existing = find_checkpoint(directory).record.identity
        if existing.fingerprint != identity.fingerprint:
            raise CheckpointError(
                f"save = {directory} holds checkpoints of another base ({existing.source}); this one is "
                f"{identity.source}. Choose another directory"
            )


def _begin(directory: Path, record: CheckpointRecord, iteration: int | None) -> tuple[int, Path]:
    check_save_directory(directory, record.identity)
    directory.mkdir(parents=True, exist_ok=True)
    # Also those that are not announced (an interrupted save, a tracker that was set back): none is replaced.
    taken = [int(path.name.removeprefix("iter_")) for path in directory.glob("iter_*") if path.name[5:].isdigit()]
    newest = max(taken, default=0)
    if iteration is None:
        iteration = newest + 1
    elif iteration <= newest:
        raise CheckpointError(
            f"save = {directory} holds iteration {newest} already, and {iteration} is to be saved; "
            "choose another directory, or remove the newer iterations"
        )
    for leftover in directory.glob(".partial-iter_*"):
        shutil.rmtree(leftover)
    partial = directory / f".partial-{_iteration_name(iteration)}"
    partial.mkdir()
    return iteration, partial


def _publish(
    directory: Path, partial: Path, iteration: int, record: CheckpointRecord, tokenizer_files: list[Path]
) -> Path:
    (partial / RECORD).write_text(record.model_dump_json(indent=2) + "\n")
    (partial / TOKENIZER).mkdir()
    for file in tokenizer_files:
        shutil.copy2(file, partial / TOKENIZER / file.name)
    # Written before the iteration gets its name: behind that nothing needs space any more.
    (partial / TRACKER).write_text(str(iteration))
    for path in (*partial.rglob("*"), partial):
        sync(path)
    final = directory / _iteration_name(iteration)
    partial.rename(final)
    sync(directory)
    (final / TRACKER).replace(directory / TRACKER)
    sync(directory)
    return final


def load_checkpoint(
    checkpoint: Checkpoint, layout: Layout, *, transformer_impl: TransformerImpl = "local"
) -> BaseGPTModel:
    """Build the base in `layout`, attach the recorded draft, quantise as recorded, fill all; all ranks take part.

    Raises:
        CheckpointError: tensors missing or left over.
        ConfigError: a layout that does not divide the base.
    """
    model = build_gpt_model(checkpoint.record.base, layout, transformer_impl=transformer_impl)
    restore(model, checkpoint)
    return model


def restore(model: GPTModel, checkpoint: Checkpoint) -> None:
    """Re-run the recorded conversion on `model`, a bare base, quantise it as recorded, and fill it.

    Raises:
        CheckpointError: a checkpoint of another base, tensors missing or left over.
    """
    record = checkpoint.record
    _check_same_base(describe(model), record)
    base = MegatronBase(model)
    if record.conversion is not None:
        attach(base, record.conversion.algorithm, _recorded_config(record.conversion, checkpoint.path / RECORD))
        if reads_tokens(model) and base.needs_embedding_copy():
            base.add_last_stage_embedding(torch.empty_like(base.head_weight()))
    if record.quantization is not None:
        install(model, record.quantization)
    ignored = NOT_MODEL if record.base.has_layers else (*NOT_MODEL, LAYERS)
    loaded = _load({"model": model_state(model)}, checkpoint.path, ignored=ignored)
    model.load_state_dict(loaded["model"])
    _zero_vocabulary_padding(base)


def _recorded_config(conversion: ConversionRecord, file: Path) -> StrictConfig:
    try:
        return find_algorithm(conversion.algorithm).config_class.parse(conversion.config)
    except ConfigError as error:
        raise CheckpointError(f"{file}: conversion: {error}; load it with the package that wrote it") from None


def load_optimizer_state(checkpoint: Checkpoint, optimizer_state: Mapping[str, Any]) -> dict[str, Any]:
    """Fill what `save_checkpoint` took as `optimizer_state`; all ranks take part.

    Args:
        checkpoint: of a run that is to be resumed.
        optimizer_state: sharded tensors of the same names, in this layout.

    Raises:
        CheckpointError: tensors missing or left over.
    """
    loaded = _load({"optimizer": dict(optimizer_state)}, checkpoint.path, ignored=("",), kept=NOT_MODEL[0])
    # A stage that trains nothing asks for nothing, and the reader leaves out what is empty.
    state: dict[str, Any] = loaded.get("optimizer", {})
    return state


def _load(state: dict[str, Any], path: Path, *, ignored: tuple[str, ...], kept: str | None = None) -> dict[str, Any]:
    """Fill `state`, strictly in both directions.

    Args:
        state: sharded tensors.
        path: of the iteration.
        ignored: beginnings of names that may be in the checkpoint alone.
        kept: beginning of names that may not, whatever `ignored` says.
    """
    try:
        loaded, missing, unexpected = dist_checkpointing.load(state, str(path), strict=StrictHandling.RETURN_ALL)
    except STORAGE_ERRORS as error:
        raise CheckpointError(f"{path} could not be read: {storage_reason(error)}") from error
    missing = [name for name in missing if not name.startswith(ignored) or (kept and name.startswith(kept))]
    _check_leftovers(path, missing, unexpected)
    return loaded


def _check_same_base(actual: BaseArchitecture, record: CheckpointRecord) -> None:
    ignored = {"family", "dtype"}
    expected_values = record.base.model_dump(exclude=ignored)
    actual_values = actual.model_dump(exclude=ignored)
    for field, expected in expected_values.items():
        if actual_values[field] != expected:
            raise CheckpointError(
                f"the checkpoint is of another base ({record.identity.source}): its {field} is {expected!r}, the "
                f"model's {actual_values[field]!r}; load it into the base it was made from"
            )


def _check_leftovers(path: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """`missing` is in the checkpoint but not in the model, `unexpected` the other way round."""
    leftover = sorted(name for name in missing if not name.endswith("_extra_state"))
    absent = sorted({name for name in unexpected if "_extra_state" not in name})
    if leftover or absent:
        raise CheckpointError(
            f"{path} does not fit the model: only in the checkpoint {leftover[:8] or 'nothing'}, only in the model "
            f"{absent[:8] or 'nothing'}; load it into the model that it was saved from"
        )


@torch.no_grad()
def _zero_vocabulary_padding(base: MegatronBase) -> None:
    """Rows behind the vocabulary are not in every layout's checkpoint; they are zero in all."""
    weights = [base.embedding_weight()] if base.is_first_stage else []
    if base.is_last_stage:
        weights.append(base.head_weight())
    for weight in weights:
        valid = base.architecture.vocab_size - base.tp.rank * weight.shape[0]
        weight[max(0, valid) :].zero_()


def model_state(model: GPTModel) -> dict[str, Any]:
    """megatron-core's sharded tensors of the model, base and draft; they hold the parameters themselves."""
    state: dict[str, Any] = model.sharded_state_dict(metadata={"dp_cp_group": model.pg_collection.dp_cp})
    return state

"""``mcore-spec hidden-states``: stores of hidden states of other tools into ours, ours into theirs."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mcore_spec.cli.states_arguments import OWN, HiddenStatesArguments
from mcore_spec.cli.terminal import say
from mcore_spec.data.chat import ChatEncoder, load_tokenizer
from mcore_spec.data.foreign_states.form import Facts, Form, LeftOpen, Reader
from mcore_spec.data.foreign_states.modelopt import MODELOPT
from mcore_spec.data.foreign_states.speculators_hs import SPECULATORS
from mcore_spec.data.foreign_states.speculators_v1 import SPECULATORS_V1
from mcore_spec.data.hidden_states import DocumentStates, StatesStore, StatesWriter, StoreDescription
from mcore_spec.data.hidden_states.states import DTYPES
from mcore_spec.data.hidden_states.writer import finish_store
from mcore_spec.engines.final_norm import FinalNorm
from mcore_spec.errors import ConfigError
from mcore_spec.planning.states import STORAGE_DTYPES, StatesDtype, StorageName
from mcore_spec.weights.base_directory import BaseDirectory, find_base

FORMS: dict[str, Form] = {"modelopt": MODELOPT, "speculators-v1": SPECULATORS_V1, "speculators": SPECULATORS}


class OwnReader:
    """Our store under the same names."""

    def __init__(self, directory: Path) -> None:
        """Open and verify it.

        Raises:
            CheckpointError: no store, or a damaged one.
        """
        self.store = StatesStore(directory, verify=True)
        about = self.store.description
        self.facts = Facts(
            about.source,
            about.aux_layer_ids,
            about.last_is_normed,
            about.hidden_size,
            about.num_documents,
            about.seq_length,
        )

    def states(self, index: int) -> DocumentStates:
        """See `Reader`."""
        return self.store.states(index)


class NormedReader:
    """Another reader whose last states go through the base's final norm."""

    def __init__(self, reader: Reader, base: BaseDirectory) -> None:
        """Read the norm's weight.

        Raises:
            ConfigError: the states are normed already.
        """
        if reader.facts.last_is_normed:
            raise ConfigError("--norm-last: the last states went through the final norm already; leave the flag out")
        self._reader, self._norm = reader, FinalNorm(base)
        self.facts = reader.facts._replace(last_is_normed=True)

    def states(self, index: int) -> DocumentStates:
        """See `Reader`."""
        states = self._reader.states(index)
        return states._replace(last=self._norm(states.last))


def run(arguments: HiddenStatesArguments) -> None:
    """Open, check every document, then write."""
    source, output = Path(arguments.input_dir), Path(arguments.output_dir)
    if output.exists():
        raise ConfigError(f"--output-dir {output} exists; choose another directory")
    base = None if arguments.base is None else find_base(arguments.base, field="base")
    reader = open_store(arguments.from_form, source, _left_open(arguments))
    facts = reader.facts
    kept = reader.store.description if isinstance(reader, OwnReader) else None
    if base is not None:
        check_base(facts, base, where=source)
    if arguments.norm_last:
        assert base is not None, "arguments were checked"
        reader = NormedReader(reader, base)
        facts = reader.facts
    with _partial_directory(output) as partial:
        if arguments.to_form == OWN:
            write_own(reader, partial, kept or base, storage=arguments.storage_dtype)
        else:
            num_layers = 0 if base is None else base.architecture.num_layers
            _write_foreign(reader, partial, FORMS[arguments.to_form], num_layers, arguments)
    layers = ", ".join(map(str, facts.aux_layer_ids))
    normed = "behind" if facts.last_is_normed else "before"
    say(
        f"{facts.num_documents:,} conversations from {arguments.from_form} to {arguments.to_form}: aux layers {layers} "
        f"(0-based, by output), last state {normed} the final norm; wrote {output}"
    )


def open_store(form: str, directory: Path, left_open: LeftOpen) -> Reader:
    """A store of any form.

    Raises:
        ConfigError: not there, damaged, or a question that neither its files nor `left_open` answer.
        CheckpointError: the same of a store of ours.
    """
    if not directory.is_dir():
        raise ConfigError(f"--input-dir {directory} is no directory; correct the path")
    return OwnReader(directory) if form == OWN else FORMS[form].open(directory, left_open)


def check_base(facts: Facts, base: BaseDirectory, *, where: Path) -> None:
    """Refuse a base whose hidden states these cannot be.

    Raises:
        ConfigError: another width, layers that it does not have, or a last state of another layer.
    """
    architecture = base.architecture
    name, layers = base.identity.source, architecture.num_layers
    if facts.hidden_size != architecture.hidden_size:
        raise ConfigError(
            f"{where} has hidden size {facts.hidden_size}, the base {name} {architecture.hidden_size}; give the base "
            "that they were computed with"
        )
    if any(not 0 <= layer < layers for layer in facts.aux_layer_ids):
        raise ConfigError(
            f"{where}: aux layers {list(facts.aux_layer_ids)} (0-based, by output) are not all among the {layers} of "
            f"{name}; correct --aux-layer-ids or --layer-id-convention"
        )
    if facts.last_layer_id not in (None, layers - 1):
        raise ConfigError(
            f"{where}: its last state is of layer {facts.last_layer_id} (0-based, by output), the last of {name} is "
            f"{layers - 1}; correct --layer-id-convention, or give the base that they were computed with"
        )


def write_own(
    reader: Reader, directory: Path, origin: StoreDescription | BaseDirectory | None, *, storage: StorageName | None
) -> None:
    """Write a store of ours.

    Args:
        reader: what is written.
        directory: an empty one.
        origin: description of the store of ours that is read, or the base whose states they are.
        storage: bf16, fp8, fp32 or fp64; ``None``: as the first document.

    Raises:
        ConfigError: documents that do not fit each other or the base.
    """
    facts = reader.facts
    dtype = _stored_dtype(reader.states(0).last.dtype) if storage is None else STORAGE_DTYPES[storage]
    assert origin is not None, "arguments were checked"
    described = _describe(reader, origin) if isinstance(origin, BaseDirectory) else origin
    description = described.model_copy(update={"dtype": dtype, "last_is_normed": facts.last_is_normed})
    with StatesWriter(directory, description) as writer:
        for index in range(facts.num_documents):
            writer.append(index, reader.states(index))
    finish_store(directory)


def _describe(reader: Reader, base: BaseDirectory) -> StoreDescription:
    """A foreign store as one of ours; every file is opened and checked."""
    facts = reader.facts
    digest = hashlib.sha256()
    lengths = []
    for index in range(facts.num_documents):
        states = reader.states(index)
        lengths.append(len(states.token_ids))
        digest.update(states.token_ids.numpy().tobytes())
        digest.update(states.loss_mask.numpy().tobytes())
    return StoreDescription(
        source=base.identity.source,
        base_fingerprint=base.identity.fingerprint,
        backend="foreign",
        tokenizer_fingerprint=ChatEncoder(load_tokenizer(base.directory)).fingerprint(),
        conversation_fingerprint=digest.hexdigest(),
        num_documents=facts.num_documents,
        seq_length=max(facts.seq_length, *lengths),
        vocab_size=base.architecture.vocab_size,
        hidden_size=facts.hidden_size,
        aux_layer_ids=facts.aux_layer_ids,
        last_is_normed=facts.last_is_normed,
        dtype="float32",
    )


def _write_foreign(
    reader: Reader, directory: Path, form: Form, num_layers: int, arguments: HiddenStatesArguments
) -> None:
    facts, name = reader.facts, arguments.to_form
    if form.wants_normed and not facts.last_is_normed:
        raise ConfigError(f"{name} takes last states as normed, these are not; give --norm-last and --base")
    if form.wants_normed is False and facts.last_is_normed:
        raise ConfigError(
            f"{name} norms last states itself, and these went through the final norm already; extract them before "
            "the norm (examples/compute_hidden_states_vllm.py, examples/speculators/data_generation_offline.py)"
        )
    writer = form.create(directory, facts, num_layers)
    for index in range(facts.num_documents):
        states = reader.states(index)
        if arguments.storage_dtype is not None:
            dtype = DTYPES[STORAGE_DTYPES[arguments.storage_dtype]]
            states = states._replace(aux=states.aux.to(dtype), last=states.last.to(dtype))
        writer.append(index, states)
    writer.finish()


def _left_open(arguments: HiddenStatesArguments) -> LeftOpen:
    ids = arguments.aux_layer_ids
    if list(ids) != sorted(set(ids)) or any(layer < 0 for layer in ids):
        raise ConfigError(f"--aux-layer-ids {list(ids)}: give different layers from 0, ascending")
    return LeftOpen(
        aux_layer_ids=ids or None,
        convention=arguments.layer_id_convention,
        last_is_normed=arguments.last_is_normed,
        counts_all_tokens=arguments.counts_all_tokens,
    )


def _stored_dtype(dtype: torch.dtype) -> StatesDtype:
    """In which a dtype is kept exactly."""
    names = {value: name for name, value in DTYPES.items()}
    return names.get(dtype, "float32")


@contextmanager
def _partial_directory(final: Path) -> Iterator[Path]:
    """A sibling that takes the name of `final` at the end of the block, and is removed after an error."""
    final = final.resolve()
    partial = final.with_name(f".partial-{final.name}")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

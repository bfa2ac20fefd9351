"""speculators' training: hidden states of its version 1 in, a directory an epoch out that vLLM and speculators load.

Nothing here trains: the steps are those of ``hidden-states``, ``convert``, ``finetune`` and ``export``. Below
``LOG_DIR/RUN_NAME`` stand what goes from one to the next and the run itself:

    request.json     what was asked for; a run is continued by the same request alone
    d2t.pt, algorithm.json, states/      draft vocabulary, draft, hidden states in our form
    converted/       the base with the untrained draft
    training/        checkpoints and log
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from mcore_spec.checkpoint.store import TRACKER, find_checkpoint
from mcore_spec.cli import convert, export, finetune
from mcore_spec.cli.arguments import ConvertArguments, ExportArguments
from mcore_spec.cli.hidden_states import check_base, write_own
from mcore_spec.cli.speculators_arguments import SpeculatorsTrainArguments
from mcore_spec.cli.speculators_vocab import load_array
from mcore_spec.cli.terminal import say
from mcore_spec.cli.training_arguments import FinetuneArguments
from mcore_spec.data.durable_files import publish_file
from mcore_spec.data.foreign_states.form import LeftOpen, Reader
from mcore_spec.data.foreign_states.speculators_v1 import DATA_CONFIG, SPECULATORS_V1
from mcore_spec.data.hidden_states import DocumentStates, StatesStore
from mcore_spec.data.hidden_states.files import MANIFEST
from mcore_spec.drafts.vocab_map import check_draft_to_target, target_to_draft
from mcore_spec.errors import ConfigError
from mcore_spec.parallel.layout import process_group, run_on_rank_zero
from mcore_spec.training.data import Conversations
from mcore_spec.weights.base_directory import BaseDirectory, find_base

_REQUEST = "request.json"
# Reading and writing terabytes takes the first process longer than the others wait otherwise.
_TIMEOUT_S = 7 * 24 * 3600
# Of nine conversations and more one in ten validates, as speculators does it.
_SPLITS = {True: "90,10,0", False: "100,0,0"}
_SMALLEST_SPLIT = 10


class JoinedReader:
    """Several directories behind each other, conversations cut to the length of a sample."""

    def __init__(self, readers: Sequence[Reader], *, seq_length: int) -> None:
        """Compare what they say.

        Raises:
            ConfigError: directories of different layers, widths or norms.
        """
        first = readers[0].facts
        for reader in readers[1:]:
            for field in ("aux_layer_ids", "last_is_normed", "hidden_size", "last_layer_id"):
                here, there = first._asdict()[field], reader.facts._asdict()[field]
                if here != there:
                    raise ConfigError(f"--data-path holds sets with {field} = {here} and {there}; train on one of them")
        self._readers, self._seq_length = list(readers), seq_length
        self._places = [(reader, index) for reader in readers for index in range(reader.facts.num_documents)]
        self.facts = first._replace(num_documents=len(self._places), seq_length=seq_length)

    def states(self, index: int) -> DocumentStates:
        """See `Reader`."""
        reader, number = self._places[index]
        return DocumentStates(*(tensor[: self._seq_length] for tensor in reader.states(number)))


class Prepared(NamedTuple):
    """What the steps need.

    Attributes:
        run: directory of the run.
        num_iterations: optimizer steps of all epochs.
        split: of the conversations.
    """

    run: Path
    num_iterations: int
    split: str


def run(arguments: SpeculatorsTrainArguments) -> None:
    """Prepare, attach a draft, train, write a directory an epoch."""
    if is_first_process():
        _prepare(arguments)
    # The others wait here for the first.
    with process_group(timeout_s=_TIMEOUT_S):
        num_ranks = dist.get_world_size()
        _run_steps(arguments, run_on_rank_zero(lambda: _count(arguments, num_ranks=num_ranks)))


def _run_steps(arguments: SpeculatorsTrainArguments, prepared: Prepared) -> None:
    converted, training = prepared.run / "converted", prepared.run / "training"
    if not (converted / TRACKER).exists():
        convert.run(
            ConvertArguments(
                pretrained_model_path=arguments.verifier_name_or_path,
                export_algorithm="eagle",
                algorithm_config=prepared.run / "algorithm.json",
                draft_vocab_cache=prepared.run / "d2t.pt",
                # The base does not run.
                export_offline_model=True,
                save=str(converted),
            )
        )
    interval = max(1, prepared.num_iterations // arguments.epochs)
    finetune.run(_finetune_arguments(arguments, prepared, interval=interval))
    last = find_checkpoint(training).iteration
    if last < prepared.num_iterations:
        say("stopped: give the same command to go on; epochs are written when the run is through")
        return
    for epoch in range(arguments.epochs):
        iteration = prepared.num_iterations if epoch == arguments.epochs - 1 else (epoch + 1) * interval
        if iteration > prepared.num_iterations:
            break
        export.run(
            ExportArguments(
                load=str(training),
                ckpt_step=iteration,
                export_dir=str(Path(arguments.save_path) / str(epoch)),
                export_format="speculators",
                export_extra_modules=True,
                overwrite=True,
            )
        )


def _finetune_arguments(
    arguments: SpeculatorsTrainArguments, prepared: Prepared, *, interval: int
) -> FinetuneArguments:
    """The run; by default in bfloat16 where there is a GPU."""
    return FinetuneArguments(
        load=str(prepared.run / "converted"),
        save=str(prepared.run / "training"),
        offline_distillation_data=str(prepared.run / "states"),
        split=prepared.split,
        num_epochs=arguments.epochs,
        lr=arguments.lr,
        save_interval=interval,
        eval_interval=interval,
        log_interval=1,
        logger=arguments.logger or None,
        bf16=torch.cuda.is_available(),
    )


def is_first_process() -> bool:
    """Whether this is rank 0 of torchrun, or alone. Asked before there are process groups: what takes hours does not
    keep others in a collective, and may use collectives of its own.
    """
    return int(os.environ.get("RANK", "0")) == 0


def _prepare(arguments: SpeculatorsTrainArguments) -> None:
    """Everything that the steps read, unless an earlier run left it."""
    base = find_base(arguments.verifier_name_or_path, field="verifier_name_or_path")
    reader = open_data(Path(arguments.data_path), seq_length=arguments.total_seq_len)
    check_base(reader.facts, base, where=Path(arguments.data_path))
    d2t = _draft_vocabulary(arguments, base)
    directory = _directory(arguments)
    _begin(directory, arguments, reader, base)
    draft = {
        "eagle_ttt_steps": arguments.ttt_steps,
        "eagle_loss_decay_factor": arguments.ttt_step_loss_decay,
        "eagle_architecture_config": {
            "num_hidden_layers": arguments.num_layers,
            "eagle_aux_hidden_state_layer_ids": list(reader.facts.aux_layer_ids),
        },
    }
    publish_file(directory / "algorithm.json", lambda path: path.write_text(json.dumps(draft, indent=2) + "\n"))
    publish_file(directory / "d2t.pt", lambda path: torch.save(d2t, path))
    states = directory / "states"
    if not (states / MANIFEST).exists():
        shutil.rmtree(states, ignore_errors=True)
        write_own(reader, states, base, storage=None)


def _directory(arguments: SpeculatorsTrainArguments) -> Path:
    return Path(arguments.log_dir) / (arguments.run_name or "run")


def _count(arguments: SpeculatorsTrainArguments, *, num_ranks: int) -> Prepared:
    """How long the run is."""
    directory = _directory(arguments)
    store = StatesStore(directory / "states")
    prepared = Prepared(directory, 0, _SPLITS[len(store) >= _SMALLEST_SPLIT])
    planned = _finetune_arguments(arguments, prepared, interval=1)
    seq_length = store.description.seq_length
    conversations = Conversations(
        store, planned.model_copy(update={"seq_length": seq_length}), global_batch_size=num_ranks
    )
    return prepared._replace(num_iterations=conversations.num_iterations)


def open_data(directory: Path, *, seq_length: int) -> JoinedReader:
    """What the data generation wrote: a directory, or all below it.

    Raises:
        ConfigError: none, or some that do not fit each other.
    """
    paths = sorted(path.parent for path in directory.rglob(DATA_CONFIG))
    if not paths:
        raise ConfigError(
            f"--data-path {directory} has no {DATA_CONFIG} in it or below; data_generation_offline.py writes it"
        )
    return JoinedReader([SPECULATORS_V1.open(path, LeftOpen()) for path in paths], seq_length=seq_length)


def _draft_vocabulary(arguments: SpeculatorsTrainArguments, base: BaseDirectory) -> torch.Tensor:
    where, vocab_size = f"--d2t-path {arguments.d2t_path}", base.architecture.vocab_size
    given = load_array(Path(arguments.d2t_path), flag="--d2t-path")
    d2t = check_draft_to_target(given, vocab_size=vocab_size, where=where)
    t2d = load_array(Path(arguments.t2d_path), flag="--t2d-path")
    if not torch.equal(t2d.to(torch.bool), target_to_draft(d2t, vocab_size=vocab_size)):
        raise ConfigError(f"--t2d-path {arguments.t2d_path} and {where} are of different vocabularies; make them again")
    return d2t


def _begin(directory: Path, arguments: SpeculatorsTrainArguments, reader: Reader, base: BaseDirectory) -> None:
    """See that a run in this directory is of the same request, or write it down.

    Raises:
        ConfigError: it is of another one.
    """
    asked = arguments.model_dump(mode="json", exclude={"resume_from_checkpoint", "save_path", "log_dir", "logger"})
    request = {
        **{name: os.path.abspath(value) if name.endswith("_path") else value for name, value in asked.items()},
        "base_fingerprint": base.identity.fingerprint,
        "num_documents": reader.facts.num_documents,
    }
    path = directory / _REQUEST
    if path.exists() and not arguments.resume_from_checkpoint:
        shutil.rmtree(directory)
    if path.exists():
        before = json.loads(path.read_text())
        differing = [name for name in request if before.get(name) != request[name]]
        if differing:
            name = differing[0]
            raise ConfigError(
                f"{directory} holds a run with {name} = {before.get(name)!r}, now it is {request[name]!r}; choose "
                "another --run-name, or begin anew with --no-resume-from-checkpoint"
            )
        return
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory} holds something else than a run of this script; choose another --run-name")
    directory.mkdir(parents=True, exist_ok=True)
    publish_file(path, lambda partial: partial.write_text(json.dumps(request, indent=2) + "\n"))

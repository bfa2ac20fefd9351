"""One training run of a draft on a transformers model: load, convert, train with Trainer, save."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mcore_spec.bases.transformers import TransformersBase
from mcore_spec.config import EagleConfig
from mcore_spec.config.files import ConfigFile, read_config_file
from mcore_spec.conversion import Conversion, conversion_of, convert, find_algorithm
from mcore_spec.data.chat import Tokenizer, load_tokenizer
from mcore_spec.data.hidden_states.fit import check_tokenizer_of, open_states
from mcore_spec.data.store import TokenStore, build_token_store
from mcore_spec.drafts.vocab_map import load_draft_to_target
from mcore_spec.errors import CheckpointError, ConfigError
from mcore_spec.export.modules import record_of_model_directory
from mcore_spec.hosting.base_run import TRAINS_BASE
from mcore_spec.hosting.key import CONFIG_KEY, DATA, QUANTIZATION_KEY, RATES
from mcore_spec.huggingface.arguments import DEFAULT_MODE, DraftArguments
from mcore_spec.huggingface.checkpointing import load_model
from mcore_spec.huggingface.data import ConversationDataset, DraftCollator
from mcore_spec.huggingface.offline import StatesCollator, StatesDataset
from mcore_spec.huggingface.record import fingerprints, trains_base
from mcore_spec.huggingface.trainer import DraftTrainer
from mcore_spec.weights.base_directory import find_base
from mcore_spec.weights.hf_config import locate, read_hf_config

# Beginnings of the names of files in a checkpoint that its model has no part in.
_OF_A_RUN = ("optimizer", "scheduler", "scaler", "rng_state")


def run(arguments: DraftArguments, training: TrainingArguments, *, say: Callable[[str], None]) -> None:
    """Train, and write the model with its draft to the output directory.

    A run that was interrupted there is continued.

    Args:
        arguments: of this run.
        training: transformers'; its process group is up.
        say: takes a line for the user.

    Raises:
        ConfigError: a file or a value that does not fit.
        CheckpointError: stored hidden states that are damaged, or of another base.
        UnsupportedError: a base that cannot carry a draft.
    """
    output = _find_output(arguments, training)
    _check_arguments(arguments, training)
    file = ConfigFile({}, where=f"{arguments.mode or DEFAULT_MODE} config")
    if arguments.eagle_config is not None:
        file = read_config_file(Path(arguments.eagle_config), name="--eagle_config")
    directory = locate(arguments.model_name_or_path, field="model_name_or_path")
    tokenizer = load_tokenizer(directory)
    model = load_model(directory, dtype=_dtype(arguments))
    model.config.name_or_path = arguments.model_name_or_path
    if arguments.data_path:
        architecture = TransformersBase(model).architecture
        architecture.check_seq_length(arguments.training_seq_len, option="--training_seq_len")
    vocab_size = model.config.vocab_size
    learned = conversion_of(model)
    if learned is not None:
        _check_goes_on(arguments, learned)
        how = "" if QUANTIZATION_KEY not in vars(model.config) else ", with quantised weights and inputs"
        say(f"goes on with the {learned.draft_class.label} draft of {arguments.model_name_or_path}{how}")
    else:
        d2t = None
        if arguments.draft_vocab_cache is not None:
            d2t = load_draft_to_target(Path(arguments.draft_vocab_cache), vocab_size=vocab_size)
        convert(model, _mode(arguments.mode or DEFAULT_MODE, file), d2t=d2t, seed=training.seed)
    training.remove_unused_columns = False

    def store(name: str, sources: list[str]) -> TokenStore:
        made = build_token_store(
            sources,
            tokenizer,
            cache_dir=output / "data_cache",
            seq_length=arguments.training_seq_len,
            vocab_size=vocab_size,
        )
        say(f"{name}: {made.counts.describe(cut_by='--training_seq_len')}")
        return made

    if arguments.data_path:
        learned_from = store("data", arguments.data_path)
        data = Data(ConversationDataset(learned_from), DraftCollator(), learned_from.fingerprint)
    else:
        data = _stored(arguments, model, directory)
    if arguments.eval_data_path:
        data = data._replace(measured=ConversationDataset(store("measured on", arguments.eval_data_path)))
    trainer = _trainer(model, tokenizer, training, data)
    checkpoint = _newest_checkpoint(output)
    if checkpoint is None:
        start = trainer.fit_start(arguments.fit_start) if learned is None else None
        if start is not None:
            say(f"the draft starts as the least-squares solution of {start.num_rows:,} rows (--fit_start)")
    else:
        _go_on_from(checkpoint, model, data)
        say(f"goes on from {checkpoint}")
    vars(model.config)[CONFIG_KEY][DATA] = data.fingerprint
    if not _train(trainer, checkpoint, output):
        assert checkpoint is not None, "from nothing there is something left"
        say(f"all {_num_steps(checkpoint)} steps were done before; raise --num_train_epochs or --max_steps to go on")


def _train(trainer: DraftTrainer, checkpoint: Path | None, output: Path) -> bool:
    """Train what is left and write the model; whether anything was left."""
    training, done = trainer.args, None if checkpoint is None else _num_steps(checkpoint)
    if checkpoint is not None and done is not None and 0 < training.max_steps <= done:
        # Trainer would train one step more.
        best = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).best_model_checkpoint
        if trainer.is_world_process_zero():
            _write_trained(Path(best) if training.load_best_model_at_end and best else checkpoint, output)
            shutil.copy2(checkpoint / TRAINER_STATE_NAME, output)
        return False
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_state()
    trainer.save_model(str(output))
    return trainer.state.global_step != done


def _check_arguments(arguments: DraftArguments, training: TrainingArguments) -> None:
    """Refuse options that contradict each other, and a run of no steps.

    Raises:
        ConfigError: names them.
    """
    if bool(arguments.data_path) == (arguments.offline_data is not None):
        both = "both are given" if arguments.data_path else "neither is given"
        raise ConfigError(f"--data_path or --offline_data: {both}; give conversations or stored hidden states")
    if (training.eval_strategy != "no") != bool(arguments.eval_data_path):
        raise ConfigError("--eval_strategy and --eval_data_path need each other; give both or neither")
    if arguments.eval_data_path and arguments.offline_data is not None:
        raise ConfigError("--eval_data_path with --offline_data: the base does not run; measure with ar_validate.py")
    if training.num_train_epochs <= 0 and training.max_steps <= 0:
        raise ConfigError(
            f"--num_train_epochs = {training.num_train_epochs}: nothing would be learned; give more than 0, or "
            "--max_steps"
        )


def _check_goes_on(arguments: DraftArguments, learned: Conversion) -> None:
    """Refuse options that are about a new draft, where the model has one that goes on.

    Raises:
        ConfigError: names the option.
    """
    kind = learned.config.algorithm if isinstance(learned.config, EagleConfig) else learned.algorithm
    given = {
        f"--mode {arguments.mode}": arguments.mode not in (None, kind),
        f"--eagle_config {arguments.eagle_config}": arguments.eagle_config is not None,
        f"--draft_vocab_cache {arguments.draft_vocab_cache}": arguments.draft_vocab_cache is not None,
        f"--fit_start {arguments.fit_start}": bool(arguments.fit_start),
        f"--offline_data {arguments.offline_data}": arguments.offline_data is not None,
    }
    for option, is_wrong in given.items():
        if is_wrong:
            raise ConfigError(
                f"{option}: {arguments.model_name_or_path} has a draft already ({kind}), which goes on as it is, "
                "beside its base; leave the option out, or give the base that it was made from"
            )


def _find_output(arguments: DraftArguments, training: TrainingArguments) -> Path:
    """Where the model is written.

    Raises:
        ConfigError: nowhere, or where nothing may be written.
    """
    if training.output_dir is None:
        raise ConfigError("--output_dir is missing; give the directory that the trained model is written to")
    output = Path(training.output_dir)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output_dir {output} is a file; give a directory")
    if output.resolve() == Path(arguments.model_name_or_path).resolve():
        raise ConfigError(f"--output_dir {output} is the base's directory, whose files would be replaced; give another")
    return output


def _newest_checkpoint(output: Path) -> Path | None:
    """The last one that is whole: Trainer writes its state last, and a run that was killed may have left others."""
    whole = [file.parent for file in output.glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*/{TRAINER_STATE_NAME}")]
    return max(whole, key=_num_steps, default=None)


def _num_steps(checkpoint: Path) -> int:
    """Steps behind which it was written."""
    return int(checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


def _write_trained(checkpoint: Path, output: Path) -> None:
    """Put out the model of a checkpoint, without what only a run that goes on reads."""
    for file in checkpoint.iterdir():
        if file.is_file() and not file.name.startswith(_OF_A_RUN):
            shutil.copy2(file, output)


def _go_on_from(checkpoint: Path, model: PreTrainedModel, data: Data) -> None:
    """Take over what the configuration there says of the run's start.

    Another draft is refused, whose tensors of other names Trainer would leave out without an error, and another base,
    over which Trainer would load the one there.

    Raises:
        CheckpointError: another algorithm or configuration, another base, or other data.
    """
    written = read_hf_config(checkpoint)
    recorded = written.get(CONFIG_KEY, {})
    own = vars(model.config)[CONFIG_KEY]
    remedy = "give the same to go on, or another --output_dir"
    if any(recorded.get(name) != own[name] for name in ("algorithm", "config")):
        raise CheckpointError(
            f"{checkpoint} is of a run that trains another draft than --mode and --eagle_config say; {remedy}"
        )
    conversion, found = conversion_of(model), record_of_model_directory(checkpoint)
    assert conversion is not None, "the model was converted"
    assert found is not None, "its configuration was just compared"
    bases = fingerprints(TransformersBase(model))
    if bases and not trains_base(conversion) and found.record.identity.fingerprint not in bases:
        raise CheckpointError(
            f"{checkpoint} is of a run on another base than --model_name_or_path, or in another dtype; {remedy}"
        )
    if recorded.get(DATA, data.fingerprint) != data.fingerprint:
        raise CheckpointError(
            f"{checkpoint} is of a run that learns from other data, or from the same with another --training_seq_len "
            f"or tokenizer; {remedy}"
        )
    if RATES in recorded:
        own[RATES] = recorded[RATES]
    if written.get(QUANTIZATION_KEY) != vars(model.config).get(QUANTIZATION_KEY):
        raise CheckpointError(
            f"{checkpoint} is of a run whose model is quantised in another way than --model_name_or_path, or one of "
            f"the two is not; {remedy}"
        )


def _dtype(arguments: DraftArguments) -> Any:
    if arguments.param_dtype != "auto":
        return vars(torch)[arguments.param_dtype]
    return "auto" if torch.cuda.is_available() else torch.float32


def _mode(mode: str, file: ConfigFile) -> list[tuple[str, Any]]:
    """The file over the defaults, as `convert` takes it."""
    name = "medusa" if mode == "medusa" else "eagle"
    configure = find_algorithm(name).configure
    assert configure is not None, "both algorithms read files"
    flags = {} if name == "medusa" else {"export_eagle_algorithm": mode}
    return [(name, configure(flags, file))]


class Data(NamedTuple):
    """What is learned from.

    Attributes:
        dataset: its documents.
        collator: makes them into batches.
        fingerprint: of what they are and of their order.
        measured: what is measured on between; ``None``: nothing is.
    """

    dataset: Dataset[Any]
    collator: DraftCollator | StatesCollator
    fingerprint: str
    measured: ConversationDataset | None = None


def _stored(arguments: DraftArguments, model: PreTrainedModel, directory: Path) -> Data:
    """Hidden states of the base, from a store.

    Raises:
        ConfigError: a base that is to be trained too.
    """
    path, name, conversion = Path(arguments.offline_data or ""), "offline_data", conversion_of(model)
    assert conversion is not None, "the model was converted"
    task = find_algorithm(conversion.algorithm).task(conversion.config)
    if task.trains_base:
        raise ConfigError(
            f"--offline_data with {TRAINS_BASE}: the base would have to run where it trains; train on --data_path"
        )
    base = find_base(str(directory), field="model_name_or_path")
    store = open_states(path, base.architecture, base.identity, aux_layer_ids=task.aux_layer_ids, name=name)
    check_tokenizer_of(store, directory, name=name)
    states = StatesDataset(store, TransformersBase(model), aux_layer_ids=task.aux_layer_ids)
    return Data(states, StatesCollator(), store.fingerprint)


def _trainer(model: PreTrainedModel, tokenizer: Tokenizer, training: TrainingArguments, data: Data) -> DraftTrainer:
    if training.n_gpu > 1:
        # Trainer would put copies of the model into threads, which a draft's forward cannot tell apart.
        raise ConfigError(
            f"one process sees {training.n_gpu} GPUs; start one for each (launch_train.sh --num_gpu {training.n_gpu}), "
            "or let it see one (CUDA_VISIBLE_DEVICES)"
        )
    trainer = DraftTrainer(
        model=model,
        args=training,
        processing_class=cast(Any, tokenizer),
        train_dataset=data.dataset,
        eval_dataset=data.measured,
        data_collator=data.collator,
    )
    size = trainer.get_cp_size()
    if size > 1 and isinstance(data.collator, DraftCollator):
        trainer.data_collator = DraftCollator(multiple=2 * size)
    return trainer

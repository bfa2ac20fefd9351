"""speculators' data generation: conversations and the base's hidden states in its version 1, token counts."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch

from mcore_spec.cli.base_limits import choose_layers
from mcore_spec.cli.extract_engine import SCRATCH, load_engine
from mcore_spec.cli.speculators_arguments import DataGenerationArguments
from mcore_spec.cli.terminal import say
from mcore_spec.data.chat import ChatEncoder, load_tokenizer
from mcore_spec.data.document import Document, DocumentSource, IntArray
from mcore_spec.data.durable_files import publish_file
from mcore_spec.data.foreign_states.form import Facts, to_output_ids
from mcore_spec.data.foreign_states.speculators_v1 import DATA_CONFIG, SpeculatorsV1Writer
from mcore_spec.data.hidden_states import StatesStore, StoreDescription
from mcore_spec.data.hidden_states.plan import ExtractionPlan, cache_beside
from mcore_spec.data.store import build_token_store
from mcore_spec.engines.extract import Engine, extract
from mcore_spec.errors import ConfigError
from mcore_spec.planning.states import StatesDtype
from mcore_spec.weights.base_directory import BaseDirectory, find_base

# By speculators' names; what cannot be read in public sets is left out and counted.
DATASETS = {
    "sharegpt": "Aeala/ShareGPT_Vicuna_unfiltered:train",
    "ultrachat": "HuggingFaceH4/ultrachat_200k:train_sft",
}
TOKEN_FREQ = "token_freq.pt"
# What was computed and not written in speculators' form yet.
_STATES = ".states"


class PickedDocuments:
    """Some documents of a source, in another order; a `DocumentSource`."""

    def __init__(self, source: DocumentSource, numbers: IntArray) -> None:
        """`numbers` of the documents, in the order that they get."""
        self._source, self._numbers = source, numbers
        self.lengths: IntArray = np.asarray(source.lengths)[numbers]

    def document(self, index: int) -> Document:
        """The document that stands at `index` now."""
        return self._source.document(int(self._numbers[index]))


def run(arguments: DataGenerationArguments) -> None:
    """Tokenise, count, compute, write; a run that was interrupted goes on when it is given again."""
    output = Path(arguments.output_dir)
    if (output / DATA_CONFIG).exists():
        raise ConfigError(f"--output-dir {output} holds a finished set ({DATA_CONFIG}); choose another directory")
    base = find_base(arguments.target_model_path, field="target_model_path")
    plan = _plan(arguments, base)
    say(f"{output}: {plan.describe_size()}")
    count_path = Path(arguments.token_freq_path or output / TOKEN_FREQ)
    _write_counts(plan, count_path)
    states = output / _STATES
    engine = _load(arguments, plan, base, states / SCRATCH)
    try:
        extract(_describe(plan, arguments), plan.documents, engine, states, batch_size=arguments.batch_size)
    finally:
        engine.close()
    facts = Facts(
        source=base.identity.source,
        aux_layer_ids=plan.aux_layer_ids,
        last_is_normed=False,
        hidden_size=base.architecture.hidden_size,
        num_documents=plan.num_documents,
        seq_length=arguments.seq_length,
    )
    _write(StatesStore(states), SpeculatorsV1Writer(output, facts, base.architecture.num_layers))
    shutil.rmtree(states)
    say(f"done: {plan.num_documents:,} conversations in {output}, counts of their tokens in {count_path}")


def _plan(arguments: DataGenerationArguments, base: BaseDirectory) -> ExtractionPlan:
    output = Path(arguments.output_dir)
    given = DATASETS.get(arguments.train_data_path)
    base.architecture.check_seq_length(arguments.seq_length)
    tokenizer = load_tokenizer(base.directory)
    store = build_token_store(
        [given or arguments.train_data_path],
        tokenizer,
        cache_dir=Path(arguments.cache_dir or cache_beside(output)),
        seq_length=arguments.seq_length,
        on_bad_line="skip" if given else "error",
        vocab_size=base.architecture.vocab_size,
    )
    order = np.random.default_rng(arguments.seed).permutation(len(store))
    numbers = order[: arguments.max_samples or len(store)]
    last = base.architecture.num_layers
    dtype: StatesDtype = "float32" if base.architecture.dtype == "float16" else base.architecture.dtype
    plan = ExtractionPlan(
        architecture=base.architecture,
        identity=base.identity,
        conversations=store,
        tokenizer_fingerprint=ChatEncoder(tokenizer).fingerprint(),
        num_documents=len(numbers),
        aux_layer_ids=choose_layers(
            to_output_ids([i for i in arguments.layer_ids if i != last], "boundary"), base.architecture
        ),
        dtype=dtype,
        documents=PickedDocuments(store, numbers),
    )
    return plan


def _describe(plan: ExtractionPlan, arguments: DataGenerationArguments) -> StoreDescription:
    """Of what is computed first: last states before the final norm, conversations in an order of their own."""
    about = plan.describe(arguments.engine)
    drawn = hashlib.sha256(f"{about.conversation_fingerprint}, order {arguments.seed}".encode()).hexdigest()
    return about.model_copy(update={"last_is_normed": False, "conversation_fingerprint": drawn})


def _load(arguments: DataGenerationArguments, plan: ExtractionPlan, base: BaseDirectory, scratch: Path) -> Engine:
    if arguments.engine == "vllm":
        return load_engine(
            "vllm",
            plan,
            base.directory,
            scratch=scratch,
            dtype="auto",
            tensor_parallel_size=arguments.tensor_parallel_size,
        )
    if arguments.tensor_parallel_size != 1:
        raise ConfigError(
            "--tensor-parallel-size: transformers runs on one device; give --engine vllm, or leave it out"
        )
    # In vLLM's environment, transformers models are not looked at.
    from mcore_spec.engines.transformers import TransformersEngine

    return TransformersEngine(
        base.directory, num_layers=plan.architecture.num_layers, aux_layer_ids=plan.aux_layer_ids, norm_last=False
    )


def _write(store: StatesStore, writer: SpeculatorsV1Writer) -> None:
    for index in range(len(store)):
        writer.append(index, store.states(index))
    writer.finish()


def _write_counts(plan: ExtractionPlan, path: Path) -> None:
    """How often each token is to be produced, a dictionary as speculators writes it."""
    counts = np.zeros(plan.architecture.vocab_size, dtype=np.int64)
    for index in range(plan.num_documents):
        document = plan.documents.document(index)
        counts += np.bincount(document.token_ids[document.mask], minlength=len(counts))
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {int(token): int(counts[token]) for token in np.flatnonzero(counts)}
    publish_file(path, lambda partial: torch.save(found, partial))

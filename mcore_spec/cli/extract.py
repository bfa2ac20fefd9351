"""``mcore-spec extract``: the base runs alone over conversations, its hidden states go to disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron.core.models.gpt import GPTModel

from mcore_spec.bases.extraction import DataShare, RunningBase, extract_states
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.megatron_build import check_layout
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.checkpoint.store import Checkpoint, find_checkpoint, load_checkpoint
from mcore_spec.cli.arguments import DTYPE_NAMES
from mcore_spec.cli.base_limits import choose_layers
from mcore_spec.cli.conversations import choose_tokenizer, read_conversations
from mcore_spec.cli.convert import layout_of
from mcore_spec.cli.extract_arguments import ExtractArguments, StoredStatesArguments
from mcore_spec.cli.terminal import say
from mcore_spec.config import BaseArchitecture, BaseIdentity
from mcore_spec.data.chat import ChatEncoder, load_tokenizer
from mcore_spec.data.document import DocumentSource
from mcore_spec.data.hidden_states.plan import ExtractionPlan, TrimmedDocuments, cache_beside
from mcore_spec.data.store import TokenStore
from mcore_spec.errors import CheckpointError
from mcore_spec.export.plan import exported_record
from mcore_spec.parallel.layout import device, is_rank_zero, parallel_runtime, run_on_rank_zero
from mcore_spec.planning.states import STORAGE_DTYPES
from mcore_spec.training.log import ProgressBar
from mcore_spec.training.signals import stop_on_signal
from mcore_spec.training.step import check_trainable


def run(arguments: ExtractArguments) -> None:
    """Tokenise, say what it will take, load the base, extract."""
    layout = replace(layout_of(arguments), context=arguments.context_parallel_size)
    with parallel_runtime(layout):
        checkpoint = run_on_rank_zero(lambda: _find_base(arguments))
        base, identity = checkpoint.record.base, checkpoint.record.identity
        check_layout(base, layout)
        tokenizer = choose_tokenizer(checkpoint, arguments.tokenizer_model)
        store = read_conversations(arguments, base, tokenizer, cache_dir=cache_beside(Path(arguments.output_dir)))
        plan = make_plan(arguments, base, identity, store, tokenizer, own_layers=_layers_of_draft(checkpoint.record))
        model = load_checkpoint(checkpoint, layout, transformer_impl=arguments.transformer_impl)
        extract(MegatronBase(model), plan, arguments, backend="megatron", share=_share(model))


def _find_base(arguments: ExtractArguments) -> Checkpoint:
    checkpoint = find_checkpoint(Path(arguments.load), step=arguments.ckpt_step)
    record = checkpoint.record
    record.check_has_layers("extract", remedy="extract with the checkpoint of the whole base")
    what = "a store of hidden states is known by the base's own weights"
    record.check_not_quantized(what, remedy="extract with the checkpoint that it was made from")
    if exported_record(record) != record:
        raise CheckpointError(
            f"{what}, and load = {arguments.load} has trained the base of {record.identity.source} with its draft: "
            "export both (export --export-dir DIR), and extract with extract-hf --pretrained-model-path DIR"
        )
    if arguments.params_dtype == "auto":
        return checkpoint
    base = checkpoint.record.base.model_copy(update={"dtype": DTYPE_NAMES[arguments.params_dtype]})
    return checkpoint._replace(record=checkpoint.record.model_copy(update={"base": base}))


def _layers_of_draft(record: CheckpointRecord) -> tuple[int, ...] | None:
    return None if record.conversion is None else check_trainable(record).aux_layer_ids


def _share(model: GPTModel) -> DataShare:
    groups = model.pg_collection
    return DataShare(rank=groups.dp.rank(), size=groups.dp.size(), context_group=groups.cp, device=device())


def make_plan(
    arguments: StoredStatesArguments,
    base: BaseArchitecture,
    identity: BaseIdentity,
    store: TokenStore,
    tokenizer: str | Path,
    *,
    own_layers: tuple[int, ...] | None,
) -> ExtractionPlan:
    """What the command asks for.

    Args:
        arguments: of the command.
        base: that runs.
        identity: of its weights.
        store: the conversations.
        tokenizer: directory or hub id of what tokenised them.
        own_layers: that the draft on the base reads; ``None``: there is none.

    Raises:
        ConfigError: layers that the base does not have, or a store above --max-bytes.
    """
    layers = own_layers if arguments.aux_layer_ids is None else arguments.aux_layer_ids
    if layers is None or arguments.aux_layer_ids is not None:
        layers = choose_layers(layers, base)
    documents: DocumentSource = TrimmedDocuments(store) if arguments.drop_tail else store
    plan = ExtractionPlan(
        architecture=base,
        identity=identity,
        conversations=store,
        tokenizer_fingerprint=run_on_rank_zero(lambda: ChatEncoder(load_tokenizer(tokenizer)).fingerprint()),
        num_documents=min(arguments.num_samples or len(store), len(store)),
        aux_layer_ids=layers,
        dtype=STORAGE_DTYPES[arguments.storage_dtype],
        documents=documents,
    )
    say(f"{arguments.output_dir}: {plan.describe_size()}")
    plan.check_bytes(arguments.max_bytes)
    return plan


def extract(
    base: RunningBase, plan: ExtractionPlan, arguments: StoredStatesArguments, *, backend: str, share: DataShare
) -> None:
    """Run it, with a bar, until it is done or somebody asks to stop."""
    directory = Path(arguments.output_dir)
    bar = ProgressBar(num_iterations=plan.num_documents, iteration=0, is_shown=is_rank_zero())
    with stop_on_signal() as stop:
        try:
            extracted = extract_states(
                base,
                plan,
                directory,
                backend=backend,
                share=share,
                rows_at_once=arguments.seq_length * arguments.micro_batch_size,
                is_stopped=lambda: stop.is_made_anywhere(share.device),
                advance=bar.advance,
                max_shard_bytes=arguments.max_shard_bytes,
            )
        finally:
            bar.close()
    before = f", {extracted.num_before:,} were there" if extracted.num_before else ""
    state = "done" if extracted.is_finished else "stopped, give the same command to go on"
    say(f"{state}: {extracted.num_computed:,} of {plan.num_documents:,} conversations added{before}; in {directory}")

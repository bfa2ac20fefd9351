"""Loading a base with its draft for evaluation, from a checkpoint or from two directories."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mcore_spec.bases.megatron_build import BaseGPTModel, build_gpt_model, check_layout
from mcore_spec.checkpoint.store import find_checkpoint, load_checkpoint
from mcore_spec.cli.arguments import DTYPE_NAMES, ParamsDtype
from mcore_spec.cli.evaluation_arguments import DecodingArguments, DraftedBaseArguments
from mcore_spec.cli.terminal import say
from mcore_spec.config import BaseArchitecture
from mcore_spec.errors import ConfigError
from mcore_spec.evaluation.prompts import TokenizerPrompts
from mcore_spec.evaluation.tree import Topology
from mcore_spec.evaluation.typical import TypicalAcceptance
from mcore_spec.export.modules import draft_names
from mcore_spec.export.reader import attach_read, read_exported
from mcore_spec.parallel.layout import Layout, run_on_rank_zero
from mcore_spec.quantization.modes import round_weights
from mcore_spec.weights.hf_config import (
    check_not_quantized,
    describe_hf,
    locate,
    mtp_names,
    read_hf_config,
    without_mtp,
)
from mcore_spec.weights.hf_import import import_hf
from mcore_spec.weights.safetensors_io import WeightDirectory


class DraftedBase(NamedTuple):
    """A model on this rank, and its tokenizer."""

    model: BaseGPTModel
    prompts: TokenizerPrompts


def load_drafted_base(arguments: DraftedBaseArguments, layout: Layout) -> DraftedBase:
    """Load both, to compute and not to be trained; what can be checked without weights is checked first.

    All ranks take part.

    Raises:
        ConfigError: no tokenizer, or a layout that does not divide the base.
        CheckpointError: damaged files, or a draft of another base.
        UnsupportedError: a base that this package cannot represent, or a quantised one.
    """
    if arguments.load is None:
        return _from_directories(arguments, layout)
    checkpoint = run_on_rank_zero(lambda: find_checkpoint(Path(str(arguments.load)), step=arguments.ckpt_step))
    record = checkpoint.record
    if record.conversion is None:
        raise ConfigError(f"load = {arguments.load} has no draft; attach one first (mcore-spec convert)")
    record.check_has_layers(
        "decoding", remedy="export the draft and give both, --base HF_DIRECTORY --draft EXPORT_DIRECTORY"
    )
    base = _with_dtype(record.base, arguments.params_dtype)
    check_layout(base, layout)
    tokenizer = checkpoint.choose_tokenizer(arguments.tokenizer_model)
    prompts = TokenizerPrompts(tokenizer, vocab_size=base.vocab_size, config=record.identity.hf_config)
    checkpoint = checkpoint._replace(record=record.model_copy(update={"base": base}))
    model = load_checkpoint(checkpoint, layout)
    round_weights(model)
    return DraftedBase(model, prompts)


def _from_directories(arguments: DraftedBaseArguments, layout: Layout) -> DraftedBase:
    directory, draft = locate(str(arguments.base), field="base"), Path(str(arguments.draft))
    given = read_hf_config(directory)
    check_not_quantized(given, what=f"base = {arguments.base}")
    raw = without_mtp(given)
    stored = describe_hf(raw, where=str(directory / "config.json"))
    base = _with_dtype(stored, arguments.params_dtype)
    check_layout(base, layout)
    exported = read_exported(draft, base)
    for note in exported.notes:
        say(f"note: {note}")
    identity = exported.record.identity
    tokenizer = arguments.tokenizer_model or str(directory)
    prompts = TokenizerPrompts(tokenizer, vocab_size=base.vocab_size, config=raw)
    model = build_gpt_model(base, layout)
    with WeightDirectory(directory, without=(*draft_names(raw), *mtp_names(given))) as weights:
        # The weights of a base that was trained with its draft are not recorded.
        if identity.fingerprint and weights.fingerprint() != identity.fingerprint:
            say(
                f"note: {draft} was made for {identity.source}, whose weights are not those in {directory}; "
                "its proposals fit less well"
            )
        import_hf(model, weights, cast=base.dtype != stored.dtype)
    attach_read(model, exported)
    round_weights(model)
    return DraftedBase(model, prompts)


def _with_dtype(base: BaseArchitecture, params_dtype: ParamsDtype) -> BaseArchitecture:
    return base if params_dtype == "auto" else base.model_copy(update={"dtype": DTYPE_NAMES[params_dtype]})


def topology_of(arguments: DecodingArguments) -> Topology:
    """What is proposed.

    Raises:
        ConfigError: a tree that is none.
    """
    if arguments.tree is not None:
        return Topology.parse(arguments.tree)
    if arguments.top_k > 1:
        return Topology.comb(arguments.steps, top_k=arguments.top_k)
    return Topology.chain(arguments.steps)


def typical_of(arguments: DecodingArguments) -> TypicalAcceptance | None:
    """How proposals are accepted; ``None``: exactly."""
    if arguments.acceptance == "exact":
        return None
    return TypicalAcceptance(
        temperature=arguments.temperature, epsilon=arguments.typical_epsilon, delta=arguments.typical_delta
    )


def sampling_temperature(arguments: DecodingArguments) -> float:
    """Of what is drawn; typical acceptance draws nothing."""
    return arguments.temperature if arguments.acceptance == "exact" else 0.0

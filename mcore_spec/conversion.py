"""Attaching a draft to a base: the registry of algorithms, and `convert`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.config import BaseArchitecture, EagleConfig, MedusaConfig, StrictConfig
from mcore_spec.drafts.draft import Draft
from mcore_spec.drafts.eagle1 import Eagle1Draft
from mcore_spec.drafts.eagle3 import Eagle3Draft
from mcore_spec.drafts.medusa import MedusaDraft
from mcore_spec.drafts.mtp import MTPDraft
from mcore_spec.drafts.resolve import resolve_eagle
from mcore_spec.drafts.vocab_map import check_draft_to_target
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.parallel.tensor_parallel import Placement

# The ways to name a mode: "medusa"; [("eagle", {...})]; a preset, {"algorithm": "eagle", "config": {...}}, or the
# configuration in it alone.
Mode: TypeAlias = str | Mapping[str, Any] | Sequence[tuple[str, Mapping[str, Any] | StrictConfig]]
Resolve: TypeAlias = Callable[[Any, BaseArchitecture], Any]
Build: TypeAlias = Callable[..., Draft]


class Algorithm(NamedTuple):
    """What the registry knows about one algorithm.

    Attributes:
        config_class: what a user writes.
        child_name: attribute of the model that the draft becomes.
        resolve: fills in what the base decides.
        build: the draft module from a resolved configuration.
    """

    config_class: type[StrictConfig]
    child_name: str
    resolve: Resolve
    build: Build


def _build_eagle(config: EagleConfig, base: BaseArchitecture, *, place: Placement) -> Draft:
    drafts: dict[str, Build] = {"eagle1": Eagle1Draft, "eagle3": Eagle3Draft, "eagle-mtp": MTPDraft}
    return drafts[config.algorithm](config, base, place=place)


ALGORITHMS: dict[str, Algorithm] = {
    "eagle": Algorithm(EagleConfig, "eagle_module", resolve_eagle, _build_eagle),
    "medusa": Algorithm(MedusaConfig, "medusa_heads", lambda config, _base: config, MedusaDraft),
}


class Conversion(nn.Module):
    """The record of a conversion, a child of the model on every stage; it has no tensors."""

    def __init__(self, algorithm: str, config: StrictConfig) -> None:
        """Take the record.

        Args:
            algorithm: a key of `ALGORITHMS`.
            config: resolved against the base.
        """
        super().__init__()
        self.algorithm, self.config = algorithm, config

    def extra_repr(self) -> str:
        """The algorithm and every field."""
        return f"{self.algorithm}, {self.config!r}"


def parse_mode(mode: Mode) -> tuple[str, StrictConfig]:
    """Algorithm and configuration from any of the three forms.

    Raises:
        ConfigError: not one of the forms, an unknown algorithm, or a configuration that does not validate.
    """
    name, values = _name_and_values(mode)
    if name not in ALGORITHMS:
        raise ConfigError(f"algorithm {name!r} is not known; choose one of {', '.join(ALGORITHMS)}")
    config_class = ALGORITHMS[name].config_class
    if isinstance(values, StrictConfig):
        if not isinstance(values, config_class):
            raise ConfigError(f"algorithm {name!r} takes a {config_class.__name__}, got {type(values).__name__}")
        return name, values
    return name, config_class.parse(values, where=f"{name} config")


def _name_and_values(mode: Mode) -> tuple[str, Mapping[str, Any] | StrictConfig]:
    if isinstance(mode, str):
        return mode, {}
    if isinstance(mode, Mapping) and set(mode) == {"algorithm", "config"}:
        return mode["algorithm"], mode["config"]
    if isinstance(mode, Mapping):
        fitting = [name for name, known in ALGORITHMS.items() if mode.keys() & known.config_class.model_fields.keys()]
        if len(fitting) == 1:
            return fitting[0], mode
    elif isinstance(mode, list | tuple) and len(mode) == 1 and len(mode[0]) == 2:
        return mode[0]
    raise ConfigError(
        f"mode = {mode!r} must name exactly one algorithm: [(name, config)], a preset or its configuration, or one of "
        f"the names {', '.join(ALGORITHMS)}"
    )


def conversion_of(model: nn.Module) -> Conversion | None:
    """The record of the model's conversion, if it was converted."""
    records = [child for child in model.children() if isinstance(child, Conversion)]
    return records[0] if records else None


def convert(model: nn.Module, mode: Mode, *, d2t: Tensor | None = None, seed: int = 1234) -> nn.Module:
    """Attach a draft to `model`, in place, and freeze the base.

    The draft becomes ``model.eagle_module`` or ``model.medusa_heads``, on the last pipeline stage. Every rank of
    the model must call.

    Args:
        model: a megatron-core `GPTModel`, this rank's part.
        mode: ``"medusa"``, a preset such as `EAGLE3_DEFAULT_CFG` or its ``"config"``, or ``[("eagle", {...})]``.
        d2t: draft vocabulary, int64 [draft vocabulary] with target id = i + d2t[i]; needed where the draft
            vocabulary is smaller than the base's.
        seed: of the initial weights; they do not depend on the parallel layout.

    Returns:
        The same object.

    Raises:
        ConfigError: a configuration that does not fit the base, or a model that has a draft already.
        UnsupportedError: a model or a combination that cannot be converted.
    """
    name, config = parse_mode(mode)
    base = _as_base(model)
    if d2t is not None:
        d2t = check_draft_to_target(d2t, vocab_size=base.architecture.vocab_size, where="d2t")
    config = ALGORITHMS[name].resolve(with_draft_vocabulary(config, d2t), base.architecture)
    check_convertible(config, d2t)
    draft = attach(base, name, config)
    _copy_base_weights(base, draft, config, d2t=d2t, seed=seed)
    return model


def attach(base: MegatronBase, algorithm: str, config: StrictConfig) -> Draft | None:
    """Add the draft's modules with unset weights, as `convert` and loading a checkpoint both need.

    Args:
        base: without a draft.
        algorithm: a key of `ALGORITHMS`.
        config: resolved.

    Returns:
        The draft on the last stage, ``None`` on the others.

    Raises:
        ConfigError: the model has a draft already.
    """
    existing = conversion_of(base.model)
    if existing is not None:
        raise ConfigError(f"the model has a draft already ({existing.algorithm}); convert the base it was made from")
    record = ALGORITHMS[algorithm]
    place = Placement(tp=base.tp, device=torch.device("meta"))
    if base.is_last_stage:
        place = Placement(tp=base.tp, dtype=base.head_weight().dtype, device=base.head_weight().device)
    # Every stage builds it, the others without memory: what does not fit is refused on every rank, where the
    # last stage alone would leave the others waiting for it.
    draft: Draft | None = record.build(config, base.architecture, place=place)
    if not base.is_last_stage:
        draft = None
    base.model.add_module("draft_conversion", Conversion(algorithm, config))
    if draft is not None:
        base.model.add_module(record.child_name, draft)
    if not isinstance(config, EagleConfig) or config.eagle_freeze_base_model:
        base.freeze()
    return draft


def with_draft_vocabulary(config: StrictConfig, d2t: Tensor | None) -> StrictConfig:
    """Take the draft vocabulary's size from `d2t` where the configuration leaves it open.

    Raises:
        ConfigError: the configuration says another size.
    """
    if d2t is None:
        return config
    if not isinstance(config, EagleConfig):
        raise ConfigError("d2t is for EAGLE-3: other drafts speak the base's whole vocabulary")
    architecture = config.eagle_architecture_config
    given, size = architecture.draft_vocab_size, int(d2t.shape[0])
    if given not in (None, size):
        raise ConfigError(f"draft_vocab_size = {given} but d2t has {size} entries; make the two agree")
    architecture = architecture.model_copy(update={"draft_vocab_size": size})
    return config.model_copy(update={"eagle_architecture_config": architecture})


def check_convertible(config: StrictConfig, d2t: Tensor | None) -> None:
    """Refuse what would convert but not serve.

    Raises:
        ConfigError: a reduced draft vocabulary without its mapping.
        UnsupportedError: an option whose training is not built.
    """
    if not isinstance(config, EagleConfig):
        return
    architecture = config.eagle_architecture_config
    assert architecture.draft_vocab_size is not None
    assert architecture.vocab_size is not None
    if architecture.draft_vocab_size < architecture.vocab_size and d2t is None:
        raise ConfigError(
            f"draft_vocab_size = {architecture.draft_vocab_size} is smaller than the base's vocabulary of "
            f"{architecture.vocab_size}: give the mapping d2t (--draft-vocab-cache), or an engine would "
            "propose the first ids"
        )
    if config.eagle_offline:
        raise UnsupportedError("eagle_offline = true: training from stored hidden states is not built yet")


def _as_base(model: nn.Module) -> MegatronBase:
    from megatron.core.models.gpt import GPTModel

    if not isinstance(model, GPTModel):
        raise UnsupportedError(f"convert() takes a megatron-core GPTModel, got {type(model).__name__}")
    return MegatronBase(model)


@torch.no_grad()
def _copy_base_weights(
    base: MegatronBase, draft: Draft | None, config: StrictConfig, *, d2t: Tensor | None, seed: int
) -> None:
    if draft is not None:
        draft.init_weights(seed=seed)
        if isinstance(draft, Eagle3Draft) and draft.has_reduced_vocabulary:
            assert d2t is not None
            draft.d2t.copy_(d2t)
        heads = draft.own_heads()
        if heads:
            first, num_rows = heads[0].first_row, heads[0].num_valid_rows()
            rows = base.head_rows(draft.head_token_ids(), first=first, stop=first + num_rows)
            for head in heads:
                head.load_rows(rows)
        if isinstance(config, EagleConfig) and config.eagle_reuse_base_decoder:
            draft.get_submodule("layers.0").load_state_dict(base.last_layer_weights())
    if isinstance(config, EagleConfig):
        base.copy_embedding_to_last_stage()

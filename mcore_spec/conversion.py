"""Attaching a draft to a base: what an algorithm is, and `convert`."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from mcore_spec.bases.base import Base
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.config import ALGORITHMS, BaseArchitecture, DraftInit, StrictConfig, suggest
from mcore_spec.config.files import ConfigFile
from mcore_spec.config.quantization import QuantizationRecord
from mcore_spec.drafts.draft import Draft
from mcore_spec.drafts.vocab_map import check_draft_to_target
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.hosting.key import QUANTIZATION_KEY
from mcore_spec.objectives.objective import MakeTask, Task
from mcore_spec.parallel.tensor_parallel import Placement

if TYPE_CHECKING:
    from mcore_spec.bases.transformers import TransformersBase

# The ways to name a mode: "medusa"; [("eagle", {...})]; a preset, {"algorithm": "eagle", "config": {...}}, or the
# configuration in it alone.
Mode: TypeAlias = str | Mapping[str, Any] | Sequence[tuple[str, Mapping[str, Any] | StrictConfig]]
Resolve: TypeAlias = Callable[[Any, BaseArchitecture, Tensor | None], Any]


def resolve_as_given(config: Any, _base: BaseArchitecture, d2t: Tensor | None) -> Any:
    """For drafts that take nothing from the base but its sizes, and speak its whole vocabulary.

    Raises:
        ConfigError: a draft vocabulary.
    """
    if d2t is not None:
        raise ConfigError(
            f"d2t is given, but the draft of a {type(config).__name__} speaks the base's whole vocabulary: "
            "leave it (--draft-vocab-cache) out"
        )
    return config


def train_not_built(_config: Any) -> Task:
    """For drafts whose training is not built.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError("training of this kind of draft is not built; convert and export are")


def _always(_config: Any) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """All that the package must know of one algorithm. A file of its own states it; `config.ALGORITHMS` names that.

    What concerns the module alone (its label, what it reads, what it copies from the base) its class says, see
    `Draft`.

    Attributes:
        config_class: what a user writes.
        child_name: attribute of the model that the draft becomes.
        build: ``build(config, base, place=...)``, the draft from a resolved configuration.
        plan: ``plan(draft, record, export_format)``, an `export.plan.ExportPlan`.
        resolve: ``resolve(config, base, d2t)``, the configuration with what the base and the draft vocabulary
            decide; refuses what would convert but not serve.
        configure: ``configure(flags, file)``, the configuration from the command line: the algorithm's own flags
            by field name, those left open not among them, and the file. ``None``: the file alone.
        freezes_base: whether the base's weights stay as they are.
        task: ``task(config)``, what training takes; refuses options whose training is not built.
    """

    config_class: type[StrictConfig]
    child_name: str
    build: Callable[..., Draft]
    plan: Callable[..., Any]
    resolve: Resolve = resolve_as_given
    configure: Callable[[Mapping[str, Any], ConfigFile], StrictConfig] | None = None
    freezes_base: Callable[[Any], bool] = _always
    task: MakeTask = train_not_built


def find_algorithm(name: str) -> Algorithm:
    """The algorithm of this name, imported if need be.

    Raises:
        ConfigError: no line of the registry has this name.
    """
    if not isinstance(name, str) or name not in ALGORITHMS:
        known = list(ALGORITHMS)
        hint = suggest(str(name), known, otherwise=f"choose one of {', '.join(known)}")
        raise ConfigError(f"algorithm {name!r} is not known; {hint}")
    algorithm = pkgutil.resolve_name(ALGORITHMS[name].target)
    assert isinstance(algorithm, Algorithm), ALGORITHMS[name].target
    return algorithm


class Conversion(nn.Module):
    """The record of a conversion, a child of the model on every stage; it has no tensors."""

    def __init__(self, algorithm: str, config: StrictConfig, draft_class: type[Draft]) -> None:
        """Take the record.

        Args:
            algorithm: a name in the registry.
            config: resolved against the base.
            draft_class: of the module on the last stage.
        """
        super().__init__()
        self.algorithm, self.config, self.draft_class = algorithm, config, draft_class

    def extra_repr(self) -> str:
        """The algorithm and every field."""
        return f"{self.algorithm}, {self.config!r}"


class Quantized(nn.Module):
    """What a quantisation is to those who put nothing in its places, a child of the model on every stage.

    Attributes:
        record: recipe and calibration.
    """

    def __init__(self, record: QuantizationRecord) -> None:
        """Take the record."""
        super().__init__()
        self.record = record


def parse_mode(mode: Mode) -> tuple[str, StrictConfig]:
    """Algorithm and configuration from any of the three forms.

    Raises:
        ConfigError: not one of the forms, an unknown algorithm, or a configuration that does not validate.
    """
    name, values = _name_and_values(mode)
    config_class = find_algorithm(name).config_class
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
        fitting = [name for name in ALGORITHMS if mode.keys() & find_algorithm(name).config_class.model_fields.keys()]
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


def convert(
    model: nn.Module,
    mode: Mode,
    *,
    d2t: Tensor | None = None,
    seed: int = 1234,
    draft_init: DraftInit = "auto",
) -> nn.Module:
    """Attach a draft to `model`, in place, and freeze the base unless the draft's configuration trains it too.

    The draft becomes ``model.eagle_module`` or ``model.medusa_heads``, on the last pipeline stage. Every rank of
    the model must call.

    Args:
        model: a megatron-core `GPTModel`, this rank's part, or a transformers causal language model.
        mode: ``"medusa"``, a preset such as `EAGLE3_DEFAULT_CFG` or its ``"config"``, or ``[("eagle", {...})]``.
        d2t: draft vocabulary, int64 [draft vocabulary] with target id = i + d2t[i]; needed where the draft
            vocabulary is smaller than the base's.
        seed: of the initial weights; they do not depend on the parallel layout.
        draft_init: ``"base"``: EAGLE-3's first layer starts as the base's last one; ``"random"``; or ``"auto"``: as
            the base where it then is the base's layer, which learns faster, and random otherwise, also where the
            base is kept without its layers.

    Returns:
        The same object.

    Raises:
        ConfigError: a configuration that does not fit the base, or a model that has a draft already or is quantised.
        UnsupportedError: a model or a combination that cannot be converted.
    """
    name, config = parse_mode(mode)
    base = as_base(model)
    if d2t is not None:
        d2t = check_draft_to_target(d2t, vocab_size=base.architecture.vocab_size, where="d2t")
    config = find_algorithm(name).resolve(config, base.architecture, d2t)
    draft = attach(base, name, config)
    if draft is not None:
        _fill_draft(draft, base, d2t=d2t, seed=seed, draft_init=draft_init)
    if reads_tokens(model):
        base.copy_embedding_to_last_stage()
    return model


def attach(base: MegatronBase | TransformersBase, algorithm: str, config: StrictConfig) -> Draft | None:
    """Add the draft's modules with unset weights, as `convert` and loading a checkpoint both need.

    Args:
        base: without a draft, and not quantised yet: a recipe covers the draft too.
        algorithm: a name in the registry.
        config: resolved.

    Returns:
        The draft on the last stage, ``None`` on the others.

    Raises:
        ConfigError: the model has a draft already, or is quantised.
    """
    existing = conversion_of(base.model)
    if existing is not None:
        raise ConfigError(f"the model has a draft already ({existing.algorithm}); convert the base it was made from")
    _check_not_quantized(base)
    record = find_algorithm(algorithm)
    place = Placement(tp=base.tp, device=torch.device("meta"))
    if base.is_last_stage:
        place = Placement(tp=base.tp, dtype=base.head_weight().dtype, device=base.head_weight().device)
    # Every stage builds it, the others without memory: what does not fit is refused on every rank, where the
    # last stage alone would leave the others waiting for it.
    draft = record.build(config, base.architecture, place=place)
    base.model.add_module("draft_conversion", Conversion(algorithm, config, type(draft)))
    if base.is_last_stage:
        base.model.add_module(record.child_name, draft)
    if record.freezes_base(config):
        base.freeze()
    if not isinstance(base, MegatronBase):
        # megatron-core's loops call a step of ours; those around transformers call the model.
        from mcore_spec.hosting.install import install

        install(base, algorithm, config, partial(record.task, config))
    return draft if base.is_last_stage else None


def quantized_before(what: str, how: str) -> str:
    """Why a base that was quantised without a draft takes none: its scales would not be the draft's."""
    return (
        f"{what} is quantised ({how}): convert the one that it was made from, and quantise base and draft together then"
    )


def _check_not_quantized(base: MegatronBase | TransformersBase) -> None:
    """Refuse a quantised base, also one that was loaded without its scales.

    Raises:
        ConfigError: it is.
    """
    found = [child.record.recipe.name for child in base.model.children() if isinstance(child, Quantized)]
    if not isinstance(base, MegatronBase) and QUANTIZATION_KEY in vars(base.model.config):
        found.append(f"{QUANTIZATION_KEY} in its configuration")
    if found:
        raise ConfigError(quantized_before("the model", found[0]))


def reads_tokens(model: nn.Module) -> bool:
    """Whether the model has a draft that needs the base's embedding on the last stage; the same on every stage."""
    conversion = conversion_of(model)
    return conversion is not None and conversion.draft_class.reads_tokens


def as_base(model: nn.Module) -> MegatronBase | TransformersBase:
    """A view of a model of either library as a base.

    Raises:
        UnsupportedError: neither, or one that cannot carry a draft.
    """
    from megatron.core.models.gpt import GPTModel

    if isinstance(model, GPTModel):
        return MegatronBase(model)
    # A model of transformers is there only where transformers is.
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        raise UnsupportedError(
            f"convert() takes a megatron-core GPTModel or a transformers model, got {type(model).__name__}; if that "
            "wraps one, give what it wraps"
        )
    from mcore_spec.bases.transformers import TransformersBase

    return TransformersBase(model)


@torch.no_grad()
def _fill_draft(draft: Draft, base: Base, *, d2t: Tensor | None, seed: int, draft_init: DraftInit) -> None:
    """Initial weights; what the draft takes from the base replaces what was drawn."""
    draft.init_weights(seed=seed)
    draft.scale_logits(base.head_row_norm())
    if d2t is not None:
        draft.set_draft_vocabulary(d2t)
    heads = draft.own_heads()
    if heads:
        first, num_rows = heads[0].first_row, heads[0].num_valid_rows()
        rows = base.head_rows(draft.head_token_ids(), first=first, stop=first + num_rows)
        for head in heads:
            head.load_rows(rows)
    layer = draft.layer_of_base()
    if layer is not None:
        layer.load_state_dict(base.last_layer_weights())
    if draft_init == "random" or (draft_init == "auto" and not base.architecture.has_layers):
        return
    last_layer = base.last_layer_weights()
    if draft_init == "base" or draft.can_warm_start(last_layer, base.architecture):
        draft.warm_start(last_layer, base.final_norm_weight())
        draft.is_warm_started = True

"""The EAGLE family: one configuration, whose flags say which member is meant, and a file for each one's export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from mcore_spec.algorithms.eagle1 import plan_eagle1
from mcore_spec.algorithms.eagle3 import plan_eagle3
from mcore_spec.algorithms.mtp import plan_mtp
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.config import BaseArchitecture, EagleAlgorithm, EagleConfig
from mcore_spec.config.files import ConfigFile, configure_eagle
from mcore_spec.conversion import Algorithm
from mcore_spec.drafts.eagle1 import Eagle1Draft
from mcore_spec.drafts.eagle3 import Eagle3Draft
from mcore_spec.drafts.mtp import MTPDraft, build_mtp
from mcore_spec.drafts.resolve import resolve_eagle
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.export.plan import ExportFormat, ExportPlan
from mcore_spec.objectives.eagle1 import eagle1_task
from mcore_spec.objectives.eagle3 import eagle3_task
from mcore_spec.objectives.mtp import mtp_task
from mcore_spec.objectives.objective import Task
from mcore_spec.parallel.tensor_parallel import Placement

EagleDraft: TypeAlias = Eagle1Draft | Eagle3Draft | MTPDraft


class Member(NamedTuple):
    """One member of the family.

    Attributes:
        build: its module, ``build(config, base, place=...)``.
        plan: of its export.
        task: what training it takes.
    """

    build: Callable[..., EagleDraft]
    plan: Callable[..., ExportPlan]
    task: Callable[[EagleConfig], Task]


MEMBERS: dict[EagleAlgorithm, Member] = {
    "eagle1": Member(Eagle1Draft, plan_eagle1, eagle1_task),
    "eagle3": Member(Eagle3Draft, plan_eagle3, eagle3_task),
    "eagle-mtp": Member(build_mtp, plan_mtp, mtp_task),
}


def build_member(config: EagleConfig, base: BaseArchitecture, *, place: Placement) -> EagleDraft:
    """The module of the member that the configuration describes."""
    return MEMBERS[config.algorithm].build(config, base, place=place)


def plan_member(draft: EagleDraft, record: CheckpointRecord, export_format: ExportFormat) -> ExportPlan:
    """What to write.

    Raises:
        UnsupportedError: the format does not know this member, or the draft would not serve.
    """
    return MEMBERS[draft.architecture.algorithm].plan(draft, record, export_format)


def resolve_family(config: EagleConfig, base: BaseArchitecture, d2t: Tensor | None) -> EagleConfig:
    """What the base and the draft vocabulary decide, filled in.

    Raises:
        ConfigError: a value that does not fit the base, or a reduced draft vocabulary without its mapping.
        UnsupportedError: flags that describe no member of the family, or an option whose training is not built.
    """
    resolved = resolve_eagle(_with_draft_vocabulary(config, d2t), base)
    size = resolved.eagle_architecture_config.draft_vocab_size
    assert size is not None
    if size < base.vocab_size and d2t is None:
        raise ConfigError(
            f"draft_vocab_size = {size} is smaller than the base's vocabulary of {base.vocab_size}: give the mapping "
            "d2t (--draft-vocab-cache), or an engine would propose the first ids"
        )
    if resolved.eagle_offline:
        raise UnsupportedError(
            "eagle_offline = true: a draft does not say where hidden states come from; leave it out, and give finetune "
            "--offline-distillation-data"
        )
    return resolved


def _with_draft_vocabulary(config: EagleConfig, d2t: Tensor | None) -> EagleConfig:
    """Take the draft vocabulary's size from `d2t` where the configuration leaves it open."""
    if d2t is None:
        return config
    architecture = config.eagle_architecture_config
    given, size = architecture.draft_vocab_size, int(d2t.shape[0])
    if given not in (None, size):
        raise ConfigError(f"draft_vocab_size = {given} but d2t has {size} entries; make the two agree")
    architecture = architecture.model_copy(update={"draft_vocab_size": size})
    return config.model_copy(update={"eagle_architecture_config": architecture})


def configure_family(flags: Mapping[str, Any], file: ConfigFile) -> EagleConfig:
    """The file over the preset. It may be a whole configuration or an architecture alone (ModelOpt's).

    Raises:
        ConfigError: a file that is wrong, or that describes another member than --export-eagle-algorithm.
    """
    return configure_eagle(flags["export_eagle_algorithm"], file)


def task_of_member(config: EagleConfig) -> Task:
    """What training the member takes.

    Raises:
        UnsupportedError: an option whose training is not built.
    """
    if not config.eagle_freeze_base_model:
        raise UnsupportedError("eagle_freeze_base_model = false: training the base too is not built yet")
    return MEMBERS[config.algorithm].task(config)


def _freezes_base(config: EagleConfig) -> bool:
    return config.eagle_freeze_base_model


EAGLE = Algorithm(
    config_class=EagleConfig,
    child_name="eagle_module",
    build=build_member,
    plan=plan_member,
    resolve=resolve_family,
    configure=configure_family,
    freezes_base=_freezes_base,
    task=task_of_member,
)

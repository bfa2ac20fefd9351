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
from mcore_spec.drafts.vocab_map import agree_on_size, check_has_mapping
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.export.parallel_heads import check_parallel_format, with_parallel_heads
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
    architecture = draft.architecture
    check_parallel_format(export_format, architecture)
    plan = MEMBERS[architecture.algorithm].plan(draft, record, export_format)
    return plan if architecture.parallel_draft_step == 1 else with_parallel_heads(plan, architecture)


def resolve_family(config: EagleConfig, base: BaseArchitecture, d2t: Tensor | None) -> EagleConfig:
    """What the base and the draft vocabulary decide, filled in.

    Raises:
        ConfigError: a value that does not fit the base, or a reduced draft vocabulary without its mapping.
        UnsupportedError: flags that describe no member of the family, or an option whose training is not built.
    """
    resolved = resolve_eagle(_with_draft_vocabulary(config, d2t), base)
    size = resolved.eagle_architecture_config.draft_vocab_size
    assert size is not None
    check_has_mapping(size, d2t, vocab_size=base.vocab_size)
    if resolved.eagle_reuse_base_mtp:
        raise ConfigError(
            "eagle_reuse_base_mtp = true says how a draft was made, and the layer is in the base's files; leave it out "
            "and give mcore-spec convert --draft-init mtp"
        )
    if resolved.eagle_offline:
        raise UnsupportedError(
            "eagle_offline = true: a draft is the same wherever its hidden states come from; leave it out, and give "
            "training the store (finetune --offline-distillation-data DIR, main.py --offline-data DIR)"
        )
    return resolved


def _with_draft_vocabulary(config: EagleConfig, d2t: Tensor | None) -> EagleConfig:
    """Take the draft vocabulary's size from `d2t` where the configuration leaves it open."""
    architecture = config.eagle_architecture_config
    size = agree_on_size(architecture.draft_vocab_size, d2t)
    architecture = architecture.model_copy(update={"draft_vocab_size": size})
    return config.model_copy(update={"eagle_architecture_config": architecture})


def configure_family(flags: Mapping[str, Any], file: ConfigFile) -> EagleConfig:
    """The file over the preset. It may be a whole configuration or an architecture alone (ModelOpt's).

    Raises:
        ConfigError: a file that is wrong, or that describes another member than --export-eagle-algorithm.
    """
    return configure_eagle(flags["export_eagle_algorithm"], file)


def task_of_member(config: EagleConfig) -> Task:
    """What training the member takes."""
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

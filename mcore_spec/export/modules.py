"""A draft under its modules' own names: what `mcore_spec.save` writes, and what lies beside a base in one directory.

No engine reads it. It says everything about any draft, also about one that no engine could serve, and either library's
model takes it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mcore_spec.checkpoint.record import CheckpointRecord, ConversionRecord
from mcore_spec.config import BaseIdentity
from mcore_spec.config.quantization import QuantizationRecord
from mcore_spec.conversion import find_algorithm
from mcore_spec.drafts.draft import Draft
from mcore_spec.errors import CheckpointError
from mcore_spec.export.plan import ExportPlan
from mcore_spec.hosting.key import CONFIG_KEY, FORMAT_VERSION, QUANTIZATION_KEY
from mcore_spec.parallel.sharding import sharded_tensors
from mcore_spec.quantization.installed import CHILD
from mcore_spec.weights.hf_config import describe_hf, read_hf_config
from mcore_spec.weights.safetensors_io import WeightDirectory

_MODEL_TYPE = "mcore_spec_draft"


class DraftBesideBase(NamedTuple):
    """A draft in the directory of its base.

    Attributes:
        record: base and conversion.
        below: beginning of the names of its tensors.
    """

    record: CheckpointRecord
    below: str


def plan_modules(draft: Draft, record: CheckpointRecord) -> ExportPlan:
    """Every tensor under its own name."""
    assert record.conversion is not None
    names = [entry.name for entry in sharded_tensors(draft)]
    config = {"model_type": _MODEL_TYPE, CONFIG_KEY: record.conversion.model_dump(mode="json")}
    remark = "No engine reads this form: `mcore_spec.restore(base, DIRECTORY)` attaches the draft to its base."
    return ExportPlan(config=config, table=[(name, name) for name in names], remarks=(remark,))


def is_of_modules(config: Mapping[str, Any]) -> bool:
    """Whether a directory's ``config.json`` is one of `plan_modules`."""
    return config.get("model_type") == _MODEL_TYPE


def conversion_in(raw: Mapping[str, Any], *, where: str) -> ConversionRecord | None:
    """How the draft was attached, as the base's ``config.json`` says; ``None`` where there is no draft.

    Raises:
        CheckpointError: a record of another version, or a damaged one.
    """
    values = raw.get(CONFIG_KEY)
    if values is None:
        return None
    if not isinstance(values, Mapping) or not {"algorithm", "config"} <= values.keys():
        raise CheckpointError(f"{where}: {CONFIG_KEY} is damaged: it lacks algorithm or config; save the model again")
    _check_version(values, CONFIG_KEY, where=where)
    return ConversionRecord(algorithm=values["algorithm"], config=values["config"])


def _check_version(values: Mapping[str, Any], key: str, *, where: str) -> None:
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: {key} has format_version {version!r}; this package reads {FORMAT_VERSION}: update it"
        )


def quantization_in(raw: Mapping[str, Any], *, where: str) -> QuantizationRecord | None:
    """How the model was quantised, as its ``config.json`` says; ``None`` where it was not.

    Raises:
        CheckpointError: a record of another version.
        ConfigError: a damaged one.
    """
    values = raw.get(QUANTIZATION_KEY)
    if values is None:
        return None
    _check_version(values, QUANTIZATION_KEY, where=where)
    record = {name: value for name, value in values.items() if name != "format_version"}
    return QuantizationRecord.parse(record, where=f"{where}: {QUANTIZATION_KEY}")


def draft_names(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Beginnings of the names of tensors that are the draft's, in a directory of a base with this ``config.json``."""
    conversion = conversion_in(raw, where="config.json")
    return () if conversion is None else (f"{find_algorithm(conversion.algorithm).child_name}.",)


def record_of_model_directory(directory: Path) -> DraftBesideBase | None:
    """What ``save_pretrained`` of a transformers model with a draft wrote; ``None``: something else.

    Raises:
        CheckpointError: a damaged directory.
    """
    if not (directory / "config.json").exists():
        return None
    raw, where = read_hf_config(directory), str(directory / "config.json")
    conversion = None if is_of_modules(raw) else conversion_in(raw, where=where)
    if conversion is None:
        return None
    quantization = quantization_in(raw, where=where)
    with WeightDirectory(directory, without=(*draft_names(raw), f"{CHILD}.")) as weights:
        fingerprint = weights.fingerprint()
    plain = {name: value for name, value in raw.items() if name not in (CONFIG_KEY, QUANTIZATION_KEY)}
    identity = BaseIdentity(source=raw[CONFIG_KEY].get("base", ""), fingerprint=fingerprint, hf_config=plain)
    base = describe_hf(plain, where=where)
    record = CheckpointRecord(
        base=base, identity=identity, conversion=conversion, packages={}, quantization=quantization
    )
    return DraftBesideBase(record, *draft_names(raw))

"""What a live transformers model with a draft is, for files that are written of it."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.transformers import TransformersBase
from mcore_spec.checkpoint.record import CheckpointRecord, ConversionRecord
from mcore_spec.config import BaseIdentity
from mcore_spec.conversion import Conversion, as_base, conversion_of, find_algorithm
from mcore_spec.drafts.draft import Draft
from mcore_spec.errors import ConfigError
from mcore_spec.export.plan import TRAINED_BASE
from mcore_spec.hosting.key import CONFIG_KEY, QUANTIZATION_KEY
from mcore_spec.quantization.installed import Quantization, quantization_of
from mcore_spec.weights.safetensors_io import fingerprint_of

_RECORDED_PACKAGES = ("mcore-spec", "torch", "transformers", "safetensors")


def describe_drafted(model: nn.Module, given: CheckpointRecord | None) -> CheckpointRecord:
    """Base, its identity and the conversion.

    Args:
        model: with a draft.
        given: of a `GPTModel`, which does not know where its weights came from (`make_record`).

    Raises:
        ConfigError: no draft, a sharded model, or a record that is missing or not wanted.
    """
    conversion, quantization = conversion_of(model), quantization_of(model)
    if conversion is None:
        raise ConfigError(f"the {type(model).__name__} has no draft; attach one first (mcore_spec.convert)")
    base = as_base(model)
    if isinstance(base, MegatronBase) != (given is not None):
        remedy = "give record = make_record(model, identity)" if given is None else "leave it out"
        raise ConfigError(f"record = {given!r:.40} with a {type(model).__name__}; {remedy}")
    if given is not None:
        return given
    assert isinstance(base, TransformersBase)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ConfigError(
            "the model is sharded over ranks; save it with trainer.save_model(DIRECTORY), and load that to go on"
        )
    return CheckpointRecord(
        base=base.architecture,
        identity=_identity(base, is_trained=trains_base(conversion)),
        conversion=ConversionRecord(algorithm=conversion.algorithm, config=conversion.config.model_dump(mode="json")),
        packages={name: metadata.version(name) for name in _RECORDED_PACKAGES},
        quantization=quantization and quantization.record,
    )


def trains_base(conversion: Conversion) -> bool:
    """Whether the base is trained with this draft, so that it is another one than the draft was made for."""
    return not find_algorithm(conversion.algorithm).freezes_base(conversion.config)


def write_bare_base(base: TransformersBase, directory: Path) -> None:
    """The base as ``save_pretrained`` writes one without a draft."""
    known = vars(base.model.config)
    record = {name: known.pop(name) for name in (CONFIG_KEY, QUANTIZATION_KEY) if name in known}
    try:
        base.model.save_pretrained(directory, state_dict=_own_weights(base))
    finally:
        known.update(record)


def _own_weights(base: TransformersBase) -> dict[str, Tensor]:
    """Of the model without its draft and scales, by name."""
    ours = tuple(f"{name}." for name, child in base.model.named_children() if isinstance(child, Draft | Quantization))
    weights = base.model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in weights.items() if not name.startswith(ours)}


def _identity(base: TransformersBase, *, is_trained: bool) -> BaseIdentity:
    """The fingerprint is that of the files that transformers would write: a tied head is not among them.

    Raises:
        ConfigError: weights that are offloaded.
    """
    found = fingerprints(base)
    if not found:
        raise ConfigError(
            f"the {type(base.model).__name__} is offloaded in part, and what is written says which base it is for, by "
            "its weights; save_pretrained it, and go on from that without offloading"
        )
    config: dict[str, Any] = json.loads(base.model.config.to_json_string())
    known = config.pop(CONFIG_KEY)
    config.pop(QUANTIZATION_KEY, None)
    config["architectures"] = config.get("architectures") or [type(base.model).__name__]
    source = TRAINED_BASE if is_trained else known["base"] or "an unnamed model"
    return BaseIdentity(source=source, fingerprint=found[0], hf_config=config)


def fingerprints(base: TransformersBase) -> list[str]:
    """Of the base's weights: as transformers writes them, and where the head is tied, with it too, as others may.

    None where they are offloaded or sharded.
    """
    weights = _own_weights(base)
    if any(tensor.device.type == "meta" or isinstance(tensor, DTensor) for tensor in weights.values()):
        return []
    if base.embedding_weight() is not base.head_weight():
        return [fingerprint_of(weights)]
    heads = [name for name, module in base.model.named_modules() if module is base.head]
    untied = {name: tensor for name, tensor in weights.items() if name.rpartition(".")[0] not in heads}
    return [fingerprint_of(untied), fingerprint_of(weights)]

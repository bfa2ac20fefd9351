"""EAGLE-3 directories that somebody else wrote, in the engines' form or in that of `speculators`.

There is no record of how the draft was made: everything comes from ``config.json``, read as engines read it. Where they
read it differently, or do not look at all, a note says which reading is taken; what this package's draft could
not follow exactly is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mcore_spec.checkpoint.record import CheckpointRecord, ConversionRecord
from mcore_spec.config import BaseArchitecture, BaseIdentity, EagleConfig
from mcore_spec.drafts.resolve import resolve_eagle
from mcore_spec.errors import CheckpointError, ConfigError, UnsupportedError
from mcore_spec.weights.hf_config import describe_hf, read_hf_config
from mcore_spec.weights.safetensors_io import WeightDirectory

ENGINES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
# What `speculators` calls the kind of draft; its class, in architectures, has had several names.
SPECULATORS = "eagle3"
_IDS = "eagle_aux_hidden_state_layer_ids"
_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
# Fields that ModelOpt and others write, and the one value that EAGLE-3 as engines know it has.
_EXPECTED = {
    "use_aux_hidden_state": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "use_input_layernorm_in_first_layer": True,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
    "logit_scale": 1.0,
}


class ForeignExport(NamedTuple):
    """What a directory says.

    Attributes:
        record: as this package would have written it; the base's weights are not known, its fingerprint is empty.
        notes: readings that an engine might not share.
    """

    record: CheckpointRecord
    notes: tuple[str, ...]


class _LayerIds(NamedTuple):
    """Base layers by output, empty for the default, and what is to be known about them."""

    ids: tuple[int, ...]
    notes: tuple[str, ...] = ()


def read_foreign(directory: Path, base: BaseArchitecture) -> ForeignExport:
    """Read the configuration, and which tensors there are.

    Args:
        directory: holds ``config.json`` and the weights.
        base: that the draft is for.

    Raises:
        CheckpointError: no EAGLE-3 draft, one of another base, or files that are not whole.
        UnsupportedError: a draft that is not exactly one of this package's.
        ConfigError: values that do not fit together.
    """
    where = str(directory / "config.json")
    raw = read_hf_config(directory)
    architecture, kind = (raw.get("architectures") or [None])[0], raw.get("speculators_model_type")
    is_speculators = kind == SPECULATORS
    if not is_speculators and (kind is not None or architecture not in ENGINES):
        found = f"architectures = {architecture!r}" if kind is None else f"speculators_model_type = {kind!r}"
        raise CheckpointError(
            f"draft = {directory} is no export of this package, and {found} is no EAGLE-3 draft's (architectures "
            f"{' or '.join(ENGINES)}, or speculators_model_type {SPECULATORS}); give the directory of one"
        )
    layers = raw.get("transformer_layer_config") if is_speculators else raw
    if not isinstance(layers, dict):
        raise CheckpointError(f"{where} has no transformer_layer_config; give the directory whole")
    nested = raw.get("eagle_config") or {}
    _check_plain(raw, layers, nested, where=where)
    sizes = _sizes(layers, base, where=where)
    _check_base(raw, sizes, base, directory=directory)
    ids = _layer_ids(raw.get(_IDS), nested.get(_IDS), where=where)
    draft_vocab_size = raw.get("draft_vocab_size") or base.vocab_size
    with WeightDirectory(directory) as weights:
        has_lm_head = "lm_head.weight" in weights.tensors
        if draft_vocab_size != base.vocab_size and "d2t" not in weights.tensors:
            raise CheckpointError(
                f"{where}: draft_vocab_size = {draft_vocab_size}, but there is no d2t among the tensors, which says "
                f"what the entries are; an engine would propose the ids below {draft_vocab_size}"
            )
    values = {
        "num_hidden_layers": sizes.num_layers,
        "intermediate_size": sizes.intermediate_size,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.num_key_value_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": sizes.hidden_act,
        "rms_norm_eps": sizes.rms_norm_eps,
        "rope_theta": sizes.rope.theta,
        "rope_scaling": {"rope_type": sizes.rope.rope_type, **sizes.rope.scaling},
        "draft_vocab_size": draft_vocab_size,
        "has_lm_head": has_lm_head,
        "attention_bias": bool(layers.get("attention_bias")),
        "mlp_bias": bool(layers.get("mlp_bias")),
        _IDS: ids.ids,
        **_norm_flags(raw, nested, is_speculators=is_speculators, where=where),
    }
    config = resolve_eagle(EagleConfig.parse({"eagle_architecture_config": values}, where=where), base)
    record = CheckpointRecord(
        base=base,
        identity=BaseIdentity(source=f"the base of {directory}", fingerprint=""),
        conversion=ConversionRecord(algorithm="eagle", config=config.model_dump(mode="json")),
        packages={},
    )
    resolved = config.eagle_architecture_config.eagle_aux_hidden_state_layer_ids
    made = f"{directory} was not made with mcore_spec; aux layers {', '.join(map(str, resolved))} (0-based, by output)"
    return ForeignExport(record, (made, *ids.notes))


def _check_plain(raw: Mapping[str, Any], layers: Mapping[str, Any], nested: Mapping[str, Any], *, where: str) -> None:
    """Refuse what changes the arithmetic and has no counterpart here.

    Raises:
        UnsupportedError: names the field.
    """
    for values in (raw, nested):
        for field, expected in _EXPECTED.items():
            if values.get(field) not in (None, expected):
                raise UnsupportedError(
                    f"{where}: {field} = {values[field]!r} describes another draft than EAGLE-3 as engines know it; "
                    f"it must be {expected!r} or absent"
                )
    if layers.get("model_type", "llama") != "llama":
        raise UnsupportedError(f"{where}: model_type = {layers['model_type']!r}: the draft's layers must be Llama's")
    if "sliding_attention" in (layers.get("layer_types") or ()):
        raise UnsupportedError(f"{where}: layer_types has sliding_attention: the draft's layers must see everything")
    if raw.get("quantization_config"):
        raise UnsupportedError(f"{where}: quantization_config: quantised drafts are not read; give the one before it")


def _sizes(layers: Mapping[str, Any], base: BaseArchitecture, *, where: str) -> BaseArchitecture:
    """The decoder layers, described as a base's; transformers fills in what the file leaves to it."""
    plain = {
        **layers,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        # Known to drafts, and read from the file itself.
        "attention_bias": False,
        "mlp_bias": False,
        # The weights are cast to the base's.
        "dtype": base.dtype,
    }
    return describe_hf(plain, where=where)


def _check_base(raw: Mapping[str, Any], sizes: BaseArchitecture, base: BaseArchitecture, *, directory: Path) -> None:
    """Refuse a draft of another base, as far as sizes show it.

    Raises:
        CheckpointError: names the field.
    """
    found = {
        "hidden_size": sizes.hidden_size,
        "target_hidden_size": raw.get("target_hidden_size") or base.hidden_size,
        "vocab_size": sizes.vocab_size,
    }
    expected = {"target_hidden_size": base.hidden_size, **base.model_dump(include={"hidden_size", "vocab_size"})}
    for field, value in found.items():
        if value != expected[field]:
            raise CheckpointError(
                f"draft = {directory} has {field} = {value}, this base has {expected[field]}; give the base that the "
                "draft belongs to"
            )


def _norm_flags(
    raw: Mapping[str, Any], nested: Mapping[str, Any], *, is_speculators: bool, where: str
) -> dict[str, bool]:
    """Absent ones are false for every reader but one.

    Raises:
        CheckpointError: the one is absent.
    """
    if is_speculators and raw.get("norm_before_residual") is None:
        raise CheckpointError(
            f"{where} has no norm_before_residual, which vLLM takes for true and other readers for false; write into "
            "it what the draft was trained with"
        )
    flags = {name: bool(raw.get(name)) for name in _FLAGS}
    if nested.get("norm_before_fc") is not None:  # vLLM's reading
        flags["norm_before_fc"] = bool(nested["norm_before_fc"])
    return flags


def _layer_ids(boundaries: object, outputs: object, *, where: str) -> _LayerIds:
    """Layers by output: the list at the top counts inputs of layers, the nested one outputs.

    Raises:
        ConfigError: no lists of numbers.
        UnsupportedError: the embedding among the layers.
    """
    top, nested = _ids(boundaries, where=where), _ids(outputs, where=where)
    if not top and not nested:
        return _LayerIds((), (f"{where} names no aux layers: the default three are read, as engines do",))
    if not top:
        return _LayerIds(
            nested,
            (
                f"{_IDS} stands in eagle_config alone and is read as outputs of layers, as SGLang and TensorRT-LLM do; "
                "vLLM 0.32 reads it as inputs, one layer off, and accepts accordingly",
            ),
        )
    if top[0] < 1:
        raise UnsupportedError(
            f"{where}: {_IDS} = {list(top)}: 0 is the embedding, which drafts here do not read; it must begin above 0"
        )
    ids = tuple(boundary - 1 for boundary in top)
    if nested and nested != ids:
        note = (
            f"{_IDS} = {list(top)} is read as inputs of layers, as vLLM does; the list {list(nested)} in eagle_config, "
            "which SGLang and TensorRT-LLM read as outputs, says something else"
        )
        return _LayerIds(ids, (note,))
    return _LayerIds(ids)


def _ids(values: object, *, where: str) -> tuple[int, ...]:
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(each, int) for each in values):
        raise ConfigError(f"{where}: {_IDS} = {values!r}; it must be a list of whole numbers")
    return tuple(values)

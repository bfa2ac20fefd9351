"""Filling in what a configuration leaves to the base, and refusing what does not fit it."""

from __future__ import annotations

from typing import Any

from mcore_spec.config import (
    BaseArchitecture,
    EagleArchitectureConfig,
    EagleConfig,
    RopeConfig,
    check_supported,
)
from mcore_spec.errors import ConfigError, UnsupportedError


def resolve_eagle(config: EagleConfig, base: BaseArchitecture) -> EagleConfig:
    """The configuration with every ``None`` replaced by what the base has.

    Args:
        config: as the user wrote it.
        base: the base model.

    Raises:
        ConfigError: a value that does not fit the base.
        UnsupportedError: flags that describe no known member of the family.
    """
    check_supported(config)
    architecture = config.eagle_architecture_config
    if config.algorithm == "eagle-mtp" and base.num_experts is not None:
        raise UnsupportedError(
            f"eagle-mtp on a base with num_experts = {base.num_experts}: its layer would have to be the base's, with "
            "experts, which is not built yet; choose eagle3"
        )
    _check_base_owned(architecture, base)
    rope = resolve_rope(architecture, base)
    values: dict[str, Any] = {
        "intermediate_size": base.intermediate_size,
        "num_attention_heads": base.num_attention_heads,
        "num_key_value_heads": base.num_key_value_heads,
        "head_dim": base.head_dim,
        "hidden_act": base.hidden_act,
        "rms_norm_eps": base.rms_norm_eps,
        "draft_vocab_size": base.vocab_size,
    }
    given = architecture.model_dump(exclude_none=True)
    values = {
        **values,
        **given,
        "rope_theta": rope.theta,
        "rope_scaling": {"rope_type": rope.rope_type, **rope.scaling},
        "hidden_size": base.hidden_size,
        "vocab_size": base.vocab_size,
        "max_position_embeddings": base.max_position_embeddings,
        "torch_dtype": base.dtype,
    }
    if architecture.use_aux_hidden_state:
        values["eagle_aux_hidden_state_layer_ids"] = resolve_aux_layers(architecture, base)
    if architecture.use_mtp_layernorm:
        values["eagle_aux_hidden_state_layer_ids"] = _mtp_layers(architecture, base)
    resolved = EagleArchitectureConfig.parse(values, where="eagle_architecture_config")
    _check_sizes(resolved, base)
    if config.eagle_reuse_base_decoder:
        _check_reusable(resolved, base)
    return config.model_copy(update={"eagle_architecture_config": resolved})


def resolve_aux_layers(architecture: EagleArchitectureConfig, base: BaseArchitecture) -> tuple[int, ...]:
    """Base layers (0-based, by output) that EAGLE-3 reads; the paper's low, middle and high by default."""
    last = base.num_layers - 1
    ids = architecture.eagle_aux_hidden_state_layer_ids
    if not ids:
        default = {1, base.num_layers // 2 - 1, base.num_layers - 4}
        return tuple(sorted({min(max(layer, 0), last) for layer in default}))
    wrong = [layer for layer in ids if not 0 <= layer <= last]
    if wrong:
        raise ConfigError(
            f"eagle_aux_hidden_state_layer_ids = {list(ids)}: {wrong} out of range; the base has layers 0 to {last}"
        )
    return ids


def _mtp_layers(architecture: EagleArchitectureConfig, base: BaseArchitecture) -> tuple[int, ...]:
    """What EAGLE-MTP reads: the state after the final norm (DeepSeek-V3), or the last layer's output before it (MiMo).

    Engines know the layer of a base like Qwen2 in MiMo's layout alone.
    """
    last_layer = (base.num_layers - 1,)
    given = architecture.eagle_aux_hidden_state_layer_ids
    if given not in ((), last_layer):
        raise ConfigError(
            f"eagle_aux_hidden_state_layer_ids = {list(given)} with eagle-mtp, which reads one state: give "
            f"{list(last_layer)} for the last layer's output before the final norm, or leave it out"
        )
    return last_layer if base.qkv_bias and not base.qk_norm else given


def resolve_rope(architecture: EagleArchitectureConfig, base: BaseArchitecture) -> RopeConfig:
    """The draft's rotary embedding: the base's, each part overridden where the user gave it."""
    rope = base.rope
    if architecture.rope_scaling is not None:
        scaling = dict(architecture.rope_scaling)
        rope_type = scaling.pop("rope_type", scaling.pop("type", "default"))
        theta = scaling.pop("rope_theta", rope.theta)
        if "rope_theta" in architecture.rope_scaling and architecture.rope_theta not in (None, theta):
            raise ConfigError(
                f"rope_theta = {architecture.rope_theta} but rope_scaling has rope_theta = {theta}; "
                "leave one of the two out"
            )
        rope = RopeConfig.parse({"theta": theta, "rope_type": rope_type, "scaling": scaling}, where="rope_scaling")
    if architecture.rope_theta is not None:
        rope = rope.model_copy(update={"theta": architecture.rope_theta})
    return rope


def _check_base_owned(architecture: EagleArchitectureConfig, base: BaseArchitecture) -> None:
    owned = {
        "hidden_size": (architecture.hidden_size, base.hidden_size),
        "vocab_size": (architecture.vocab_size, base.vocab_size),
        "max_position_embeddings": (architecture.max_position_embeddings, base.max_position_embeddings),
        "torch_dtype": (architecture.torch_dtype, base.dtype),
    }
    for field, (given, expected) in owned.items():
        if given is not None and given != expected:
            raise ConfigError(
                f"eagle_architecture_config.{field} = {given!r} is not the base's {expected!r}; "
                "leave it out: it comes from the base"
            )


def _check_sizes(architecture: EagleArchitectureConfig, base: BaseArchitecture) -> None:
    draft_vocab, heads = architecture.draft_vocab_size, architecture.num_attention_heads
    kv_heads = architecture.num_key_value_heads
    assert draft_vocab is not None
    assert heads is not None
    assert kv_heads is not None
    if draft_vocab > base.vocab_size:
        raise ConfigError(
            f"draft_vocab_size = {draft_vocab} is larger than the base's vocabulary of {base.vocab_size}; "
            "choose at most that"
        )
    if architecture.algorithm != "eagle3" and draft_vocab != base.vocab_size:
        raise ConfigError(
            f"draft_vocab_size = {draft_vocab} with {architecture.algorithm}, whose head is the base's: "
            "leave it out, or use eagle3"
        )
    if heads % kv_heads:
        raise ConfigError(
            f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}; "
            "change one of the two"
        )


def _check_reusable(architecture: EagleArchitectureConfig, base: BaseArchitecture) -> None:
    """The base's last layer can start the draft's only if they have one shape."""
    own, others = architecture.model_dump(), base.model_dump()
    different = [
        name
        for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        if own[name] != others[name]
    ]
    different += [name for name in ("attention_bias", "mlp_bias") if own[name]]
    if different:
        raise ConfigError(
            f"eagle_reuse_base_decoder = true, but {', '.join(different)} differ(s) from the base's layer; "
            "leave these out, or set eagle_reuse_base_decoder to false"
        )

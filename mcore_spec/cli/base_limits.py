"""Layers of a base that commands are asked for. Imports no megatron-core."""

from __future__ import annotations

from mcore_spec.config import BaseArchitecture, EagleArchitectureConfig
from mcore_spec.drafts.resolve import resolve_aux_layers
from mcore_spec.errors import ConfigError


def choose_layers(given: tuple[int, ...] | None, base: BaseArchitecture) -> tuple[int, ...]:
    """The aux layers, 0-based, by output: `given`, or those that EAGLE-3 reads.

    Raises:
        ConfigError: layers that the base does not have, or not in order.
    """
    values = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": given or ()}
    layers = resolve_aux_layers(EagleArchitectureConfig.parse(values, where="aux layers"), base)
    if list(layers) != sorted(set(layers)):
        raise ConfigError(f"aux layers {list(layers)} (0-based, by output): give different ones, ascending")
    return layers

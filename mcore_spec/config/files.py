"""A draft's configuration from a file of the user's. Imports no torch: plans read it too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mcore_spec.config.drafts import EagleAlgorithm, EagleArchitectureConfig, EagleConfig, eagle_preset
from mcore_spec.errors import ConfigError


class ConfigFile(NamedTuple):
    """A configuration in a file of the user's.

    Attributes:
        values: what it holds; empty where there is none.
        where: what to call it in errors.
    """

    values: Mapping[str, Any]
    where: str


def read_config_file(path: Path, *, name: str) -> ConfigFile:
    """A JSON object.

    Args:
        path: of the file.
        name: of the option that names it.

    Raises:
        ConfigError: missing, or something else.
    """
    where = f"{name} = {path}"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{where}: no such file") from None
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where} holds a {type(values).__name__}; it must hold an object")
    return ConfigFile(values, where)


def configure_eagle(member: EagleAlgorithm, file: ConfigFile) -> EagleConfig:
    """The file over the preset. It may be a whole configuration or an architecture alone (ModelOpt's).

    Args:
        member: that is asked for.
        file: what the user wrote.

    Raises:
        ConfigError: a file that is wrong, or that describes another member.
    """
    given = dict(file.values)
    own = EagleArchitectureConfig.model_fields
    # Every field of the whole configuration begins like this; a misspelt one belongs there too.
    if not any(key.startswith("eagle_") and key not in own for key in given):
        given = {"eagle_architecture_config": given}
    architecture = given.get("eagle_architecture_config", {})
    if not isinstance(architecture, dict):
        raise ConfigError(
            f"{file.where}: eagle_architecture_config = {architecture!r} must be an object; leave it out to follow "
            "the base"
        )
    preset = eagle_preset(member)["config"]["eagle_architecture_config"]
    given["eagle_architecture_config"] = {**preset, **architecture}
    config = EagleConfig.parse(given, where=file.where)
    if config.algorithm != member:
        raise ConfigError(
            f"{file.where} describes {config.algorithm}, --export-eagle-algorithm says {member}; make the two agree"
        )
    return config

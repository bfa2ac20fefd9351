"""Validated, frozen configuration classes whose errors name the field, the value and the remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from mcore_spec.errors import ConfigError


class StrictConfig(BaseModel):
    """A frozen configuration whose unknown keys and wrong values raise `ConfigError`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str = "") -> Self:
        """Build the configuration from plain values.

        Args:
            values: field name -> value.
            where: what the values were read from (a file, a flag); named in the error.

        Raises:
            ConfigError: an unknown key (with the closest known one) or a value that does not validate.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            # The chain would show pydantic's report of the same, with its links.
            raise ConfigError(describe_validation_error(cls, error, where=where)) from None


def describe_validation_error(config_class: type[BaseModel], error: ValidationError, *, where: str = "") -> str:
    """One line a problem: the field, the value that was given, what is allowed."""
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"]) or config_class.__name__
        if problem["type"] == "extra_forbidden":
            *path, name = map(str, problem["loc"])
            known = list(_fields(_class_at(config_class, path)))
            hint = suggest(name, known, otherwise=f"known fields: {', '.join(known)}")
            lines.append(f"{field}: unknown field; {_place_of(name, config_class, path) or hint}")
        else:
            lines.append(f"{field} = {problem['input']!r}: {describe_problem(problem)}")
    prefix = f"{where}: " if where else ""
    return prefix + "; ".join(lines)


def describe_problem(problem: ErrorDetails) -> str:
    """What is allowed, in pydantic's words; of several choices the one that was probably meant."""
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] != "literal_error":
        return message
    choices = re.findall("'([^']*)'", problem["ctx"]["expected"])
    return f"{message}{suggest(str(problem['input']), choices, before='; ')}"


def suggest(word: str, known: Sequence[str], *, before: str = "", otherwise: str = "") -> str:
    """The end of an error about a misspelt word.

    Args:
        word: as it was given.
        known: what it may be.
        before: stands before the suggestion.
        otherwise: what to say where nothing known comes near.
    """
    # A beginning is what somebody typed who knows the rest by heart or has it completed.
    longer = [name for name in known if name.startswith(word)] if len(word) > 2 else []
    close = get_close_matches(word, longer, n=1, cutoff=0) or get_close_matches(word, known, n=1)
    return f"{before}did you mean {close[0]}?" if close else otherwise


def _class_at(config_class: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """The class of a field inside others; ``None``: it is of another kind."""
    for part in path:
        annotation = config_class.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        config_class = annotation
    return config_class


def _fields(config_class: type[BaseModel] | None) -> Mapping[str, Any]:
    return {} if config_class is None else config_class.model_fields


def _place_of(name: str, config_class: type[BaseModel], path: Sequence[str]) -> str:
    """Where a field belongs that is known one level deeper, or one higher; empty: in neither."""
    for child in _fields(_class_at(config_class, path)):
        if name in _fields(_class_at(config_class, [*path, child])):
            return f"it belongs into {child}"
    if path and name in _fields(_class_at(config_class, path[:-1])):
        return f"it belongs beside {path[-1]}"
    return ""

"""From an arguments class to a command line, and from a command line to an instance of the class.

argparse splits the command line and prints ``--help``; types, ranges, defaults and what is required are the
class's, so that they are written once. Values come from ``--config FILE.yaml``, then from flags, which win.
Only what was given enters the instance's `model_fields_set`.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mcore_spec.cli.arguments import OneOf, flag_of
from mcore_spec.config import StrictConfig, describe_problem, suggest
from mcore_spec.errors import ConfigError

Arguments = TypeVar("Arguments", bound=StrictConfig)


class Given(NamedTuple):
    """A value that the user gave, and where."""

    value: Any
    where: str


class Section(NamedTuple):
    """Which part of a file with a section for each command is read.

    Attributes:
        name: of the command.
        known: every command.
    """

    name: str
    known: Sequence[str]


def parse_arguments(
    arguments_class: type[Arguments],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    section: Section | None = None,
) -> Arguments:
    """Read a command line.

    Args:
        arguments_class: its fields are the flags.
        argv: the command line without the program's name.
        prog: the program's name, for ``--help`` and errors.
        description: one line for ``--help``.
        section: of a ``--config`` file that has sections.

    Raises:
        ConfigError: an unknown or repeated flag or key, a wrong or missing value, an unreadable file.
        SystemExit: with code 0, after ``--help`` was printed.
    """
    parser = _build_parser(arguments_class, prog=prog, description=description)
    namespace, rest = parser.parse_known_args(argv)
    if rest:
        fields = arguments_class.model_fields.items()
        known = ["--help", "--config", *(flag for name, field in fields for flag in _flags(name, field))]
        raise ConfigError(_describe_rest(rest, known=known, prog=prog))
    flags = vars(namespace)
    config = flags.pop("config", None)
    given = {} if config is None else _read_config(Path(config), arguments_class, section)
    given |= {name: Given(value, flag_of(name)) for name, value in flags.items()}
    try:
        return arguments_class.model_validate({name: each.value for name, each in given.items()})
    except ValidationError as error:
        raise ConfigError(_describe_invalid(error, given, arguments_class)) from None


# --- argparse -------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Raises `ConfigError` where argparse would print its usage and leave."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


class _StoreOnce(argparse.Action):
    """Keep the value of a flag; a second, different one is an error instead of the winner."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        is_switch = self.nargs == 0
        value = option_string == self.option_strings[0] if is_switch else values
        earlier = vars(namespace).get(self.dest, value)
        if earlier != value:
            both = " and ".join(self.option_strings) if is_switch else f"{earlier} and {value}"
            raise ConfigError(f"{self.option_strings[0]} is given twice, as {both}: keep one")
        setattr(namespace, self.dest, value)


def _build_parser(arguments_class: type[StrictConfig], *, prog: str, description: str) -> _Parser:
    """A parser with a group for each class that contributes fields, the command's own first."""
    fields = arguments_class.model_fields
    required = [f"{flag_of(name)} {_metavar(name, field)}" for name, field in fields.items() if field.is_required()]
    parser = _Parser(
        prog=prog,
        usage=" ".join(["%(prog)s", "[--config FILE]", *required, "[options]"]),
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config",
        action=_StoreOnce,
        metavar="FILE",
        help="YAML file with values by option name, without the leading dashes, or with such a section for each "
        "command. Flags win over it.",
    )
    seen: set[str] = set()
    for contributor in arguments_class.__mro__:
        names = [name for name in inspect.get_annotations(contributor) if name in fields and name not in seen]
        if names:
            group = parser.add_argument_group(str(contributor.__doc__).rstrip("."))
            for name in names:
                _add_flag(group, name, fields[name])
            seen.update(names)
    return parser


def _add_flag(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    # argparse expands % in help texts.
    text = f"{field.description} {_default(field)}".rstrip().replace("%", "%%")
    flags = _flags(name, field)
    if _is_switch(field):
        group.add_argument(*flags, dest=name, action=_StoreOnce, nargs=0, help=text)
    elif get_origin(_kind(field)) is tuple and get_args(_kind(field))[0] is int:
        group.add_argument(*flags, dest=name, action="extend", nargs="+", metavar=_metavar(name, field), help=text)
    elif get_origin(_kind(field)) is tuple:
        group.add_argument(*flags, dest=name, action="append", metavar=_metavar(name, field), help=text)
    else:
        group.add_argument(*flags, dest=name, action=_StoreOnce, metavar=_metavar(name, field), help=text)


def _flags(name: str, field: FieldInfo) -> list[str]:
    """The flag, and for a boolean the one that turns it off."""
    flag = flag_of(name)
    return [flag, "--no-" + flag.removeprefix("--")] if _is_switch(field) else [flag]


def _kind(field: FieldInfo) -> Any:
    """The type of a field's value when it is not None."""
    if get_origin(field.annotation) not in (Union, UnionType):
        return field.annotation
    (kind,) = (each for each in get_args(field.annotation) if each is not NoneType)
    return kind


def _is_switch(field: FieldInfo) -> bool:
    return _kind(field) is bool


def _metavar(name: str, field: FieldInfo) -> str:
    """What stands for the value in ``--help``: the choices, the kind, or the last word of the name."""
    kind = _kind(field)
    choices: Sequence[Any] = get_args(kind) if get_origin(kind) is Literal else ()
    for each in field.metadata:
        if isinstance(each, OneOf):
            choices = each.known()
    if choices:
        return "{" + ",".join(map(str, choices)) + "}"
    return {int: "N", float: "X", Path: "FILE"}.get(kind) or name.rpartition("_")[-1].upper()


def _default(field: FieldInfo) -> str:
    """The end of a line in ``--help``; what None stands for is said by the description."""
    if field.is_required():
        return "Required."
    default = field.get_default(call_default_factory=True)
    if isinstance(default, bool):
        return f"Default: {'on' if default else 'off'}."
    return "" if default is None else f"Default: {default}."


# --- the YAML file --------------------------------------------------------------------------------


def _read_config(path: Path, arguments_class: type[StrictConfig], section: Section | None) -> dict[str, Given]:
    """The values in a YAML file, by field name.

    Raises:
        ConfigError: with file and line.
    """
    try:
        return dict(_config_items(path, arguments_class, section))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; name a YAML file that can be read") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def _config_items(
    path: Path, arguments_class: type[StrictConfig], section: Section | None
) -> Iterator[tuple[str, Given]]:
    # Nodes know their lines, and still show a key that stands twice, of which a dict keeps the last.
    loader = yaml.SafeLoader(path.read_bytes())
    root = loader.get_single_node()
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: expected lines of the form `option: value`")
    if section is not None and any(isinstance(value_node, yaml.MappingNode) for _, value_node in root.value):
        root = _section_of(root, section, path)
    lines: dict[str, int] = {}
    for key_node, value_node in root.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value)
        where = f"{path}:{line}: {key}"
        name = key.replace("-", "_")
        field = arguments_class.model_fields.get(name)
        if field is None:
            known = list(arguments_class.model_fields)
            raise ConfigError(f"{where}: unknown key; {suggest(name, known, otherwise='see --help')}")
        if name in lines:
            raise ConfigError(f"{where}: already given in line {lines[name]}: keep one")
        lines[name] = line
        try:
            value = loader.construct_object(value_node, deep=True)
        except ValueError as error:  # what looks like a date, and is none
            raise ConfigError(f"{where}: {error}; put the value in quotes") from error
        # pydantic would read true as 1 and "yes" as true, which is right for nobody's file.
        if value is not None and isinstance(value, bool) != _is_switch(field):
            expected = "true or false" if _is_switch(field) else f"{_metavar(name, field)}, not true or false"
            raise ConfigError(f"{where} = {value!r}: expected {expected}")
        yield name, Given(value, where)


def _section_of(root: yaml.MappingNode, section: Section, path: Path) -> yaml.MappingNode:
    """The part of a recipe that is for this command; the parts for others are not looked into.

    Raises:
        ConfigError: a section of no command, one that stands twice, none for this one, or an option outside of them.
    """
    found: dict[str, yaml.MappingNode] = {}
    for key_node, value_node in root.value:
        where, name = f"{path}:{key_node.start_mark.line + 1}: {key_node.value}", str(key_node.value)
        if name not in section.known:
            hint = suggest(name, section.known, otherwise=f"sections: {', '.join(section.known)}")
            raise ConfigError(f"{where}: no such command; {hint}")
        if name in found or not isinstance(value_node, yaml.MappingNode):
            problem = "already given: keep one" if name in found else "expected lines of the form `option: value`"
            raise ConfigError(f"{where}: {problem}")
        found[name] = value_node
    if section.name not in found:
        raise ConfigError(f"{path}: no section {section.name!r}, it has {', '.join(found)}; add one, or use flags")
    return found[section.name]


# --- messages -------------------------------------------------------------------------------------


def _describe_rest(rest: Sequence[str], *, known: Sequence[str], prog: str) -> str:
    """What argparse could not place: a misspelt flag with its value, or a word without a flag."""
    flags = [word.partition("=")[0] for word in rest if word.startswith("-")]
    if not flags:
        return f"unexpected argument {rest[0]!r}: every value follows a flag; see {prog} --help"
    return f"unknown flag {flags[0]}; {suggest(flags[0], known, otherwise=f'see {prog} --help')}"


def _describe_invalid(error: ValidationError, given: Mapping[str, Given], arguments_class: type[StrictConfig]) -> str:
    """One line for all problems: the flag or the key, the value, and what is allowed."""
    problems = []
    for problem in error.errors():
        message = describe_problem(problem)
        if not problem["loc"]:  # a check across fields names its flags itself
            problems.append(message)
            continue
        name = str(problem["loc"][0])
        if problem["type"] == "missing":
            what = str(arguments_class.model_fields[name].description).rstrip(".")
            problems.append(f"{flag_of(name)} is required: {what}")
        else:
            problems.append(f"{given[name].where} = {given[name].value!r}: {message}")
    return "; ".join(problems)

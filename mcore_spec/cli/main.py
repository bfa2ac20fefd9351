"""The entry points: ``mcore-spec COMMAND ...``, and `run_command` for the scripts in examples/.

A command is a row in `COMMANDS`. Its code, and with it torch, is imported only after its command line was
found to be right. Exit codes: 0 done; 2 the user can repair it, one line says how; 130 interrupted;
1 with a traceback: a fault of ours.
"""

from __future__ import annotations

import errno
import pkgutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from mcore_spec.cli.arguments import ConvertArguments, ExportArguments, flag_of
from mcore_spec.cli.engine_arguments import ExtractEngineArguments
from mcore_spec.cli.evaluation_arguments import GenerateArguments, ValidateArguments
from mcore_spec.cli.extract_arguments import ExtractArguments, ExtractHfArguments
from mcore_spec.cli.parser import Section, parse_arguments, suggest
from mcore_spec.cli.plan_arguments import PlanArguments
from mcore_spec.cli.quantization_arguments import QuantizeArguments
from mcore_spec.cli.states_arguments import HiddenStatesArguments
from mcore_spec.cli.synthesis_arguments import PreparePromptsArguments, SynthesizeArguments
from mcore_spec.cli.terminal import say, say_error
from mcore_spec.cli.training_arguments import DraftVocabArguments, FinetuneArguments
from mcore_spec.config import StrictConfig
from mcore_spec.errors import McoreSpecError

PROG = "mcore-spec"

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)

# What megatron-core and torch say at every start about themselves (optional extensions that are not
# installed, functions of each other's that they deprecate); nothing a user of a command could change.
_DEPENDENCY_WARNINGS = (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "full scope is deprecated",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
)


class Command(NamedTuple):
    """One command of the program."""

    arguments_class: type[StrictConfig]
    description: str
    target: str  # "module:function", which takes the arguments
    output: str  # the field that names the directory or the file to write

    def load(self) -> Callable[[Any], None]:
        """Import the function."""
        function: Callable[[Any], None] = pkgutil.resolve_name(self.target)
        return function


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "convert": Command(
            ConvertArguments,
            "Attach a draft to a base model and write a Megatron-core checkpoint.",
            "mcore_spec.cli.convert:run",
            "save",
        ),
        "draft-vocab": Command(
            DraftVocabArguments,
            "Choose a draft vocabulary: the most frequent tokens of conversations.",
            "mcore_spec.cli.draft_vocab:run",
            "output_dir",
        ),
        "prepare-prompts": Command(
            PreparePromptsArguments,
            "Bring a well-known set of prompts, or your own, into one form.",
            "mcore_spec.cli.prepare_prompts:run",
            "output",
        ),
        "synthesize": Command(
            SynthesizeArguments,
            "Let the base model answer prompts, here or on a server: what its draft learns from.",
            "mcore_spec.cli.synthesize:run",
            "output",
        ),
        "finetune": Command(
            FinetuneArguments,
            "Train the draft of a converted checkpoint on conversations.",
            "mcore_spec.cli.finetune:run",
            "save",
        ),
        "extract": Command(
            ExtractArguments,
            "Write the hidden states of a base to disk, for training without it.",
            "mcore_spec.cli.extract:run",
            "output_dir",
        ),
        "extract-hf": Command(
            ExtractHfArguments,
            "The same with a transformers model, a whole one on each data-parallel rank.",
            "mcore_spec.cli.extract_hf:run",
            "output_dir",
        ),
        "extract-engine": Command(
            ExtractEngineArguments,
            "Write the hidden states of a base that runs in vLLM or TensorRT-LLM, for training without it.",
            "mcore_spec.cli.extract_engine:run",
            "output_dir",
        ),
        "hidden-states": Command(
            HiddenStatesArguments,
            "Bring a store of hidden states into another tool's form, or theirs into ours.",
            "mcore_spec.cli.hidden_states:run",
            "output_dir",
        ),
        "quantize": Command(
            QuantizeArguments,
            "Quantise base and draft: FP8 or INT8, with scales found on conversations.",
            "mcore_spec.cli.quantize:run",
            "save",
        ),
        "plan": Command(
            PlanArguments,
            "Reckon the bytes, work and speed of a training run before anything is allocated.",
            "mcore_spec.cli.plan:run",
            "pretrained_model_path",
        ),
        "validate": Command(
            ValidateArguments,
            "Measure a draft: speculative decoding of prompts, compared with the base alone.",
            "mcore_spec.cli.validate:run",
            "output",
        ),
        "generate": Command(
            GenerateArguments,
            "Answer a question, or hold a conversation, with the draft.",
            "mcore_spec.cli.generate:run",
            "load",
        ),
        "export": Command(
            ExportArguments,
            "Write a checkpoint as a directory that an inference engine loads.",
            "mcore_spec.cli.export:run",
            "export_dir",
        ),
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """``mcore-spec COMMAND ...``; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in ("-h", "--help"):
        say(_overview())
        return 0
    if words and words[0] in COMMANDS:
        return run_command(words[0], words[1:])
    listing = f"commands: {', '.join(COMMANDS)}"
    if words:
        hint = suggest(words[0], list(COMMANDS), otherwise=listing)
        say_error(f"unknown command {words[0]!r}; {hint}")
    else:
        say_error(f"no command; {listing}; see {PROG} --help")
    return 2


def run_command(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one command of `COMMANDS` and return the exit code.

    Args:
        name: the command.
        argv: its command line without names (default: the process's).
    """
    return run_script(COMMANDS[name], argv, prog=f"{PROG} {name}", section=Section(name, list(COMMANDS)))


def run_script(
    command: Command, argv: Sequence[str] | None = None, *, prog: str, section: Section | None = None
) -> int:
    """Run a command that need not be one of `COMMANDS` and return the exit code.

    Args:
        command: what it takes and does.
        argv: its command line without names (default: the process's).
        prog: its name, for ``--help`` and errors.
        section: see `parse_arguments`.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        arguments = parse_arguments(
            command.arguments_class, words, prog=prog, description=command.description, section=section
        )
    except McoreSpecError as error:
        say_error(str(error))
        return 2
    except SystemExit:  # --help was asked for, and printed
        return 0
    for message in _DEPENDENCY_WARNINGS:
        warnings.filterwarnings("ignore", message)
    try:
        command.load()(arguments)
    except McoreSpecError as error:
        say_error(str(error))
        return 2
    except OSError as error:
        output = str(arguments.model_dump()[command.output])
        say_error(describe_os_error(error, output=output, flag=flag_of(command.output)))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def describe_os_error(error: OSError, *, output: str, flag: str) -> str:
    """What the operating system refused, where, and the remedy.

    Args:
        error: what was raised.
        output: the directory that the command writes.
        flag: the flag that names it.
    """
    what = error.strerror or str(error)
    # A failed write, unlike a failed open, does not know its file; a full disk is the output's.
    path = error.filename or (output if error.errno in _NO_SPACE else None)
    if path is None:
        return what
    file, directory = Path(str(path)), Path(output)
    # An export is written beside its place first, under this name.
    partial = directory.with_name(f".partial-{directory.name}")
    is_output = any(file.is_relative_to(own) for own in (directory, partial)) or directory.is_relative_to(file)
    other = flag if is_output else "path"
    if error.errno in _NO_SPACE:
        remedy = f"free space or choose another {other}"
    elif error.errno in _NO_PERMISSION:
        remedy = f"change its permissions or choose another {other}"
    else:
        remedy = f"check it or choose another {other}"
    return f"{what}: {path}; {remedy}"


def _overview() -> str:
    width = max(len(name) for name in COMMANDS)
    return "\n".join(
        [
            f"usage: {PROG} COMMAND [options]",
            "",
            "commands:",
            *(f"  {name:<{width}}  {command.description}" for name, command in COMMANDS.items()),
            "",
            f"`{PROG} COMMAND --help` lists the options of a command.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

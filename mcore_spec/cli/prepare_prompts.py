"""``mcore-spec prepare-prompts``: brings a set of prompts into the form that synthesize and validate read."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from mcore_spec.cli.synthesis_arguments import PreparePromptsArguments
from mcore_spec.cli.terminal import say
from mcore_spec.errors import ConfigError
from mcore_spec.synthesis.output import ConversationFile
from mcore_spec.synthesis.prompt_sets import PromptSetReader, as_messages


def run(arguments: PreparePromptsArguments) -> None:
    """Read every prompt, then add those that are not there yet."""
    output = Path(arguments.output)
    given = None if arguments.input is None else Path(arguments.input)
    if given is not None and given.exists() and output.exists() and output.samefile(given):
        raise ConfigError(f"--output {output} is the file of --input; choose another")
    reader = PromptSetReader(arguments.format, arguments.input, on_bad_line=arguments.on_bad_line)
    prompts = list(islice(reader, arguments.num_samples))
    with ConversationFile(output, prompts) as file:
        missing = file.missing
        for prompt in missing:
            file.write(prompt, as_messages(prompt))
    say(
        f"{len(missing):,} prompts added to {output}, {len(prompts) - len(missing):,} were there already, "
        f"{reader.num_skipped:,} entries left out"
    )
    for reason in reader.reasons:
        say(f"  left out: {reason}")

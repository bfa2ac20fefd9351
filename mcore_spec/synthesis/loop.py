"""The run: prompts that have no conversation yet are asked, many at a time, and written as they are finished."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from mcore_spec.data.prompts import Prompt
from mcore_spec.errors import EndpointError, McoreSpecError
from mcore_spec.synthesis.dialogue import Answerer, Dialogue, Rules, converse
from mcore_spec.synthesis.output import ConversationFile

Report = Callable[[Dialogue], None]


async def synthesize(answerer: Answerer, file: ConversationFile, rules: Rules, *, report: Report) -> None:
    """Ask what is missing in `file`, and add it.

    After an error nothing new is asked; what is being answered is waited for and written, then the error is raised.

    Args:
        answerer: who is asked.
        file: open.
        rules: how prompts are asked.
        report: told of each prompt that is through.

    Raises:
        EndpointError: nobody answers any more, or a question was refused.
        OSError: the file cannot be written.
    """
    run = _Run(answerer, file, rules, report)
    num_calls = -(-len(file.missing) // answerer.batch_size)
    async with asyncio.TaskGroup() as group:
        for _ in range(min(answerer.num_concurrent, num_calls)):
            group.create_task(run.work())
    if run.error is not None:
        raise run.error


class _Run:
    """What the workers share; they are one thread."""

    def __init__(self, answerer: Answerer, file: ConversationFile, rules: Rules, report: Report) -> None:
        self.answerer, self.file, self.rules, self.report = answerer, file, rules, report
        self.error: McoreSpecError | OSError | None = None
        self._batches = _batches(file.missing, answerer.batch_size)

    async def work(self) -> None:
        """Ask batch after batch until none is left or one went wrong."""
        while self.error is None and (batch := next(self._batches, None)):
            try:
                for dialogue in await converse(self.answerer, batch, self.rules):
                    self._keep(dialogue)
            except (McoreSpecError, OSError) as error:
                self.error = self.error or error

    def _keep(self, dialogue: Dialogue) -> None:
        if dialogue.refusal is not None and not self.rules.skip_refused:
            error = EndpointError(
                f"{dialogue.prompt.where}: {dialogue.refusal}; change or remove the prompt, or leave such turns out "
                "with on_refused = skip"
            )
            self.error = self.error or error
            return
        if dialogue.problem is None:
            self.file.write(dialogue.prompt, dialogue.messages)
        else:
            self.file.leave_out(dialogue.prompt, dialogue.problem)
        self.report(dialogue)


def _batches(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    rest = iter(prompts)
    while batch := list(islice(rest, size)):
        yield batch

"""The file of conversations that a run adds to, and what it needs to know to go on after an interruption.

    OUTPUT         {"conversation_id": ..., "category": ..., "conversations": [...]}     what finetune reads
    OUTPUT.state   {"settings": {...}}, then {"conversation_id": ..., "left_out": REASON}

What stands in either is not asked again. Lines stand in the order in which they came, which means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mcore_spec.data.conversations import Message
from mcore_spec.data.json_lines import GrowingFile, Line
from mcore_spec.data.prompts import Prompt, parse_prompt, read_name
from mcore_spec.errors import ConfigError

Settings = Mapping[str, str | int | float | None]

STATE_SUFFIX = ".state"


class ConversationFile:
    """Conversations on disk, one for each prompt at most.

    Attributes:
        missing: the prompts that have none yet, in their order.
        num_written: conversations that are there for the prompts.
        num_left_out: prompts of which is noted that they get none.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt], *, settings: Settings | None = None) -> None:
        """Open the file and read what is there.

        Args:
            path: of the file.
            prompts: no two of one name.
            settings: what the answers depend on. None: there are no answers, and no state is kept.

        Raises:
            ConfigError: a file that cannot be gone on with: another process writes to it, a line is damaged, or it
                was made with other settings or for other prompts.
        """
        is_new = not path.exists()
        self.path, self._prompts = path, {prompt.conversation_id: prompt for prompt in prompts}
        self._written: set[str] = set()
        self._left_out: set[str] = set()
        self._file = GrowingFile(path, field="output")
        self._state: GrowingFile | None = None
        with ExitStack() as stack:
            stack.callback(self._close)
            for line in self._file.read():
                self._written.add(self._read_conversation(line))
            if settings is not None:
                self._state = GrowingFile(path.with_name(path.name + STATE_SUFFIX), field="the state of output")
                # Whoever deletes the conversations wants to begin anew.
                if is_new:
                    self._state.clear()
                self._read_state(self._state, settings)
            stack.pop_all()

    @property
    def missing(self) -> list[Prompt]:
        """See the class."""
        done = self._written | self._left_out
        return [prompt for name, prompt in self._prompts.items() if name not in done]

    @property
    def num_written(self) -> int:
        """See the class."""
        return len(self._written & self._prompts.keys())

    @property
    def num_left_out(self) -> int:
        """See the class."""
        return len((self._left_out - self._written) & self._prompts.keys())

    def write(self, prompt: Prompt, messages: Sequence[Message]) -> None:
        """Add a conversation.

        Raises:
            OSError: it cannot be written; the file is then as it was.
        """
        category = {} if prompt.category is None else {"category": prompt.category}
        self._file.append({"conversation_id": prompt.conversation_id, **category, "conversations": list(messages)})
        self._written.add(prompt.conversation_id)

    def leave_out(self, prompt: Prompt, reason: str) -> None:
        """Note that a prompt gets no conversation.

        Raises:
            OSError: as for `write`.
        """
        assert self._state is not None, "prompts are left out of answers only"
        self._state.append({"conversation_id": prompt.conversation_id, "left_out": reason})
        self._left_out.add(prompt.conversation_id)

    def __enter__(self) -> Self:
        """The file is open already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; nothing stays behind of a run that wrote nothing."""
        self._close()

    def _close(self) -> None:
        if self._state is not None and self._file.size == 0 and not self._left_out:
            self._state.clear()
        if self._state is not None:
            self._state.close(remove_if_empty=True)
        self._file.close(remove_if_empty=not self._left_out)

    def _read_conversation(self, line: Line) -> str:
        """The name of the prompt that a line of the file answers."""
        try:
            name, found = read_name(line.value), parse_prompt(line.value)
        except ConfigError as error:
            raise ConfigError(f"{line.where}: {error}; correct or delete the line") from error
        if name is None:
            raise ConfigError(
                f"{line.where} has no conversation_id: what it answers is not known; choose another output"
            )
        prompt = self._prompts.get(name)
        if prompt is not None and prompt.turns[: len(found.turns)] != found.turns:
            raise ConfigError(
                f"{line.where} answers another prompt than the one called {name} at {prompt.where}; choose another "
                "output, or give each prompt its own name"
            )
        return name

    def _read_state(self, state: GrowingFile, settings: Settings) -> None:
        """What was left out; the settings must be the same."""
        recorded: dict[str, Any] | None = None
        for line in state.read():
            if "settings" in line.value:
                recorded = line.value["settings"]
            else:
                self._left_out.add(str(line.value.get("conversation_id")))
        if recorded is not None and not self._written and not self._left_out:
            state.clear()
            recorded = None
        if recorded is None:
            state.append({"settings": dict(settings)})
            return
        different = [key for key, value in settings.items() if recorded.get(key) != value]
        if different:
            key = different[0]
            raise ConfigError(
                f"output = {self.path} was made with {key} = {recorded.get(key)!r}, this run has {settings[key]!r}; "
                "give the same, or choose another output"
            )

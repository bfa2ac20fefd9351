"""Asking prompts turn by turn: each turn is asked behind the model's own answers to those before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from mcore_spec.data.conversations import Message
from mcore_spec.data.prompts import Prompt

# The reason that servers give for an answer that the model itself brought to its end.
WHOLE = "stop"
CUT_OFF = "length"


class Question(NamedTuple):
    """What a model is asked.

    Attributes:
        messages: the conversation so far; the user's turn is the last one.
        seed: of sampling, below 2^31.
    """

    messages: list[Message]
    seed: int


class Answer(NamedTuple):
    """What it says.

    Attributes:
        text: without special tokens; may be empty.
        finish_reason: why it ends there: `WHOLE`, `CUT_OFF` at the largest number of tokens, or a server's own word.
    """

    text: str
    finish_reason: str


class Refusal(NamedTuple):
    """A question that cannot be answered, such as one that is longer than the model's context.

    Attributes:
        reason: in the words of who refuses.
    """

    reason: str


class Answerer(Protocol):
    """A model, wherever it runs.

    Attributes:
        batch_size: questions in a call at most.
        num_concurrent: calls at a time.
    """

    batch_size: int
    num_concurrent: int

    async def answer(self, questions: Sequence[Question]) -> Sequence[Answer | Refusal]:
        """The answer to each question.

        Raises:
            EndpointError: nothing can be asked any more.
        """
        ...


class Sampling(NamedTuple):
    """How each answer is drawn.

    Attributes:
        temperature: 0: greedy.
        max_tokens: of an answer.
    """

    temperature: float = 0.0
    max_tokens: int = 512


class Rules(NamedTuple):
    """How prompts are asked, and which answers are kept.

    Attributes:
        system_prompt: the system message of prompts that have none of their own.
        seed: of sampling; each answer's follows from it, the prompt's name and the turn.
        drop_truncated: whether a conversation is left out whose last answer is not whole.
        skip_refused: whether a conversation ends before a turn that is refused; otherwise that ends the run.
    """

    system_prompt: str | None = None
    seed: int = 1234
    drop_truncated: bool = False
    skip_refused: bool = False


class Dialogue:
    """One prompt and what was said so far.

    Attributes:
        prompt: what is asked.
        messages: what was said.
        refusal: why a turn was refused; None where none was.
        problem: why there is no conversation to keep; None where there is one.
    """

    def __init__(self, prompt: Prompt, rules: Rules) -> None:
        """Nothing is asked yet."""
        self.prompt, self._rules = prompt, rules
        system = prompt.system or rules.system_prompt
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.refusal: str | None = None
        self.problem: str | None = None
        self._num_answered = 0
        self._is_over = False

    @property
    def question(self) -> Question | None:
        """What comes next; None at the end."""
        if self._is_over:
            return None
        messages = [*self.messages, self._turn]
        return Question(messages, _seed_of(self._rules.seed, self.prompt.conversation_id, self._num_answered))

    @property
    def _turn(self) -> Message:
        return {"role": "user", "content": self.prompt.turns[self._num_answered]}

    def take(self, answer: Answer | Refusal) -> None:
        """Go on with the answer to `question`."""
        if isinstance(answer, Refusal):
            self.refusal = f"turn {self._num_answered + 1} was refused: {answer.reason}"
            self._break_off(self.refusal)
        elif not answer.text.strip():  # nobody can learn from it, and `finetune` refuses it
            self._break_off(f"empty answer ({answer.finish_reason})")
        else:
            self.messages += [self._turn, {"role": "assistant", "content": answer.text}]
            self._num_answered += 1
            is_whole = answer.finish_reason == WHOLE
            if not is_whole and self._rules.drop_truncated:
                self.problem = f"truncated ({answer.finish_reason})"
            # Further turns behind an answer that was cut off would continue a conversation nobody had.
            self._is_over = not is_whole or self._num_answered == len(self.prompt.turns)

    def _break_off(self, problem: str) -> None:
        """The turns that were answered before are a conversation of their own."""
        self._is_over = True
        if not self._num_answered:
            self.problem = problem


async def converse(answerer: Answerer, prompts: Sequence[Prompt], rules: Rules) -> list[Dialogue]:
    """Ask prompts turn by turn, together.

    Args:
        answerer: who is asked.
        prompts: `answerer.batch_size` at most.
        rules: how.

    Raises:
        EndpointError: see `Answerer.answer`.
    """
    dialogues = [Dialogue(prompt, rules) for prompt in prompts]
    while True:
        asked = [(dialogue, question) for dialogue in dialogues if (question := dialogue.question) is not None]
        if not asked:
            return dialogues
        answers = await answerer.answer([question for _, question in asked])
        for (dialogue, _), answer in zip(asked, answers, strict=True):
            dialogue.take(answer)


def _seed_of(seed: int, name: str, turn: int) -> int:
    """Of one answer: the same in any order, and in a run that was interrupted."""
    digest = hashlib.sha256(f"{seed}\n{turn}\n{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1

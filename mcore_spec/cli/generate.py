"""``mcore-spec generate``: one answer or a conversation, with the draft; what it contributed is shown in colour."""

from __future__ import annotations

import sys

from mcore_spec.cli.convert import layout_of
from mcore_spec.cli.drafted_base import load_drafted_base, sampling_temperature, topology_of, typical_of
from mcore_spec.cli.evaluation_arguments import GenerateArguments
from mcore_spec.cli.terminal import has_colour, say, say_part
from mcore_spec.data.conversations import Message
from mcore_spec.errors import ConfigError
from mcore_spec.evaluation.decoding import Answer, Decoded, Decoder, Request
from mcore_spec.evaluation.prompts import PromptEncoder
from mcore_spec.evaluation.statistics import Acceptance
from mcore_spec.parallel.layout import parallel_runtime, run_on_rank_zero

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
# What a tokenizer writes for a character of which it has not all bytes yet.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Writes an answer while it grows, token by token."""

    def __init__(self, encoder: PromptEncoder, *, is_coloured: bool) -> None:
        """Begin an answer.

        Args:
            encoder: from token ids to text.
            is_coloured: show tokens of the draft in green.
        """
        self._encoder, self._is_coloured = encoder, is_coloured
        # Text of tokens[start:] up to `shown` of them is written; a few earlier tokens decide about blanks.
        self._start, self._shown = 0, 0

    def __call__(self, _sequence: int, answer: Answer, _num_new: int) -> None:
        """Write what is new."""
        for stop in range(self._shown + 1, len(answer.token_ids) + 1):
            before = self._encoder.decode(answer.token_ids[self._start : self._shown])
            text = self._encoder.decode(answer.token_ids[self._start : stop])
            if text.endswith(_INCOMPLETE):
                continue
            part = text[len(before) :]
            is_drafts = bool(part) and self._is_coloured and all(answer.origins[self._shown : stop])
            say_part(f"{_GREEN}{part}{_PLAIN}" if is_drafts else part)
            self._start, self._shown = self._shown, stop


def run(arguments: GenerateArguments) -> None:
    """Load, answer, say how fast it was."""
    layout, topology = layout_of(arguments), topology_of(arguments)
    with parallel_runtime(layout, seed=arguments.seed):
        model, encoder = load_drafted_base(arguments, layout)
        decoder = Decoder(
            model,
            topology=topology,
            temperature=sampling_temperature(arguments),
            typical=typical_of(arguments),
            end_ids=encoder.end_ids,
        )
        messages: list[Message] = []
        if arguments.system is not None:
            messages.append({"role": "system", "content": arguments.system})
        if arguments.prompt is not None:
            _answer(decoder, encoder, [*messages, _question(arguments.prompt)], arguments)
            return
        say("ask; an empty line ends the conversation")
        while question := run_on_rank_zero(_read_question):
            messages.append(_question(question))
            try:
                answer = _answer(decoder, encoder, messages, arguments)
            except ConfigError as error:
                # Too long by now: the conversation is over, the program is not.
                say(f"{error}; the conversation begins anew")
                messages = messages[:1] if arguments.system is not None else []
                continue
            messages.append({"role": "assistant", "content": answer})


def _question(text: str) -> Message:
    return {"role": "user", "content": text}


def _read_question() -> str:
    """The next line; empty at the end of the input."""
    say_part("> " if sys.stdin.isatty() else "")
    return sys.stdin.readline().strip()


def _answer(decoder: Decoder, encoder: PromptEncoder, messages: list[Message], arguments: GenerateArguments) -> str:
    request = Request(tuple(encoder.encode(messages)), arguments.osl, arguments.seed)
    stream = TextStream(encoder, is_coloured=has_colour())
    decoded = decoder.decode([request], on_tokens=stream)
    say("")
    say(_describe(decoded, num_steps=decoder.topology.depth))
    return encoder.decode(decoded.answers[0].token_ids)


def _describe(decoded: Decoded, *, num_steps: int) -> str:
    acceptance = Acceptance.of(decoded.answers, num_steps=num_steps)
    length = "-" if acceptance.acceptance_length is None else f"{acceptance.acceptance_length:.2f}"
    rate = decoded.num_timed_tokens / decoded.seconds if decoded.seconds > 0 else 0.0
    return f"[{acceptance.num_tokens} tokens, {rate:.1f} tokens/s, acceptance length {length}]"

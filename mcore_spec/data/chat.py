"""Chat template to token ids and loss mask. The only file of this room that knows transformers.

The mask covers what the model must produce: the text of each assistant turn, its end-of-turn token included. Not
the header that asks for it, and not what the template writes behind the end of turn. Spans are found in the
rendered text, which is then tokenised once, whole: the ids are those the model sees at serving. A token belongs to
a span iff it starts inside.

Where the template says itself what the model produces (``{% generation %}``) that is taken. Some such templates leave
the end-of-turn token behind the span: it is taken in, or a draft would never learn to end a turn.

Otherwise a span is found by its surroundings. For the turn i, with a mark rendered in place of one content at a time:

    behind(j)  what the whole conversation has behind the content of turn j
    header     what stands behind the content of turn i - 1 when the template is asked for an answer
    start      where behind(i - 1) begins, plus the header, with which it must begin
    content    ends where behind(i) begins
    stop       behind the first special token of what the template writes both there and behind turn i as the last one

Each ``behind`` must be a literal tail of the rendering, so the offsets are exact, or there is an error: templates that
trim contents, or drop the reasoning of earlier turns, are followed; nothing is searched for by its text.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from mcore_spec.data.conversations import Message
from mcore_spec.data.document import BoolArray, IntArray
from mcore_spec.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenizer: TypeAlias = "PreTrainedTokenizerBase"

# transformers looks for the markers with the same pattern.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKERS_REMEDY = "give the tokenizer a template with {% generation %} markers, or conversations of one answer each"
_SHOWN_CHARACTERS = 80


class EncodedConversation(NamedTuple):
    """Ids of the n tokens of a conversation, and for each whether the model must produce it."""

    token_ids: list[int]
    loss_mask: list[bool]


class Span(NamedTuple):
    """Characters ``start..stop`` of a rendered text."""

    start: int
    stop: int


class RenderedConversation(NamedTuple):
    """A conversation as text.

    Attributes:
        text: what the template writes.
        spans: what the model must produce of it, ascending.
    """

    text: str
    spans: tuple[Span, ...]


def load_tokenizer(path_or_hub_id: str | Path) -> Tokenizer:
    """A tokenizer from a directory or the hub.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            str(path_or_hub_id), local_files_only=Path(path_or_hub_id).exists()
        )
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"tokenizer_model = {path_or_hub_id} holds no tokenizer that can be read ({reason}); give the directory or "
            "hub id of the base model's"
        ) from error
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    """Refuse a tokenizer that knows ids which the base has no embedding for.

    Args:
        tokenizer: to look at.
        vocab_size: entries of the base's vocabulary.
        where: what it was read from, for the error.

    Raises:
        ConfigError: an id at or above `vocab_size`.
    """
    vocabulary = tokenizer.get_vocab()
    token = max(vocabulary, key=vocabulary.__getitem__)
    highest = max(vocabulary[token], len(tokenizer) - 1)
    if highest >= vocab_size:
        raise ConfigError(
            f"{where}: the tokenizer has ids up to {highest} ({token!r}), the base's vocabulary has {vocab_size} "
            "entries; give the tokenizer that belongs to the base"
        )


def check_same_vocabulary(given: Tokenizer, own: Tokenizer, where: str) -> None:
    """Refuse a tokenizer that gives tokens other ids than the base's own.

    Args:
        given: to look at; its chat template may differ.
        own: the base's.
        where: what `given` was read from, for the error.

    Raises:
        ConfigError: names a token.
    """
    theirs, ours = given.get_vocab(), own.get_vocab()
    for token in sorted(theirs.keys() | ours.keys()):
        if theirs.get(token) != ours.get(token):
            raise ConfigError(
                f"{where} is not the base's tokenizer: the id of {token!r} is {theirs.get(token)} there and "
                f"{ours.get(token)} in the base's own; leave it out, or give one that belongs to the base"
            )


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> EncodedConversation:
    """Token ids and loss mask of one conversation; `ChatEncoder` does many faster.

    Raises:
        ConfigError: see `ChatEncoder` and `ChatEncoder.render`.
    """
    encoder = ChatEncoder(tokenizer)
    return encoder.tokenize([encoder.render(messages)])[0]


def encode_question(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids that a model goes on from: a conversation whose last turn is the user's, and the header of the answer.

    Raises:
        ConfigError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path} has no chat template; put a chat_template.jinja into its directory, "
            "or give a chat model"
        )
    with _template_errors():
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


class ChatEncoder:
    """A tokenizer and its chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Look at the tokenizer.

        Raises:
            ConfigError: it has no chat template, or tells no character offsets.
        """
        from transformers import PreTrainedTokenizerFast

        name = tokenizer.name_or_path or type(tokenizer).__name__
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ConfigError(
                f"tokenizer {name} is a {type(tokenizer).__name__} without character offsets, which the loss mask "
                "needs; put a tokenizer.json into its directory (a fast tokenizer)"
            )
        if not tokenizer.chat_template:
            raise ConfigError(
                f"tokenizer {name} has no chat template; put a chat_template.jinja into its directory, or give the "
                "tokenizer of a chat model"
            )
        try:
            self.template = tokenizer.get_chat_template()
        except ValueError as error:  # several named templates, none of them the default
            raise ConfigError(f"tokenizer {name}: {error}; name one of its chat templates 'default'") from error
        self.tokenizer = tokenizer
        self._description: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        self._trims_blanks = '"trim_offsets": true' in json.dumps(self._description["post_processor"])
        self.has_markers = _GENERATION.search(self.template) is not None
        special = {added.content for added in tokenizer.added_tokens_decoder.values() if added.special}
        special.update(tokenizer.all_special_tokens)
        # Longest first: of two that begin alike, the tokenizer too takes the longer one.
        by_length = sorted(special, key=lambda token: (-len(token), token))
        self._special = re.compile("|".join(re.escape(token) for token in by_length)) if special else None

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of all that decides ids and masks: tokenizer and template."""
        # Truncation and padding are what the last caller left behind; `tokenize` sets its own.
        lasting = {key: value for key, value in self._description.items() if key not in ("truncation", "padding")}
        parts = [lasting, self.template, self.tokenizer.special_tokens_map]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def render(self, messages: Sequence[Message]) -> RenderedConversation:
        """The text of a conversation, and the spans in it that the model must produce.

        Args:
            messages: ``role`` and ``content`` of each turn; no assistant's turn is the first.

        Raises:
            ConfigError: the template refuses the conversation, or does not say exactly where an answer stands.
        """
        turns = list(messages)
        if self.has_markers:
            return self._render_marked(turns)
        text = self._render(turns)
        answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
        return RenderedConversation(text, tuple(self._span(turns, index, text) for index in answers))

    def tokenize(self, rendered: Sequence[RenderedConversation]) -> list[EncodedConversation]:
        """Token ids and loss masks, many texts in one call of the tokenizer."""
        if not rendered:
            return []
        tokens = self.tokenizer(
            [each.text for each in rendered],
            add_special_tokens=False,  # the template has written them
            return_offsets_mapping=True,
            return_attention_mask=False,
            padding=False,
            truncation=False,
            verbose=False,  # the length is the caller's business
        )
        return [
            EncodedConversation(list(ids), self._mask(np.asarray(offsets).reshape(-1, 2), each.spans).tolist())
            for ids, offsets, each in zip(tokens["input_ids"], tokens["offset_mapping"], rendered, strict=True)
        ]

    def _mask(self, offsets: IntArray, spans: Sequence[Span]) -> BoolArray:
        """Which tokens start in one of the spans; `offsets` are characters, int64 [n, 2]."""
        starts, stops = offsets[:, 0].copy(), offsets[:, 1]
        if self._trims_blanks:
            # The blank before a word is left out of its token's offsets: a token begins where the last one ended.
            np.minimum(starts[1:], stops[:-1], out=starts[1:])
        mask = np.zeros(len(offsets), dtype=np.bool_)
        for start, stop in spans:
            mask |= (starts >= start) & (starts < stop)
        return mask

    def _render_marked(self, turns: list[Message]) -> RenderedConversation:
        rendered = self._render_markers(turns)
        answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
        if len(rendered.spans) != len(answers):
            return rendered  # parts of answers, or the last one alone: which turn a span ends is not known
        spans = [
            self._take_in_end(rendered.text, span, turns[: index + 1])
            for index, span in zip(answers, rendered.spans, strict=True)
        ]
        return RenderedConversation(rendered.text, tuple(spans))

    def _take_in_end(self, text: str, span: Span, turns: list[Message]) -> Span:
        """A marked span with the end-of-turn token, which some templates write behind it.

        Args:
            text: the rendering of the whole conversation.
            span: of the last of `turns` in it.
            turns: up to the answer.
        """
        if self._special is None or self._ends_turn(text[span.start : span.stop]):
            return span
        alone = self._render_markers(turns)
        if not alone.spans:
            return span
        # What follows the answer whatever comes next, as in `_span`.
        ending = os.path.commonprefix([text[span.stop :], alone.text[alone.spans[-1].stop :]])
        end_of_turn = self._special.search(ending)
        return Span(span.start, span.stop + (end_of_turn.end() if end_of_turn else 0))

    def _ends_turn(self, text: str) -> bool:
        """Whether a special token is the last of a text that is not blank."""
        assert self._special is not None
        return any(match.end() == len(text.rstrip()) for match in self._special.finditer(text))

    def _render_markers(self, turns: list[Message]) -> RenderedConversation:
        """The text, and what the template marks in it."""
        # apply_chat_template gives a mask over tokens only, into which it takes a token that merely ends in the span.
        from transformers.utils.chat_template_utils import render_jinja_template

        special_tokens: Any = self.tokenizer.special_tokens_map
        with _template_errors():
            rendered: Any = render_jinja_template(
                conversations=[turns],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **special_tokens,
            )
        (text,), (spans,) = rendered
        return RenderedConversation(text, tuple(Span(*span) for span in spans))

    def _render(self, turns: list[Message], *, asks_for_answer: bool = False) -> str:
        with _template_errors():
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks_for_answer)
        assert isinstance(text, str)
        return text

    def _span(self, turns: list[Message], index: int, text: str) -> Span:
        """Where the answer in turn `index` stands in `text`, the rendering of all turns. See the module's text."""
        mark = "CONTENT"
        while mark in text:
            mark += "T"
        before = self._tail(turns, index - 1, mark, text)
        behind = self._tail(turns, index, mark, text)
        header = self._behind(turns[:index], index - 1, mark, asks_for_answer=True)
        if not before.startswith(header) or len(header) + len(behind) > len(before):
            raise ConfigError(
                f"turn {index + 1}: asked for an answer, the chat template writes {_shown(header)} behind the turn "
                f"before, but in the conversation {_shown(before[: len(header)])} stands there; {_MARKERS_REMEDY}"
            )
        start, content_stop = len(text) - len(before) + len(header), len(text) - len(behind)
        # What follows the content whatever comes next; the header of the next turn is none of it.
        ending = os.path.commonprefix([behind, self._behind(turns[: index + 1], index, mark)])
        end_of_turn = self._special.search(ending) if self._special else None
        return Span(start, content_stop + (end_of_turn.end() if end_of_turn else 0))

    def _tail(self, turns: list[Message], index: int, mark: str, text: str) -> str:
        """What `text` has behind the content of turn `index`."""
        tail = self._behind(turns, index, mark)
        if not text.endswith(tail):
            num_equal = len(os.path.commonprefix([text[::-1], tail[::-1]]))
            found, other = (repr(each[: len(each) - num_equal][-_SHOWN_CHARACTERS:]) for each in (text, tail))
            raise ConfigError(
                f"turn {index + 1}: what the chat template writes behind it depends on its content: {found} in the "
                f"conversation, {other} with another content; {_MARKERS_REMEDY}"
            )
        return tail

    def _behind(self, turns: list[Message], index: int, mark: str, *, asks_for_answer: bool = False) -> str:
        """What follows the mark when it stands for the content of turn `index`."""
        marked = [*turns[:index], {**turns[index], "content": mark}, *turns[index + 1 :]]
        parts = self._render(marked, asks_for_answer=asks_for_answer).split(mark)
        if len(parts) != 2:
            times = f"{len(parts) - 1} times" if len(parts) > 1 else "not at all"
            raise ConfigError(
                f"turn {index + 1}: the chat template writes its content {times}, so that its place is not known; "
                f"{_MARKERS_REMEDY}"
            )
        return parts[1]


@contextmanager
def _template_errors() -> Iterator[None]:
    """What a template raises, as `ConfigError`."""
    from jinja2.exceptions import TemplateError

    try:
        yield
    except (TemplateError, TypeError) as error:  # TypeError: a template that joins strings meets something else
        raise ConfigError(
            f"the chat template refuses this conversation ({error}); change it, or give another template"
        ) from error


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}...")

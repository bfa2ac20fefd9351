"""Measuring a draft on prompts: real speculative decoding, and the base alone on the same questions.

Each turn of a prompt is asked behind the model's own answers to the turns before. The data- and context-parallel
ranks share the prompts out; every rank has the whole result in the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from mcore_spec.data.conversations import Message
from mcore_spec.data.prompts import Prompt
from mcore_spec.errors import ConfigError
from mcore_spec.evaluation.decoding import Answer, Decoded, Decoder, Request
from mcore_spec.evaluation.lossless import Difference, find_difference
from mcore_spec.evaluation.prompts import PromptEncoder, first_messages
from mcore_spec.evaluation.statistics import Acceptance
from mcore_spec.evaluation.tree import Topology
from mcore_spec.evaluation.typical import TypicalAcceptance
from mcore_spec.parallel.layout import run_on_every_rank

NO_CATEGORY = "other"
# Stands for an answer while only lengths are asked for; some templates refuse an empty one.
_ANY_ANSWER = "..."


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How prompts are answered.

    Attributes:
        topology: of the proposals.
        osl: most new tokens of an answer (output sequence length).
        temperature: of sampling; 0: the likeliest token.
        batch_size: prompts that a rank answers at a time.
        seed: of sampling.
        typical: acceptance of what the base finds likely enough; ``None``: exact, of what it would say.
        compares: whether the base answers alone too, for its speed and to compare the answers.
    """

    topology: Topology
    osl: int
    temperature: float = 0.0
    batch_size: int = 8
    seed: int = 1234
    typical: TypicalAcceptance | None = None
    compares: bool = True

    @property
    def is_exact(self) -> bool:
        """Whether the answers are meant to be the base's; with typical acceptance they are not."""
        return self.typical is None


class Speed(NamedTuple):
    """Tokens behind the first of each answer, and the seconds they took on one rank."""

    num_tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one data-parallel rank measured.

    Attributes:
        by_category: acceptance.
        speculative: with the draft.
        plain: without; ``None`` where it was not run.
        differences: of greedy answers with and without the draft.
    """

    by_category: dict[str, Acceptance]
    speculative: Speed
    plain: Speed | None
    differences: tuple[Difference, ...]


class Evaluation(NamedTuple):
    """What was measured on all prompts.

    Attributes:
        overall: acceptance.
        by_category: the same by category, in alphabetical order.
        tokens_per_second: with the draft, all ranks together, the prompts' passes left out.
        baseline_tokens_per_second: of the base alone, in the same batches; ``None`` where it was not run.
        differences: of greedy answers with and without the draft, faults and ties.
        is_lossless: whether there is no fault; ``None`` where nothing was compared.
        settings: of the answers.
        dtype: in which base and draft computed, by torch's name.
    """

    overall: Acceptance
    by_category: dict[str, Acceptance]
    tokens_per_second: float
    baseline_tokens_per_second: float | None
    differences: tuple[Difference, ...]
    is_lossless: bool | None
    settings: Settings
    dtype: str

    @property
    def faults(self) -> list[Difference]:
        """Differences that rounding does not explain."""
        return [each for each in self.differences if not each.is_tie]


class Evaluator:
    """A model on this rank, and how it is measured. Every rank must make the same calls."""

    def __init__(self, model: GPTModel, encoder: PromptEncoder, settings: Settings) -> None:
        """Look at the model.

        Args:
            model: this rank's part.
            encoder: from messages to token ids and back.
            settings: of the answers.

        Raises:
            ConfigError: settings that the draft cannot follow.
            UnsupportedError: a model that cannot keep keys and values, or a draft that cannot be served.
        """
        self.model, self.encoder, self.settings = model, encoder, settings
        self.decoder = self._decoder(settings.topology)
        self.plain = self._decoder(Topology.chain(0)) if settings.compares else None
        self.group: dist.ProcessGroup = model.pg_collection.dp_cp

    def _decoder(self, topology: Topology) -> Decoder:
        settings = self.settings
        return Decoder(
            self.model,
            topology=topology,
            temperature=settings.temperature,
            typical=settings.typical,
            end_ids=self.encoder.end_ids,
        )

    def __call__(self, prompts: Sequence[Prompt], *, on_prompts: Callable[[int], None] | None = None) -> Evaluation:
        """Answer all prompts.

        Args:
            prompts: the same on every rank, at least one.
            on_prompts: called with the number of prompts that this rank has finished.

        Raises:
            ConfigError: no prompts, one that the chat template refuses, or one that is too long.
        """
        if not prompts:
            raise ConfigError("there are no prompts to measure on; give some")
        # Before any is answered: the last one may be the one that is too long.
        run_on_every_rank(lambda: self._check(prompts))
        own = prompts[self.group.rank() :: self.group.size()]
        shares: list[Share] = [self._empty()] * self.group.size()
        measured = run_on_every_rank(lambda: self._measure(own, on_prompts))
        dist.all_gather_object(shares, measured, group=self.group)
        return self._summary(shares)

    def _check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a prompt that is too long, its answers as long as they may be."""
        for prompt in prompts:
            messages = first_messages(prompt)
            for turn, text in enumerate(prompt.turns):
                messages.append({"role": "user", "content": text})
                request = self._request(prompt, turn, messages)
                self.decoder.check(request._replace(max_new_tokens=(turn + 1) * self.settings.osl))
                messages.append({"role": "assistant", "content": _ANY_ANSWER})

    def _request(self, prompt: Prompt, turn: int, messages: list[Message]) -> Request:
        name = prompt.where or prompt.conversation_id
        if len(prompt.turns) > 1:
            name = f"{name}, turn {turn + 1}"
        try:
            token_ids = self.encoder.encode(messages)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        # What is drawn for a prompt depends on the prompt, not on its place or its batch.
        digest = hashlib.sha256(f"{self.settings.seed} {prompt.conversation_id} {turn}".encode()).digest()
        seed = int.from_bytes(digest[:7], "little")
        return Request(tuple(token_ids), self.settings.osl, seed, name)

    def _empty(self) -> Share:
        return Share(by_category={}, speculative=Speed(0, 0.0), plain=None, differences=())

    def _measure(self, prompts: Sequence[Prompt], on_prompts: Callable[[int], None] | None) -> Share:
        """This rank's prompts, batch by batch and turn by turn."""
        answers: dict[str, list[Answer]] = {}
        speeds: dict[bool, list[Speed]] = {True: [], False: []}
        differences: list[Difference] = []
        size, num_done = self.settings.batch_size, 0
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            for asked, requests, decoded in self._conversations(batch):
                for prompt, answer in zip(asked, decoded.answers, strict=True):
                    answers.setdefault(prompt.category or NO_CATEGORY, []).append(answer)
                speeds[True].append(Speed(decoded.num_timed_tokens, decoded.seconds))
                if self.plain is not None:
                    plain = self.plain.decode(requests)
                    speeds[False].append(Speed(plain.num_timed_tokens, plain.seconds))
                    differences += self._differences(requests, decoded, plain)
            num_done += len(batch)
            if on_prompts is not None:
                on_prompts(num_done)
        depth = self.settings.topology.depth
        return Share(
            by_category={name: Acceptance.of(each, num_steps=depth) for name, each in answers.items()},
            speculative=_sum(speeds[True]),
            plain=_sum(speeds[False]) if self.plain is not None else None,
            differences=tuple(differences),
        )

    def _conversations(self, batch: Sequence[Prompt]) -> Iterator[tuple[list[Prompt], list[Request], Decoded]]:
        """The turns of a batch of prompts, one after the other: who is asked, what, and the answers."""
        messages = [first_messages(prompt) for prompt in batch]
        for turn in range(max(len(prompt.turns) for prompt in batch)):
            asked = [index for index, prompt in enumerate(batch) if turn < len(prompt.turns)]
            for index in asked:
                messages[index].append({"role": "user", "content": batch[index].turns[turn]})
            requests = [self._request(batch[index], turn, messages[index]) for index in asked]
            decoded = self.decoder.decode(requests)
            for index, answer in zip(asked, decoded.answers, strict=True):
                messages[index].append({"role": "assistant", "content": self.encoder.decode(answer.token_ids)})
            yield [batch[index] for index in asked], requests, decoded

    def _differences(self, requests: list[Request], decoded: Decoded, plain: Decoded) -> Iterator[Difference]:
        if self.settings.temperature > 0 or self.settings.typical is not None:
            return
        for request, ours, theirs in zip(requests, decoded.answers, plain.answers, strict=True):
            found = find_difference(
                self.model,
                request.token_ids,
                ours.token_ids,
                theirs.token_ids,
                name=request.name,
                num_rows=1 + len(self.settings.topology),
            )
            if found is not None:
                yield found

    def _summary(self, shares: Sequence[Share]) -> Evaluation:
        names = sorted({name for share in shares for name in share.by_category})
        by_category = {
            name: Acceptance.total([share.by_category[name] for share in shares if name in share.by_category])
            for name in names
        }
        differences = tuple(each for share in shares for each in share.differences)
        plain = [share.plain for share in shares if share.plain is not None]
        is_compared = self.plain is not None and self.settings.temperature == 0 and self.settings.is_exact
        return Evaluation(
            overall=Acceptance.total(list(by_category.values())),
            by_category=by_category,
            tokens_per_second=sum(_rate(share.speculative) for share in shares),
            baseline_tokens_per_second=sum(_rate(each) for each in plain) if self.plain is not None else None,
            differences=differences,
            is_lossless=all(each.is_tie for each in differences) if is_compared else None,
            settings=self.settings,
            dtype=str(next(self.model.parameters()).dtype).removeprefix("torch."),
        )


def _sum(speeds: Sequence[Speed]) -> Speed:
    return Speed(sum(each.num_tokens for each in speeds), sum(each.seconds for each in speeds))


def _rate(speed: Speed) -> float:
    return speed.num_tokens / speed.seconds if speed.seconds > 0 else 0.0

"""Turn by turn, many at a time: what is asked, what is kept, and what an error leaves."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from mcore_spec.data.prompts import Prompt
from mcore_spec.errors import EndpointError
from mcore_spec.synthesis.dialogue import Answer, Dialogue, Question, Refusal, Rules
from mcore_spec.synthesis.loop import synthesize
from mcore_spec.synthesis.output import ConversationFile
from tests.unit.data_cases import talk

PROMPTS = [Prompt(str(n), None, tuple(f"{n}.{turn}" for turn in range(1 + n % 3)), where=f"p:{n}") for n in range(10)]


class Scripted:
    """Answers with the conversation itself, or as it is told."""

    def __init__(
        self,
        reply: Callable[[str], Answer | Refusal | None] = lambda turn: None,
        *,
        batch_size: int = 1,
        num_concurrent: int = 1,
        delays: Sequence[int] = (0,),
    ) -> None:
        self.reply, self.batch_size, self.num_concurrent = reply, batch_size, num_concurrent
        self.asked: list[Question] = []
        self.most_at_once = self._now = 0
        self._delays, self._calls = delays, count()

    async def answer(self, questions: Sequence[Question]) -> list[Answer | Refusal]:
        assert 0 < len(questions) <= self.batch_size
        self.asked += questions
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        for _ in range(self._delays[next(self._calls) % len(self._delays)]):
            await asyncio.sleep(0)
        self._now -= 1
        return [self.reply(question.messages[-1]["content"]) or echo(question) for question in questions]

    @property
    def turns(self) -> list[str]:
        return [question.messages[-1]["content"] for question in self.asked]


def echo(question: Question) -> Answer:
    said = " ".join(f"{message['role'][0]}:{message['content']}" for message in question.messages)
    return Answer(f"({said} #{question.seed})", "stop")


def run(
    path: Path, answerer: Scripted, prompts: Sequence[Prompt] = PROMPTS, *, rules: Rules | None = None
) -> list[Dialogue]:
    told: list[Dialogue] = []
    with ConversationFile(path, prompts, settings={}) as file:
        asyncio.run(synthesize(answerer, file, rules or Rules(), report=told.append))
    return told


def stored(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["conversation_id"] for line in lines}) == len(lines)
    return {line["conversation_id"]: line["conversations"] for line in lines}


def test_each_turn_is_asked_behind_the_models_own_answers(tmp_path: Path) -> None:
    answerer = Scripted()
    run(tmp_path / "x.jsonl", answerer, PROMPTS[2:3], rules=Rules(system_prompt="s"))
    first, second, third = answerer.asked
    assert first.messages == talk("2.0", system="s")
    assert second.messages == [*first.messages, *talk("", echo(first).text)[1:], *talk("2.1")]
    assert third.messages == [*second.messages, *talk("", echo(second).text)[1:], *talk("2.2")]
    assert stored(tmp_path / "x.jsonl") == {"2": [*third.messages, *talk("", echo(third).text)[1:]]}
    own = PROMPTS[0]._replace(system="own")
    run(tmp_path / "y.jsonl", answerer, [own], rules=Rules(system_prompt="s"))
    assert answerer.asked[-1].messages == talk("0.0", system="own")


def test_neither_order_nor_company_nor_interruption_changes_an_answer(tmp_path: Path) -> None:
    run(tmp_path / "a.jsonl", Scripted())
    expected = stored(tmp_path / "a.jsonl")
    assert len(expected) == 10 and len({question[-1]["content"] for question in expected.values()}) == 10
    alone = Scripted()
    run(tmp_path / "seeds.jsonl", alone)
    assert len({question.seed for question in alone.asked}) == len(alone.asked) == 19
    crowd = Scripted(batch_size=3, num_concurrent=4, delays=(5, 1, 0, 9, 2))
    run(tmp_path / "b.jsonl", crowd, PROMPTS[::-1])
    assert stored(tmp_path / "b.jsonl") == expected
    assert list(stored(tmp_path / "b.jsonl")) != list(expected)
    run(tmp_path / "c.jsonl", Scripted(), PROMPTS[4:6])
    rest = Scripted(batch_size=2, num_concurrent=2)
    run(tmp_path / "c.jsonl", rest)
    assert stored(tmp_path / "c.jsonl") == expected
    assert not {"4.0", "5.0"}.intersection(rest.turns)
    # Another seed is another answer.
    run(tmp_path / "d.jsonl", Scripted(), rules=Rules(seed=2))
    assert not set(map(str, stored(tmp_path / "d.jsonl").values())).intersection(map(str, expected.values()))


def test_as_many_at_a_time_as_allowed_and_no_more(tmp_path: Path) -> None:
    for wanted, expected in ((1, 1), (4, 4), (64, 10)):
        answerer = Scripted(num_concurrent=wanted, delays=(3,))
        told = run(tmp_path / f"{wanted}.jsonl", answerer)
        assert (answerer.most_at_once, len(told)) == (expected, 10)


def test_an_answer_that_is_cut_off_ends_its_conversation(tmp_path: Path) -> None:
    def reply(turn: str) -> Answer | None:
        return Answer("cut", "length") if turn in ("2.1", "3.0", "5.2") else None

    answerer = Scripted(reply)
    run(tmp_path / "kept.jsonl", answerer)
    kept = stored(tmp_path / "kept.jsonl")
    assert len(kept) == 10 and "2.2" not in answerer.turns
    assert [len(kept[name]) // 2 for name in ("2", "3", "5")] == [2, 1, 3]
    told = run(tmp_path / "dropped.jsonl", Scripted(reply), rules=Rules(drop_truncated=True))
    assert stored(tmp_path / "dropped.jsonl") == {name: kept[name] for name in kept if name not in ("2", "3", "5")}
    assert {each.prompt.conversation_id: each.problem for each in told if each.problem} == dict.fromkeys(
        ("2", "3", "5"), "truncated (length)"
    )
    again = Scripted(reply)
    run(tmp_path / "dropped.jsonl", again, rules=Rules(drop_truncated=True))
    assert again.asked == []


def test_an_answer_without_text_is_no_turn(tmp_path: Path) -> None:
    answerer = Scripted(lambda turn: Answer(" \n", "stop") if turn in ("2.1", "3.0") else None)
    told = run(tmp_path / "x.jsonl", answerer)
    found = stored(tmp_path / "x.jsonl")
    assert len(found) == 9 and len(found["2"]) == 2 and "2.2" not in answerer.turns
    assert [each.problem for each in told if each.problem] == ["empty answer (stop)"]


def refuse(turn: str) -> Refusal | None:
    return Refusal("too long") if turn in ("2.1", "3.0") else None


def test_what_is_refused_is_skipped_where_that_is_asked_for(tmp_path: Path) -> None:
    told = run(tmp_path / "x.jsonl", Scripted(refuse), rules=Rules(skip_refused=True))
    found = stored(tmp_path / "x.jsonl")
    assert len(found) == 9 and len(found["2"]) == 2
    assert [each.problem for each in told if each.problem] == ["turn 1 was refused: too long"]


@pytest.mark.parametrize(("batch_size", "num_concurrent"), [(1, 1), (4, 1), (1, 3), (2, 3)])
def test_a_refusal_ends_the_run_and_keeps_the_rest(batch_size: int, num_concurrent: int, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    sizes = {"batch_size": batch_size, "num_concurrent": num_concurrent}
    refusing = Scripted(refuse, **sizes)
    with pytest.raises(EndpointError) as caught:
        run(path, refusing)
    name, turn = ("2", 2) if "p:2" in str(caught.value) else ("3", 1)
    assert str(caught.value) == (
        f"p:{name}: turn {turn} was refused: too long; change or remove the prompt, or leave such turns out with "
        "on_refused = skip"
    )
    # Whoever was asked besides is there; what was refused is asked again.
    done = stored(path)
    begun = {turn.split(".")[0] for turn in refusing.turns}
    assert set(done) == begun - {"2", "3"} and len(begun) < 10
    rest = Scripted(**sizes)
    run(path, rest)
    assert len(stored(path)) == 10
    assert {turn.split(".")[0] for turn in rest.turns} == {prompt.conversation_id for prompt in PROMPTS} - set(done)


def test_a_full_disk_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "x.jsonl", ConversationFile.write

    def fill(file: ConversationFile, prompt: Prompt, messages: Any) -> None:
        if prompt.conversation_id == "4":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, prompt, messages)

    monkeypatch.setattr(ConversationFile, "write", fill)
    with pytest.raises(OSError, match="No space"):
        run(path, Scripted())
    monkeypatch.setattr(ConversationFile, "write", write)
    assert set(stored(path)) == {"0", "1", "2", "3"}
    run(path, Scripted())
    assert len(stored(path)) == 10

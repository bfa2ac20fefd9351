"""Asking a real HTTP server that fails, stalls, hangs up and comes back."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from mcore_spec.data.prompts import Prompt
from mcore_spec.errors import ConfigError, EndpointError
from mcore_spec.synthesis.backoff import Backoff, read_retry_after
from mcore_spec.synthesis.dialogue import Rules, Sampling
from mcore_spec.synthesis.loop import synthesize
from mcore_spec.synthesis.output import ConversationFile
from mcore_spec.synthesis.server import Endpoint, ServerAnswerer
from tests.chat_server import MODEL, Body, ChatServer, Reply, completion, echo, refusal
from tests.unit.data_cases import talk

PROMPTS = [
    Prompt(str(n), None, tuple(f"{n}.{turn} ü漢🙂" for turn in range(1 + n % 2)), where=f"p:{n}") for n in range(12)
]
QUICK = Backoff(max_retries=3, first_delay=0.01)
GO_ON = "what was answered is kept; give the same command again to go on"


class Run:
    """One run against a server, and what was told meanwhile."""

    def __init__(self, path: Path, url: str, **options: Any) -> None:
        self.path, self.url, self.options, self.told = path, url, options, list[str]()
        asyncio.run(self._run())

    async def _run(self) -> None:
        options = {"num_concurrent": 4, "timeout": 5.0, "backoff": QUICK, **self.options}
        sampling, model = options.pop("sampling", Sampling()), options.pop("model", MODEL)
        rules, prompts = options.pop("rules", Rules()), options.pop("prompts", PROMPTS)
        answerer = ServerAnswerer(
            Endpoint(self.url, **options), model=model, sampling=sampling, notify=self.told.append
        )
        async with answerer:
            answerer.model = answerer.model or await answerer.find_model()
            with ConversationFile(self.path, prompts, settings={}) as file:
                await synthesize(answerer, file, rules, report=lambda dialogue: None)


def stored(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["conversation_id"] for line in lines}) == len(lines)
    return {line["conversation_id"]: line["conversations"] for line in lines}


def expected() -> dict[str, Any]:
    """What `echo` makes of the prompts."""
    talks: dict[str, Any] = {}
    for prompt in PROMPTS:
        messages: list[dict[str, str]] = []
        for turn in prompt.turns:
            messages.append({"role": "user", "content": turn})
            body: Any = echo({"messages": messages}).body
            messages.append(body["choices"][0]["message"])
        talks[prompt.conversation_id] = messages
    return talks


def test_what_is_sent_and_what_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with ChatServer() as server:
        Run(path, server.url, api_key="secret", sampling=Sampling(0.0, 17), rules=Rules(system_prompt="s"))
        first = server.asked[0]
        assert first == {
            "model": MODEL,
            "messages": talk(server.turns[0], system="s"),
            "max_tokens": 17,
            "temperature": 0.0,
        }
        assert set(server.authorizations) == {"Bearer secret"}
        Run(tmp_path / "y.jsonl", server.url + "/", model=None, sampling=Sampling(0.7), prompts=PROMPTS[:2])
        assert server.asked[-1]["model"] == MODEL and server.asked[-1]["temperature"] == 0.7
        seeds = [body["seed"] for body in server.asked[-3:]]
        assert len(set(seeds)) == 3 and all(0 <= seed < 2**31 for seed in seeds)
        assert server.authorizations[-1] is None
    assert len(stored(path)) == 12


def test_questions_are_really_asked_at_the_same_time(tmp_path: Path) -> None:
    """No reply before five are in the server; it would wait in vain for a client that asks one after the other."""
    barrier = threading.Barrier(5)

    def reply(body: Body) -> Reply:
        barrier.wait(10)
        return echo(body)

    prompts = [Prompt(str(n), None, (f"{n}",)) for n in range(20)]
    with ChatServer(reply) as server:
        Run(tmp_path / "x.jsonl", server.url, num_concurrent=5, prompts=prompts)
        assert server.most_at_once == 5
    assert len(stored(tmp_path / "x.jsonl")) == 20


def flaky(replies: list[Reply]) -> Callable[[Body], Reply]:
    """Every question meets these first, then is answered."""
    met: dict[str, int] = {}
    lock = threading.Lock()

    def reply(body: Body) -> Reply:
        turn = body["messages"][-1]["content"]
        with lock:
            met[turn] = met.get(turn, 0) + 1
        return replies[met[turn] - 1] if met[turn] <= len(replies) else echo(body)

    return reply


@pytest.mark.parametrize(
    ("replies", "said"),
    [
        ([refusal(429, "slow down", Retry_After="0")], "status 429 (slow down)"),
        ([refusal(500, "oh"), refusal(503, "no")], "status 500 (oh)"),
        ([Reply(502, "<html>bad gateway</html>"), Reply(408)], "status 502 (<html>bad gateway</html>)"),
        ([Reply(body={"choices": [1] * 100}, cut=True)] * 2, "no connection ("),
        ([refusal(500, "a"), Reply(body="x" * 99, cut=True), refusal(429, "c")], "status 500 (a)"),
    ],
)
def test_what_fails_for_a_while_is_asked_again(replies: list[Reply], said: str, tmp_path: Path) -> None:
    with ChatServer(flaky(replies)) as server:
        run = Run(tmp_path / "x.jsonl", server.url)
        assert set(server.attempts.values()) == {len(replies) + 1}
    assert stored(tmp_path / "x.jsonl") == expected()
    assert run.told[0].startswith(f"{server.url}: {said}") and run.told[0].endswith(" s (1 of 3)")


def test_a_server_that_stalls_is_asked_again(tmp_path: Path) -> None:
    never = threading.Event()
    with ChatServer(flaky([completion("late")._replace(wait_for=never)])) as server:
        run = Run(tmp_path / "x.jsonl", server.url, timeout=0.3, prompts=PROMPTS[:4])
        never.set()
    assert stored(tmp_path / "x.jsonl") == {name: expected()[name] for name in "0123"}
    assert "no answer in time (ReadTimeout)" in run.told[0]


def test_a_server_that_dies_half_way_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    seen, gone = [], threading.Event()

    def reply(body: Body) -> Reply:
        seen.append(body)
        if len(seen) > 8:
            gone.set()
        return Reply(body="half an ans", cut=True) if gone.is_set() else echo(body)

    with ChatServer(reply) as server, pytest.raises(EndpointError) as caught:
        Run(path, server.url)
    assert str(caught.value).startswith(f"{server.url}: no connection (") and GO_ON in str(caught.value)
    half = stored(path)
    assert 0 < len(half) < 12
    with pytest.raises(EndpointError, match="no connection"):
        Run(path, server.url)
    assert stored(path) == half
    with ChatServer() as server:
        Run(path, server.url)
        asked = {turn.split(".")[0] for turn in server.turns}
    assert asked == expected().keys() - half.keys()
    assert stored(path) == expected()


def test_who_gives_up_does_so_for_all(tmp_path: Path) -> None:
    """One of twelve learns that the server is closed; the others would try for a while."""

    def reply(body: Body) -> Reply:
        is_first = body["messages"][-1]["content"].startswith("0.")
        return refusal(503, "closed", **({"Retry_After": "86400"} if is_first else {}))

    patient = Backoff(max_retries=30, first_delay=0.3, longest_delay=0.3)
    with ChatServer(reply) as server, pytest.raises(EndpointError, match="wants no request for 86400 s"):
        Run(tmp_path / "x.jsonl", server.url, num_concurrent=12, backoff=patient)
    assert max(server.attempts.values()) <= 3
    assert not list(tmp_path.iterdir())


def test_a_server_that_stays_away(tmp_path: Path) -> None:
    with ChatServer(lambda body: refusal(503, "gone")) as server, pytest.raises(EndpointError) as caught:
        Run(tmp_path / "x.jsonl", server.url, num_concurrent=1)
    assert str(caught.value) == f"{server.url}: status 503 (gone), 4 attempts; {GO_ON}"
    with pytest.raises(EndpointError, match=rf"{server.url}: no connection \(.*\), 4 attempts; "):
        Run(tmp_path / "x.jsonl", server.url)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (refusal(401, "wrong key"), "/chat/completions: status 401 (wrong key); "),
        (
            refusal(404, "The model `x` does not exist."),
            "/chat/completions: status 404 (The model `x` does not exist.)",
        ),
        (Reply(403, {"object": "error", "message": "not for you"}), "/chat/completions: status 403 (not for you); "),
        (Reply(405, {"detail": "Method Not Allowed"}), "/chat/completions: status 405 (Method Not Allowed); "),
        (Reply(302, "", {"Location": "/"}), "/chat/completions: status 302 (Found); "),
        (Reply(body="<html>\n hello </html>"), "/chat/completions answers with <html> hello </html>, which is no JSON"),
        (Reply(body={"choices": []}), " answers with {'choices': []}, which is no chat completion; "),
        (Reply(body={"error": "x"}), " answers with {'error': 'x'}, which is no chat completion; "),
    ],
)
def test_what_will_not_get_better_ends_the_run_at_once(reply: Reply, said: str, tmp_path: Path) -> None:
    with ChatServer(lambda body: reply) as server, pytest.raises(EndpointError) as caught:
        Run(tmp_path / "x.jsonl", server.url, num_concurrent=1)
    assert str(caught.value).startswith(server.url + said), caught.value
    assert len(server.asked) == 1
    assert not list(tmp_path.iterdir())


def test_one_question_that_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"

    def reply(body: Body) -> Reply:
        turn = body["messages"][-1]["content"]
        return refusal(400, "maximum context length is 8 tokens") if turn.startswith(("3.1", "4.")) else echo(body)

    with ChatServer(reply) as server, pytest.raises(EndpointError) as caught:
        Run(path, server.url, num_concurrent=1)
    assert str(caught.value).startswith("p:3: turn 2 was refused: status 400 (maximum context length is 8 tokens); ")
    assert set(stored(path)) == {"0", "1", "2"}
    with ChatServer(reply) as server:
        Run(path, server.url, rules=Rules(skip_refused=True))
    found = stored(path)
    assert found == {**{name: each for name, each in expected().items() if name != "4"}, "3": expected()["3"][:2]}


def test_an_answer_of_odd_content(tmp_path: Path) -> None:
    """No text, half of a surrogate pair, reasoning that was taken out."""
    replies = {
        "0": completion(None, "length", reasoning_content="so ..."),
        "1": Reply(body=json.dumps(completion("a\ud83d b \ud83d\ude42").body)),
        "2": completion("c", "content_filter", reasoning="hm"),
    }
    prompts = [Prompt(name, None, (name,)) for name in replies]
    with ChatServer(lambda body: replies[body["messages"][-1]["content"]]) as server:
        run = Run(tmp_path / "x.jsonl", server.url, prompts=prompts, rules=Rules(drop_truncated=True))
    assert stored(tmp_path / "x.jsonl") == {"1": talk("1", "a\ufffd b 🙂")}
    assert [text.split(",")[0] for text in run.told] == ["the server takes the model's reasoning out of its answers"]
    state = (tmp_path / "x.jsonl.state").read_text()
    assert "empty answer (length)" in state and "truncated (content_filter)" in state


def test_how_long_the_server_wants_to_be_left_alone(tmp_path: Path) -> None:
    begun = time.monotonic()
    with ChatServer(flaky([refusal(429, "wait", Retry_After="1")])) as server:
        Run(tmp_path / "x.jsonl", server.url, prompts=PROMPTS[:3:2])
    assert time.monotonic() - begun >= 1.0
    with ChatServer(lambda body: refusal(503, "closed", Retry_After="86400")) as server:
        with pytest.raises(EndpointError) as caught:
            Run(tmp_path / "y.jsonl", server.url, num_concurrent=1)
    assert str(caught.value) == f"{server.url}: status 503 (closed), and wants no request for 86400 s; {GO_ON}"


def test_retry_after() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    for value, seconds in {
        "7": 7.0,
        "-3": 0.0,
        "Fri, 02 Jan 2026 03:04:35 GMT": 30.0,
        "Fri, 02 Jan 2026 03:04:35": 30.0,
        "Fri, 02 Jan 2026 03:00:00 GMT": 0.0,
        "soon": None,
        "nan": None,
        "inf": None,
        "": None,
        None: None,
    }.items():
        assert read_retry_after(value, now=now) == seconds, value


def test_waiting_times_double_and_spread() -> None:
    backoff = Backoff(max_retries=9, first_delay=1.0, longest_delay=10.0)
    for num_failed, ceiling in ((1, 1.0), (2, 2.0), (4, 8.0), (5, 10.0), (2000, 10.0)):
        delays = {backoff.delay(num_failed) for _ in range(50)}
        assert ceiling / 2 <= min(delays) and max(delays) <= ceiling and len(delays) > 40
        asked = {backoff.delay(num_failed, retry_after=30.0) for _ in range(50)}
        assert min(asked) >= 30 and max(asked) <= 30 + ceiling / 2


def test_which_model_is_served(tmp_path: Path) -> None:
    with ChatServer(models=("a", "b")) as server, pytest.raises(EndpointError) as caught:
        Run(tmp_path / "x.jsonl", server.url, model=None)
    assert str(caught.value) == f"{server.url} serves a, b; name the model with model"
    with ChatServer(models=()) as server, pytest.raises(EndpointError, match="names no models"):
        Run(tmp_path / "x.jsonl", server.url, model=None)
    with ChatServer() as server, pytest.raises(EndpointError, match=r"status 404 \(Not Found\); its base URL may have"):
        Run(tmp_path / "x.jsonl", server.url.removesuffix("/v1"), model=None)


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://a/v1", "http://", "http://a:b/v1", "http://a/v1?x=1", "a b"]
)
def test_an_address_that_is_none(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Run(tmp_path / "x.jsonl", url)
    assert str(caught.value) == (f"base_url = {url} is no URL of a server; give one such as http://localhost:8000/v1")

"""A model behind an OpenAI-compatible endpoint: vLLM, SGLang, TensorRT-LLM and their like.

Asked is ``POST BASE_URL/chat/completions``. A connection that fails, 408, 429 and every 5xx are tried again; 400, 413
and 422 refuse one question; whatever else is no answer ends the run with the server's own words.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import httpx2

from mcore_spec.errors import ConfigError, EndpointError
from mcore_spec.synthesis.backoff import Backoff, read_retry_after
from mcore_spec.synthesis.dialogue import Answer, Question, Refusal, Sampling

_RETRIED = (408, 429)
_REFUSED = (400, 413, 422)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_CONNECT_SECONDS = 30.0
# Beyond this a server says that it is closed, rather than busy.
_LONGEST_RETRY_AFTER = 600.0
_SHOWN_CHARACTERS = 300
_GO_ON = "what was answered is kept; give the same command again to go on"
_CORRECT = "what was answered is kept; correct the command and give it again to go on"


class Endpoint(NamedTuple):
    """Where to ask, and how patiently.

    Attributes:
        base_url: without ``/chat/completions``; ends in ``/v1`` as a rule.
        api_key: sent as bearer token; None: none is sent.
        num_concurrent: questions at a time.
        timeout: seconds without a byte after which a request counts as failed.
        backoff: before it is tried again.
    """

    base_url: str
    api_key: str | None = None
    num_concurrent: int = 32
    timeout: float = 600.0
    backoff: Backoff = Backoff()


class _Failure(NamedTuple):
    """An attempt that may be repeated: what went wrong, and the seconds that the server asks for."""

    problem: str
    retry_after: float | None = None


class ServerAnswerer:
    """An `Answerer`; to be used in ``async with``.

    Attributes:
        url: of the endpoint.
        model: its name there; None as long as it is not known.
        batch_size: 1; servers make their own batches.
        num_concurrent: questions at a time.
    """

    def __init__(
        self, endpoint: Endpoint, *, model: str | None, sampling: Sampling, notify: Callable[[str], None]
    ) -> None:
        """Nothing is asked yet.

        Args:
            endpoint: where.
            model: its name there; None: `find_model` finds it.
            sampling: how answers are drawn.
            notify: told of failed attempts.

        Raises:
            ConfigError: `endpoint.base_url` is no URL.
        """
        self.url = _check_url(endpoint.base_url)
        self.batch_size, self.num_concurrent = 1, endpoint.num_concurrent
        self.model, self._sampling, self._notify = model, sampling, notify
        self._backoff = endpoint.backoff
        self._is_closed = False
        self._tells_reasoning = False
        limits = httpx2.Limits(
            max_connections=endpoint.num_concurrent, max_keepalive_connections=endpoint.num_concurrent
        )
        self._client = httpx2.AsyncClient(
            headers={} if endpoint.api_key is None else {"Authorization": f"Bearer {endpoint.api_key}"},
            limits=limits,
            timeout=httpx2.Timeout(endpoint.timeout, connect=min(_CONNECT_SECONDS, endpoint.timeout), pool=None),
            # A proxy that is meant for the internet knows nothing of servers on this machine.
            trust_env=urlsplit(self.url).hostname not in _LOOPBACK,
        )

    async def __aenter__(self) -> Self:
        """Nothing is asked yet."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def find_model(self) -> str:
        """The name of the model where it was not given: the one that is served.

        Raises:
            EndpointError: nobody answers, or there is not exactly one.
        """
        body = await self._request("GET", "/models", None)
        if isinstance(body, Refusal):
            raise EndpointError(f"{self.url}/models: {body.reason}; name the model with model")
        entries = body.get("data")
        found = entries if isinstance(entries, list) else []
        names = [str(entry["id"]) for entry in found if isinstance(entry, dict) and "id" in entry]
        if len(names) != 1:
            served = f"serves {', '.join(names)}" if names else "names no models"
            raise EndpointError(f"{self.url} {served}; name the model with model")
        return names[0]

    async def answer(self, questions: Sequence[Question]) -> list[Answer | Refusal]:
        """See `Answerer`."""
        return [await self._answer(question) for question in questions]

    async def _answer(self, question: Question) -> Answer | Refusal:
        sampled = {"seed": question.seed} if self._sampling.temperature > 0 else {}
        body = await self._request(
            "POST",
            "/chat/completions",
            {
                "model": self.model,
                "messages": question.messages,
                "max_tokens": self._sampling.max_tokens,
                "temperature": self._sampling.temperature,
                **sampled,
            },
        )
        if isinstance(body, Refusal):
            return body
        try:
            choice = body["choices"][0]
            message, finish_reason = choice["message"], choice["finish_reason"]
            text = message["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise EndpointError(
                f"{self.url} answers with {_shown(body)}, which is no chat completion; {_GO_ON}"
            ) from error
        if (message.get("reasoning_content") or message.get("reasoning")) and not self._tells_reasoning:
            self._tells_reasoning = True
            self._notify(
                "the server takes the model's reasoning out of its answers, and a draft cannot learn it; to keep it, "
                "start the server without a reasoning parser"
            )
        return Answer(_unicode(text or ""), str(finish_reason))

    async def _request(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any] | Refusal:
        """What the server says, after as many attempts as it takes.

        Raises:
            EndpointError: it does not answer, or not as it should.
        """
        num_failed = 0
        while True:
            outcome = await self._attempt(method, path, body)
            if not isinstance(outcome, _Failure):
                return outcome
            num_failed += 1
            # What one request has found out by waiting the others need not.
            if num_failed > self._backoff.max_retries or self._is_closed:
                self._is_closed = True
                raise EndpointError(f"{self.url}: {outcome.problem}, {num_failed} attempts; {_GO_ON}")
            if outcome.retry_after is not None and outcome.retry_after > _LONGEST_RETRY_AFTER:
                self._is_closed = True
                raise EndpointError(
                    f"{self.url}: {outcome.problem}, and wants no request for {outcome.retry_after:.0f} s; {_GO_ON}"
                )
            delay = self._backoff.delay(num_failed, retry_after=outcome.retry_after)
            self._notify(
                f"{self.url}: {outcome.problem}; trying again in {delay:.1f} s ({num_failed} of "
                f"{self._backoff.max_retries})"
            )
            await asyncio.sleep(delay)

    async def _attempt(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> dict[str, Any] | Refusal | _Failure:
        try:
            response = await self._client.request(method, self.url + path, json=body)
        except httpx2.TimeoutException as error:
            return _Failure(f"no answer in time ({type(error).__name__})")
        except httpx2.TransportError as error:
            return _Failure(f"no connection ({str(error) or type(error).__name__})")
        except httpx2.RequestError as error:
            raise EndpointError(f"{self.url}: the answer cannot be read ({error}); {_GO_ON}") from error
        status = response.status_code
        if status in _RETRIED or status >= 500:
            problem = f"status {status} ({_message(response)})"
            return _Failure(problem, read_retry_after(response.headers.get("Retry-After")))
        if status in _REFUSED:
            return Refusal(f"status {status} ({_message(response)})")
        if status != 200:
            hint = "" if self.url.endswith("/v1") or status != 404 else "; its base URL may have to end in /v1"
            raise EndpointError(f"{self.url}{path}: status {status} ({_message(response)}){hint}; {_CORRECT}")
        try:
            value = response.json()
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise EndpointError(
                f"{self.url}{path} answers with {_shown(response.text)}, which is no JSON object: not an "
                f"OpenAI-compatible endpoint; correct base_url"
            )
        return value


def _check_url(base_url: str) -> str:
    try:
        parts = urlsplit(base_url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.query or parts.fragment)
        is_url = is_url and (parts.port is None or parts.port > 0)
        httpx2.URL(base_url)
    except (ValueError, httpx2.InvalidURL):
        is_url = False
    if not is_url:
        raise ConfigError(f"base_url = {base_url} is no URL of a server; give one such as http://localhost:8000/v1")
    return base_url.rstrip("/").removesuffix("/chat/completions")


def _message(response: httpx2.Response) -> str:
    """What the server says about a status: OpenAI's form, vLLM's and SGLang's older one, FastAPI's, or plain text."""
    try:
        value = response.json()
    except ValueError:
        value = None
    if isinstance(value, dict):
        error = value.get("error", value)
        found = (error.get("message") or error.get("detail")) if isinstance(error, dict) else error
        if found:
            return _shown(found)
    return _shown(response.text.strip() or response.reason_phrase)


def _shown(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _unicode(text: str) -> str:
    """A text that UTF-8 can write: JSON joins a character's two halves only where both came."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

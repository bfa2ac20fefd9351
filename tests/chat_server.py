"""A real HTTP server that speaks as an OpenAI-compatible one does, and misbehaves as it is told."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Self

MODEL = "tiny"
Body = dict[str, Any]


class Reply(NamedTuple):
    """What comes back.

    Attributes:
        body: JSON, or text that is sent as it is.
        cut: close the connection in the middle of the body.
        wait_for: hold the reply back until this is set.
    """

    status: int = 200
    body: Body | str = ""
    headers: Mapping[str, str] = MappingProxyType({})
    cut: bool = False
    wait_for: threading.Event | None = None


def completion(text: str | None, finish_reason: str = "stop", **more: Any) -> Reply:
    """An answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **more}, "finish_reason": finish_reason}
    return Reply(body={"object": "chat.completion", "choices": [choice]})


def refusal(status: int, message: str, **headers: str) -> Reply:
    """A status in the form that vLLM gives it."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, {"error": {"message": message, "type": "x", "code": status}}, names)


def echo(body: Body) -> Reply:
    """An answer that shows the whole conversation it belongs to."""
    return completion(" / ".join(f"{message['role'][0]}:{message['content']}" for message in body["messages"]))


class ChatServer:
    """Runs in ``with``.

    Attributes:
        asked: the bodies, in the order of arrival.
        authorizations: the headers of that name.
        most_at_once: requests that were in the server at a time.
        attempts: how often each last message was asked.
    """

    def __init__(self, reply: Callable[[Body], Reply] = echo, *, models: tuple[str, ...] = (MODEL,)) -> None:
        self.reply, self.models = reply, models
        self.asked: list[Body] = []
        self.authorizations: list[str | None] = []
        self.attempts: Counter[str] = Counter()
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def turns(self) -> list[str]:
        """The last message of each request."""
        return [body["messages"][-1]["content"] for body in self.asked]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Head and body are two packets; the second would wait for the client to acknowledge the first.
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                if self.path != "/v1/models":
                    return self._send(Reply(404, {"detail": "Not Found"}))
                self._send(Reply(body={"object": "list", "data": [{"id": name} for name in server.models]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/chat/completions":
                    return self._send(Reply(404, {"detail": "Not Found"}))
                with server._lock:
                    server.asked.append(body)
                    server.authorizations.append(self.headers["Authorization"])
                    server.attempts[body["messages"][-1]["content"]] += 1
                    server._now += 1
                    server.most_at_once = max(server.most_at_once, server._now)
                try:
                    reply = server.reply(body)
                    if reply.wait_for is not None:
                        reply.wait_for.wait(20)
                finally:
                    with server._lock:
                        server._now -= 1
                self._send(reply)

            def _send(self, reply: Reply) -> None:
                text = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
                data = text.encode()
                try:
                    self.send_response(reply.status)
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data[: len(data) // 2] if reply.cut else data)
                except OSError:  # the client has gone
                    self.close_connection = True
                if reply.cut:
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                """Tests are quiet."""

        return Handler

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """No longer there: connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

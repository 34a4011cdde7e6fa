"""Sends what `inputs.py` makes up, and judges the answers: none from a broken service, each in the one shape."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import psutil
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from starlette.types import ASGIApp, Message

from serve_app.api import OPEN, SECURITY_HEADERS, build_app
from serve_app.core.errors import every_error
from tests.fuzz.inputs import Sent, from_page, raw
from tests.service.fakes import AUTHORIZATION, RERANKER, FakeModel, FakeModels, service_over

BOUND_S = 30.0  # for one request: what takes longer is stuck
ROUND = 500  # inputs: hypothesis remembers all of a round, and forgets it then
MAX_BODY_BYTES = 100_000
PAGE = Sent(
    method="GET",
    path="/openapi.json",
    headers=tuple((name.lower().encode(), value.encode()) for name, value in AUTHORIZATION.items()),
    key=True,
)
SHAPES = {kind.code: (kind.status, kind.type) for kind in every_error()}
MIB = 2**20


@dataclass(slots=True)
class Answer:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


@dataclass(slots=True)
class Figures:
    """rss_mib: after each round, of this process, hypothesis included."""

    inputs: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    slowest_s: float = 0.0
    rss_mib: list[float] = field(default_factory=list)


class Fuzz:
    """The service in this process, and a loop to run it in. model: the only one that is served."""

    def __init__(self, model: FakeModel | None = None) -> None:
        self._service = service_over(FakeModels(model or FakeModel(), FakeModel(RERANKER)))
        self._app: ASGIApp = build_app(self._service, max_body_bytes=MAX_BODY_BYTES)
        self._runner = asyncio.Runner()
        self.figures = Figures()

    def __enter__(self) -> Fuzz:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._service.close())
        self._runner.close()

    def explore(self, inputs: int, *, seed: int, tell: Callable[[Figures], None] = lambda _: None) -> None:
        """Half of them raw, half made from the page. Raises AssertionError with the smallest input that is found."""
        some = raw() | from_page(json.loads(self.send(PAGE).body))

        def check(sent: Sent) -> None:
            judge(sent, self.send(sent))

        for at in range(0, inputs, ROUND):
            size = min(ROUND, inputs - at)
            run = settings(
                max_examples=size,
                deadline=None,
                database=None,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
            )(given(some)(check))
            seeded(seed * 1_000_000 + at)(run)()
            self.figures.rss_mib.append(psutil.Process().memory_info().rss / MIB)
            tell(self.figures)

    def send(self, sent: Sent) -> Answer:
        started_s = time.perf_counter()
        answer = self._runner.run(self._send(sent))
        self.figures.inputs += 1
        self.figures.statuses[answer.status] += 1
        self.figures.slowest_s = max(self.figures.slowest_s, time.perf_counter() - started_s)
        return answer

    async def _send(self, sent: Sent) -> Answer:
        parts: list[Message] = [
            {"type": "http.request", "body": chunk, "more_body": True}
            for chunk in sent.chunks[: -1 if sent.hangs_up else None]
        ]
        parts.append({"type": "http.disconnect"} if sent.hangs_up else {"type": "http.request", "body": b""})
        told: list[Message] = []
        coming = iter(parts)

        async def receive() -> Message:
            return next(coming, None) or {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            told.append(message)

        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": sent.method,
            "scheme": "http",
            "path": unquote(sent.path),
            "raw_path": sent.path.encode("ascii", "replace"),
            "query_string": sent.query.encode("ascii", "replace"),
            "root_path": "",
            "headers": list(sent.headers),
            "client": ("192.0.2.1", 1),
            "server": ("192.0.2.2", 80),
        }
        async with asyncio.timeout(BOUND_S):
            await self._app(scope, receive, send)
        body = b"".join(message.get("body", b"") for message in told[1:])
        assert not told[-1].get("more_body"), "the answer has no end"
        return Answer(told[0]["status"], [(name.lower(), value) for name, value in told[0]["headers"]], body)


def judge(sent: Sent, answer: Answer) -> None:
    """Raises AssertionError."""
    headers = dict(answer.headers)
    assert len(headers) == len(answer.headers), "a header twice"
    assert headers.keys() >= {b"x-request-id", b"server-timing", *(name.lower().encode() for name in SECURITY_HEADERS)}
    assert len(headers[b"x-request-id"]) <= 128
    assert answer.status < 500, answer
    if answer.status == 499:
        assert sent.hangs_up
        return
    assert headers[b"content-type"] == b"application/json"
    told = json.loads(answer.body)
    if not sent.key and unquote(sent.path) not in OPEN:
        assert answer.status == 401, (sent.method, sent.path, sent.headers, answer)
    if answer.status >= 400:
        error = told["error"]
        assert told.keys() == {"error"}
        assert error.keys() == {"message", "type", "param", "code"}
        assert (answer.status, error["type"]) == SHAPES[error["code"]]
        assert isinstance(error["message"], str)
        assert error["message"].isprintable()
        assert len(error["message"]) < 1000
        assert error["param"] is None or isinstance(error["param"], str)

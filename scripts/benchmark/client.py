"""The load: HTTP/1.1 over raw sockets, in a closed loop (always so many in flight) or an open one (so many a second).

Requests are whole bytes before the clock starts, and replies are read for their status and length only: the client
shares its cores with the server. Anything but a 200 ends the run, unless it was asked for.
"""

from __future__ import annotations

import asyncio
import base64
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

import numpy as np
import orjson
from numpy.typing import NDArray

from benchmark import BenchError

TIMEOUT_S = 120.0
END_OF_HEAD = b"\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)

Format = Literal["base64", "float"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where requests go, and what all of them say."""

    host: str
    port: int
    path: str
    model: str
    format: Format
    api_key: str

    @classmethod
    def parse(cls, url: str, *, model: str, format: Format, api_key: str) -> Route:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname not in ("127.0.0.1", "localhost"):
            raise BenchError(f"{url}: only http://127.0.0.1 is measured: the ceiling beside it is this machine's")
        path = parts.path if parts.path.strip("/") else "/v1/embeddings"
        return cls(host="127.0.0.1", port=parts.port or 80, path=path, model=model, format=format, api_key=api_key)

    def request(self, texts: str | Sequence[str], *, idempotency_key: str | None = None) -> bytes:
        body = orjson.dumps({"model": self.model, "input": texts, "encoding_format": self.format})
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
            f"Authorization: Bearer {self.api_key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        )
        if idempotency_key:
            head += f"Idempotency-Key: {idempotency_key}\r\n"
        return f"{head}\r\n".encode() + body


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """head: the status line and the headers, as they came."""

    head: bytes
    body: bytes

    @property
    def status(self) -> int:
        return int(self.head[9:12])

    def header(self, name: str) -> str | None:
        found = re.search(rb"\r\n" + re.escape(name.encode()) + rb": *([^\r]*)", self.head, re.IGNORECASE)
        return found[1].decode() if found else None


def vectors_in(reply: bytes) -> NDArray[np.float32]:
    """[texts, dimensions], in the order of the texts."""
    data = sorted(orjson.loads(reply)["data"], key=lambda item: int(item["index"]))
    rows = [item["embedding"] for item in data]
    return np.array(
        [np.frombuffer(base64.b64decode(row), "<f4") if isinstance(row, str) else row for row in rows], np.float32
    )


class Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._body_at = self._end = 0
        self._answer: asyncio.Future[Answer] | None = None

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def post(self, request: bytes) -> bytes:
        """The body of a 200. Raises BenchError for everything else."""
        answer = await self.ask(request)
        if answer.status != 200:
            raise BenchError(f"the server answered {answer.status}: {answer.body[:300].decode(errors='replace')}")
        return answer.body

    async def ask(self, request: bytes) -> Answer:
        """Whatever its status. Raises BenchError if none comes."""
        assert self._transport is not None
        assert self._answer is None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._answer
        except TimeoutError:
            self._transport.abort()
            raise BenchError(f"no reply within {TIMEOUT_S:g} s") from None
        finally:
            self._answer = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._end and (head := self._received.find(END_OF_HEAD)) >= 0:
            length = LENGTH.search(self._received, 0, head)
            if length is None:
                self._fail("the server sent a reply without Content-Length")
                return
            self._body_at = head + len(END_OF_HEAD)
            self._end = self._body_at + int(length[1])
        if self._end and len(self._received) >= self._end:
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the server closed the connection: {error or 'end of file'}")

    def close(self) -> None:
        if self._transport:
            self._transport.close()

    def _finish(self) -> None:
        answer = Answer(
            head=bytes(self._received[: self._body_at]), body=bytes(self._received[self._body_at : self._end])
        )
        self._received.clear()
        self._body_at = self._end = 0
        if self._answer and not self._answer.done():
            self._answer.set_result(answer)

    def _fail(self, why: str) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(BenchError(why))


class Client:
    """As many connections as there are requests in flight."""

    def __init__(self, route: Route) -> None:
        self._route = route
        self._idle: list[Connection] = []

    async def post(self, request: bytes) -> bytes:
        """The body of a 200. Raises BenchError for everything else."""
        connection = await self._connection()
        body = await connection.post(request)
        self._idle.append(connection)
        return body

    async def ask(self, request: bytes) -> Answer:
        """Whatever its status. Raises BenchError if none comes."""
        connection = await self._connection()
        answer = await connection.ask(request)
        self._idle.append(connection)
        return answer

    def close(self) -> None:
        for connection in self._idle:
            connection.close()

    async def _connection(self) -> Connection:
        while self._idle:
            if (connection := self._idle.pop()).open:
                return connection
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                Connection, self._route.host, self._route.port
            )
        except OSError as error:
            raise BenchError(f"no connection to port {self._route.port}: {error}") from error
        return connection


@dataclass(slots=True)
class Replies:
    """What one kind of traffic saw."""

    begun_s: float = field(default_factory=time.perf_counter)
    ended_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    lateness_s: list[float] = field(default_factory=list)  # open loop: how late this client itself was
    last: bytes = b""

    @property
    def wall_s(self) -> float:
        """From the start to the last reply."""
        return self.ended_s - self.begun_s

    async def timed(self, client: Client, request: bytes, start_s: float) -> None:
        self.last = await client.post(request)
        self.ended_s = time.perf_counter()
        self.latencies_s.append(self.ended_s - start_s)


async def closed_loop(
    client: Client, requests: Iterator[bytes], concurrency: int, *, stop: Callable[[], bool] = lambda: False
) -> Replies:
    """Always `concurrency` requests in flight, until there are no more or `stop` says so."""
    replies = Replies()

    async def caller() -> None:
        while not stop() and (request := next(requests, None)) is not None:
            await replies.timed(client, request, time.perf_counter())

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return replies


async def open_loop(
    client: Client, requests: Iterator[bytes], per_s: float, seconds: float, rng: random.Random
) -> Replies:
    """Poisson arrivals whatever the server does; latency runs from the scheduled moment, so that stalls show."""
    replies, sent = Replies(), list[asyncio.Task[None]]()
    due_s = replies.begun_s + rng.expovariate(per_s)
    while due_s < replies.begun_s + seconds:
        await asyncio.sleep(due_s - time.perf_counter())
        replies.lateness_s.append(time.perf_counter() - due_s)
        sent.append(asyncio.create_task(replies.timed(client, next(requests), due_s)))
        due_s += rng.expovariate(per_s)
    await asyncio.gather(*sent)
    return replies


def percentile_ms(latencies_s: Sequence[float], percent: float) -> float:
    """Nearest rank: a value that was really seen. Below 100 values the 99th is the largest."""
    if not latencies_s:
        raise BenchError("nothing was measured: give it more --seconds")
    return 1000 * sorted(latencies_s)[math.ceil(percent / 100 * len(latencies_s)) - 1]

"""One HTTP/1.1 request a connection, over asyncio streams: whole, or broken off where a plan says so."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

HOST = "127.0.0.1"
TRY_S = 60.0


class Lost(Exception):
    """No whole answer came: what the service did is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """seen_ns: on the monotonic clock, when the client had it."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes
    seen_ns: int
    tries: int = 1  # that the SDK made of it


def request(port: int, body: bytes, *, api_key: str, key: str | None, request_id: str) -> bytes:
    lines = [
        "POST /v1/embeddings HTTP/1.1",
        f"Host: {HOST}:{port}",
        f"Authorization: Bearer {api_key}",
        f"X-Request-Id: {request_id}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    if key is not None:
        lines.append(f"Idempotency-Key: {key}")
    return "\r\n".join([*lines, "", ""]).encode() + body


async def post(port: int, request: bytes) -> Answer:
    """Raises Lost."""
    async with _sent(port, request) as reader:
        head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
        return _answer(head, body)


async def post_and_lose(port: int, request: bytes) -> Answer:
    """The status is read, and then the connection is cut. Raises Lost, too, if not even that came."""
    async with _sent(port, request) as reader:
        head = await reader.readuntil(b"\r\n")
        return Answer(status=_status(head), headers={}, body=b"", seen_ns=time.monotonic_ns())


async def hang_up(port: int, request: bytes, after_s: float) -> None:
    with contextlib.suppress(Lost):
        async with _sent(port, request):
            await asyncio.sleep(after_s)


@contextlib.asynccontextmanager
async def _sent(port: int, request: bytes) -> AsyncIterator[asyncio.StreamReader]:
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(TRY_S):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(request)
            await writer.drain()
            yield reader
    except (OSError, EOFError, TimeoutError, ValueError, IndexError) as error:
        raise Lost(type(error).__name__) from None
    finally:
        if writer is not None:
            writer.transport.abort()


def _answer(head: bytes, body: bytes) -> Answer:
    seen_ns = time.monotonic_ns()
    lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines[1:])
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    status = _status(head)
    if len(body) != int(headers.get("content-length", len(body))):
        raise Lost("Truncated")
    return Answer(status=status, headers=headers, body=body, seen_ns=seen_ns)


def _status(head: bytes) -> int:
    return int(head.split(None, 2)[1])

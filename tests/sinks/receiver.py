"""A webhook's receiver on 127.0.0.1 that answers as it is told, and keeps what it got."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    status: int = 204
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    delay_s: float = 0.0
    hang_up: bool = False  # instead of answering
    endless: bool = False  # a body without end follows


class Receiver:
    """answer: decides by the call; the newest call is the last of `calls`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.connections = 0
        self.answer: Callable[[Call], Answer] = lambda call: Answer()
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?channel=usage"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while await self._one_call(reader, writer):
                    pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            self._tasks.discard(task)

    async def _one_call(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        call = await _read(reader)
        self.calls.append(call)
        answer = self.answer(call)
        await asyncio.sleep(answer.delay_s)
        if not answer.hang_up:
            await _write(writer, answer)
        return not answer.hang_up

    async def hang_up(self) -> None:
        """On everybody who keeps a connection."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read(reader: asyncio.StreamReader) -> Call:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    return Call(
        path=head[0].split(" ")[1], headers=headers, body=await reader.readexactly(int(headers["content-length"]))
    )


async def _write(writer: asyncio.StreamWriter, answer: Answer) -> None:
    length = 10**9 if answer.endless else len(answer.body)
    headers = {"content-length": str(length), **answer.headers}
    if answer.status == 204:
        del headers["content-length"]
    lines = [f"HTTP/1.1 {answer.status} Whatever", *(f"{name}: {value}" for name, value in headers.items())]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + answer.body)
    while answer.endless:
        writer.write(b"x" * 4096)
        await writer.drain()
    await writer.drain()


@contextlib.asynccontextmanager
async def receiving(*, tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    receiver = Receiver()
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        await receiver.hang_up()

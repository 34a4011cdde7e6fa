"""The connection to Redis: commands in, replies or StoreDown out, and no command to a server that may lose a write.

Each new connection checks the server's settings before anything else is sent on it, so one that came back with others
is refused, too. Nothing is tried again but a script that the server had forgotten.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from serve_app.stores import StoreDown, StoreUnfit
from serve_app.stores.redis_scripts import SCRIPTS, Script

CONNECT_S = 2.0
ANSWER_S = 5.0
CONNECTIONS = 16  # of a process; more callers wait for one
OLDEST = (7, 0)  # script flags, and effects instead of scripts in the append-only file
SETTINGS = {  # what makes a write durable when it is answered, and lets none be evicted
    "appendonly": "yes",
    "appendfsync": "always",
    "no-appendfsync-on-rewrite": "no",
    "maxmemory-policy": "noeviction",
}

Command = tuple[str | bytes | int, ...]

logger = logging.getLogger(__name__)


class Client:
    """A pool of connections. `ask` is the only way to the server."""

    def __init__(self, url: str) -> None:
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=ANSWER_S,
                socket_connect_timeout=CONNECT_S,
                socket_timeout=ANSWER_S,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
                redis_connect_func=_greet,
            )
        except ValueError:  # its message would repeat the URL, and with it a password
            raise StoreUnfit("A Redis store's url is redis://HOST:PORT/DB.") from None
        self._redis: Redis = Redis(connection_pool=pool)

    async def check(self) -> None:
        """Raises StoreUnfit, StoreDown."""
        try:
            await self._send([("PING",)])
        except _Unfit as unfit:
            raise StoreUnfit(str(unfit)) from None
        except _FAILURES as error:
            raise _down(error) from None

    async def ask(self, *commands: Command) -> list[Any]:
        """The reply to each, in order: one round trip, not one transaction."""
        async with _store_down():
            replies: list[Any] = []
            for _ in range(2):
                replies += await self._send(commands[len(replies) :])
                if len(replies) == len(commands):
                    return replies
                # The server restarted, or was told to forget: what came before is done, the rest is asked again.
                await self._send([("SCRIPT LOAD", script.text) for script in SCRIPTS])
            raise exceptions.NoScriptError("forgotten again")

    async def close(self) -> None:
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def _send(self, commands: tuple[Command, ...] | list[Command]) -> list[Any]:
        """Replies up to the first script that the server does not know."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            replies = await pipeline.execute(raise_on_error=False)
        known: list[Any] = []
        for reply in replies:
            if isinstance(reply, exceptions.NoScriptError):
                break
            if isinstance(reply, Exception):
                raise reply
            known.append(reply)
        return known


def call(script: Script, key: str, *args: str | bytes | int) -> Command:
    """The command that runs it, on the keys that begin with `key`."""
    return ("EVALSHA", script.sha, 1, key, *args)


class _Unfit(exceptions.ConnectionError):
    """Raised where a connection is made; redis-py closes it."""


_FAILURES = (exceptions.RedisError, OSError, asyncio.TimeoutError)


@contextlib.asynccontextmanager
async def _store_down() -> AsyncIterator[None]:
    try:
        yield
    except _FAILURES as error:
        raise _down(error) from None


def _down(error: Exception) -> StoreDown:
    """Names the kind of error, never its text: that may hold what was sent."""
    if isinstance(error, _Unfit):
        logger.error("Redis is refused: %s", error)
        return StoreDown(str(error))
    code = re.match(r"[A-Z]{3,}\b", str(error)) if type(error) is exceptions.ResponseError else None
    return StoreDown(f"Redis: {code[0] if code else type(error).__name__}")


async def _greet(connection: AbstractConnection) -> None:
    """What redis-py does on a new connection, and the check."""
    await connection.on_connect()
    if reason := await _unfit(connection):
        raise _Unfit(reason)


async def _unfit(connection: AbstractConnection) -> str | None:
    try:
        info = await _info(connection, "server") | await _info(connection, "replication")
        settings = {name: await _setting(connection, name) for name in SETTINGS}
    except exceptions.ResponseError:
        return f"Redis must permit INFO and CONFIG GET: without them {', '.join(SETTINGS)} cannot be checked."
    return unfit(info, settings)


def unfit(info: Mapping[str, str], settings: Mapping[str, str]) -> str | None:
    """One sentence: what must be changed. None: nothing."""
    version = info["redis_version"]
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"Redis must be version 7.0 or newer; this one is {version}."
    if (mode := info["redis_mode"]) != "standalone":
        return f"Redis must run standalone (cluster-enabled no); this one is a {mode}."
    if info["role"] != "master":
        return "Redis must be the primary (replicaof no one); this one is a replica, and promotion may lose writes."
    for name, wanted in SETTINGS.items():
        if settings[name] != wanted:
            return f"Redis must have {name} {wanted}; this one has {settings[name]}."
    return None


async def _info(connection: AbstractConnection, section: str) -> dict[str, str]:
    await connection.send_command("INFO", section)
    lines = (await connection.read_response()).decode().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


async def _setting(connection: AbstractConnection, name: str) -> str:
    await connection.send_command("CONFIG", "GET", name)
    reply = await connection.read_response()
    return str(reply[1].decode()) if reply else "no such setting"

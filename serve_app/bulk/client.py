"""One chunk to the service and its vectors back, however often it takes.

What may pass (a budget, a full or restarting service, a lost connection) is tried again, as long as anything at all is
still answered; what will not pass raises at once. A chunk over the model's limits goes in halves. The same texts always
go under the same Idempotency-Key.
"""

from __future__ import annotations

import asyncio
import base64
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np
import orjson
from numpy.typing import NDArray

from serve_app.bulk import BulkError, Job
from serve_app.bulk.rows import Chunk, Row, digest

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
TIMEOUT = httpx2.Timeout(150.0, connect=10.0)  # longer than the service itself takes before it gives up
TOO_MUCH = frozenset({"too_many_tokens", "too_many_inputs", "request_too_large"})
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """vectors: [rows, dimensions]. requests, replayed: how many it took, and how many of them were billed before."""

    vectors: Vectors
    tokens: int
    fingerprint: str | None
    requests: int = 1
    replayed: int = 0


class Client:
    """patience_s: how long nothing at all may succeed."""

    def __init__(
        self,
        job: Job,
        url: str,
        api_key: str,
        run: str,
        *,
        patience_s: float,
        transport: httpx2.AsyncBaseTransport | None = None,
        now_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._job = job
        self._run = run
        self._patience_s = patience_s
        self._now_s = now_s
        self._sleep = sleep
        self._progress_s = now_s()
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL:
            raise BulkError("--url is no valid URL.") from None
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
            raise BulkError("--url is http://HOST:PORT or https://HOST, without a password in it.")
        self._url = f"{str(parsed).rstrip('/').removesuffix('/v1')}/v1/embeddings"
        self._http = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"},
            timeout=TIMEOUT,
            transport=transport,
            trust_env=parsed.host not in LOOPBACK,  # no proxy stands between this machine and itself
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def embed(self, chunk: Chunk) -> Answer | None:
        """None for a chunk without a good row. Raises BulkError."""
        return await self._embed(chunk.rows, str(chunk.number)) if chunk.rows else None

    async def _embed(self, rows: tuple[Row, ...], place: str) -> Answer:
        response = await self._post(rows, f"bulk-{self._run}-{place}-{digest(rows)[:32]}")
        if response.status_code == 200:
            return _answer(response, len(rows))
        if _code(response) in TOO_MUCH and len(rows) > 1:
            middle = len(rows) // 2
            first = await self._embed(rows[:middle], f"{place}.0")
            return _joined(first, await self._embed(rows[middle:], f"{place}.1"))
        where = f" (the row with id {rows[0].id!r})" if len(rows) == 1 else ""
        raise BulkError(f"The service answered {response.status_code}: {_message(response)}{where}")

    async def _post(self, rows: tuple[Row, ...], key: str) -> httpx2.Response:
        """The first answer that is no reason to come again."""
        fields: dict[str, Any] = {"model": self._job.model, "input": [row.text for row in rows]}
        fields["encoding_format"] = "base64"
        if self._job.dimensions is not None:
            fields["dimensions"] = self._job.dimensions
        body, tries = orjson.dumps(fields), 0
        while True:
            asked_s = None
            try:
                response = await self._http.post(self._url, content=body, headers={"Idempotency-Key": key})
            except httpx2.TransportError as error:
                why = f"no answer ({type(error).__name__})"
            else:
                if not _passing(response):
                    self._progress_s = self._now_s()
                    return response
                why, asked_s = f"{response.status_code}: {_message(response)}", _retry_after_s(response)
            tries += 1
            await self._pause(tries, asked_s, why)

    async def _pause(self, tries: int, asked_s: float | None, why: str) -> None:
        backoff_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(tries - 1, 10)) * random.uniform(0.5, 1.0)
        wait_s = backoff_s if asked_s is None else asked_s + random.uniform(0.0, 0.1)
        if self._now_s() + wait_s > self._progress_s + self._patience_s:
            raise BulkError(f"Nothing succeeded for {self._patience_s:g} s; last, {why} The same command goes on.")
        await self._sleep(wait_s)


def _passing(response: httpx2.Response) -> bool:
    if response.status_code == 409:
        return _code(response) == "idempotency_in_progress"
    return response.status_code in (408, 425, 429) or response.status_code >= 500


def _retry_after_s(response: httpx2.Response) -> float | None:
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            wait_s = float(response.headers[name]) * unit_s
        except (KeyError, ValueError):
            continue
        if 0 <= wait_s < float("inf"):
            return wait_s
    return None


def _error(response: httpx2.Response) -> dict[str, Any]:
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}


def _code(response: httpx2.Response) -> str | None:
    return _error(response).get("code")


def _message(response: httpx2.Response) -> str:
    message = "".join(char for char in str(_error(response).get("message", "")) if char.isprintable())[:500]
    return message or "no more was said."


def _answer(response: httpx2.Response, count: int) -> Answer:
    try:
        content = orjson.loads(response.content)
        data = sorted(content["data"], key=lambda item: int(item["index"]))
        vectors = np.stack([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in data])
        tokens = int(content["usage"]["total_tokens"])
        complete = [item["index"] for item in data] == list(range(count))
    except (ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise BulkError("The service's answer is not one vector for each text.")
    return Answer(
        vectors=vectors.astype(np.float32, copy=False),
        tokens=tokens,
        fingerprint=response.headers.get("x-model-fingerprint"),
        replayed=int(response.headers.get("idempotent-replayed") == "true"),
    )


def _joined(first: Answer, second: Answer) -> Answer:
    if first.fingerprint != second.fingerprint or first.vectors.shape[1] != second.vectors.shape[1]:
        raise BulkError("The model changed between two halves of a chunk. Run it again with --restart.")
    return Answer(
        vectors=np.concatenate([first.vectors, second.vectors]),
        tokens=first.tokens + second.tokens,
        fingerprint=first.fingerprint,
        requests=first.requests + second.requests,
        replayed=first.replayed + second.replayed,
    )

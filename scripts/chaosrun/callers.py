"""Makes planned calls as clients do: through the OpenAI SDK or by hand, until they succeed, and then once more.

Every answer is held against what is promised: a repetition gets the first body byte for byte, another request under the
same key is refused, and a replay is of the same workspace's call.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

import openai
import orjson

from chaosrun import wire
from chaosrun.history import History, Logical, tokens_of
from chaosrun.plans import Plan, plan
from chaosrun.wire import Answer, Lost
from serve_app.core import idempotency

ROUTE = "/v1/embeddings"
CALL_S = 300.0  # a logical call that has not succeeded by then, never will
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
SDK_RETRIES = 5
LATER = 100  # calls that are made before one that comes back does

Send = Callable[[str], Awaitable[Answer]]  # with this request id


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A workspace, and the text of its API key."""

    workspace: str
    api_key: str


class Callers:
    """turn: waited for before each new call."""

    def __init__(
        self, port: int, tenants: tuple[Tenant, Tenant], history: History, turn: Callable[[], Awaitable[None]]
    ) -> None:
        self._port = port
        self._tenants = tenants
        self._history = history
        self._turn = turn
        self._numbers = itertools.count(1)
        self._later: deque[Plan] = deque()
        self._chance = random.Random()  # of pauses only: when a try is made again is not part of the plan
        url = f"http://{wire.HOST}:{port}/v1"
        self._sdks = [
            openai.AsyncOpenAI(base_url=url, api_key=tenant.api_key, max_retries=SDK_RETRIES, timeout=wire.TRY_S)
            for tenant in tenants
        ]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for sdk in self._sdks:
            await sdk.close()

    async def make(self, calls: int, *, seed: int, model: str, in_flight: int) -> None:
        """All of them, so many at a time."""
        plans = (plan(seed, number, model) for number in range(calls))

        async def caller() -> None:
            for planned in plans:
                await self._turn()
                self._history.begun += 1
                await self._call(planned)
                self._history.finished += 1
                if planned.comes_back:
                    self._later.append(planned)
                if len(self._later) > LATER // 10:  # one call in ten does
                    await self._repeat(self._later.popleft())
            while self._later:
                await self._repeat(self._later.popleft())

        async with asyncio.TaskGroup() as tasks:
            for _ in range(in_flight):
                tasks.create_task(caller())

    async def _call(self, planned: Plan) -> None:
        if planned.key is None:
            await self._call_without_key(planned)
            return
        call = self._logical(planned)
        await self._break_off(planned, call.name)
        async with asyncio.TaskGroup() as twins:
            for _ in range(planned.twins):
                twins.create_task(self._until_answered(call, planned))
        self._history.counts["twins"] += planned.twins - 1
        for _ in range(planned.repeats):
            await self._repeat(planned)
        if planned.sends_other_body:
            await self._send_other_body(call, planned)
        if planned.has_namesake:
            namesake = dataclasses.replace(planned, workspace=1 - planned.workspace)
            self._history.counts["namesakes"] += 1
            await self._until_answered(self._logical(namesake), namesake)

    async def _call_without_key(self, planned: Plan) -> None:
        name = f"call-{planned.number}"
        await self._break_off(planned, name)
        answer = await self._settled(name, lambda id: self._post(planned, planned.body, id))
        if answer is not None and answer.status == 200:
            tenant = self._tenants[planned.workspace]
            self._history.unkeyed[answer.headers["x-request-id"]] = (tenant.workspace, tokens_of(answer.body))
        else:
            self._history.fault("never answered", _words(name, answer))

    async def _break_off(self, planned: Plan, name: str) -> None:
        """The tries that end without an answer, on purpose."""
        for after_s in planned.hang_ups_s:
            self._history.counts["hang-ups"] += 1
            await wire.hang_up(self._port, self._request(planned, planned.body, self._id(name)), after_s)
        if planned.loses_reply:
            self._history.counts["lost replies"] += 1
            id = self._id(name)
            try:
                answer = await wire.post_and_lose(self._port, self._request(planned, planned.body, id))
            except Lost:
                return
            if answer.status != 200:
                return
            if planned.key is not None:
                self._logical(planned).succeed(answer)
            else:
                self._history.unkeyed[id] = (self._tenants[planned.workspace].workspace, None)

    async def _until_answered(self, call: Logical, planned: Plan) -> None:
        known = call.digest is not None
        send = self._send_by_sdk if planned.sdk else self._send_by_hand
        answer = await self._settled(call.name, lambda id: send(planned, id))
        if answer is None or answer.status != 200:
            self._history.fault("never answered", _words(call.name, answer))
            return
        call.succeed(answer)
        if not call.keep(answer.body):
            self._history.fault("replay differs", call.name)
        replayed = answer.headers.get("idempotent-replayed") == "true"
        self._history.counts["replays"] += replayed
        if replayed and not answer.headers.get("x-original-request-id", "").startswith(f"{call.name}."):
            self._history.fault("replay of another call", call.name)
        if known and not replayed:
            self._history.fault("not replayed", call.name)

    async def _repeat(self, planned: Plan) -> None:
        """After a success: by hand if it was by SDK, and the other way round."""
        self._history.counts["repeats"] += 1
        await self._until_answered(self._logical(planned), dataclasses.replace(planned, sdk=not planned.sdk))

    async def _send_other_body(self, call: Logical, planned: Plan) -> None:
        answer = await self._settled(call.name, lambda id: self._post(planned, planned.other_body, id))
        if answer is not None and (answer.status, _code(answer)) == (409, "idempotency_conflict"):
            self._history.counts["conflicts"] += 1
        else:
            self._history.fault("mismatch not refused", _words(call.name, answer))

    async def _settled(self, name: str, send: Send) -> Answer | None:
        """The first answer that is not to be tried again. None: there was none in time."""
        until_s, pause_s = time.monotonic() + CALL_S, FIRST_PAUSE_S
        while time.monotonic() < until_s:
            try:
                answer = await send(self._id(name))
            except Lost as lost:
                self._history.statuses[str(lost)] += 1
                self._history.tries += 1
            else:
                self._history.tries += answer.tries
                self._history.statuses[f"{answer.status} {_code(answer)}".strip()] += 1
                if not _again(answer):
                    if answer.status == 200:
                        self._history.answered_s.append(time.monotonic())
                    return answer
            await asyncio.sleep(pause_s * self._chance.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return None

    async def _send_by_hand(self, planned: Plan, id: str) -> Answer:
        return await self._post(planned, planned.body, id)

    async def _post(self, planned: Plan, body: bytes, id: str) -> Answer:
        return await wire.post(self._port, self._request(planned, body, id))

    async def _send_by_sdk(self, planned: Plan, id: str) -> Answer:
        assert planned.key is not None
        fields = orjson.loads(planned.body)
        headers = {"Idempotency-Key": planned.key, "X-Request-Id": id}
        embeddings = self._sdks[planned.workspace].embeddings.with_raw_response
        try:
            reply = await embeddings.create(**fields, extra_headers=headers)
        except openai.APIStatusError as error:
            response, tries = error.response, 1 + SDK_RETRIES
            self._gave_up(error)
        except openai.APIConnectionError as error:
            self._gave_up(error)
            raise Lost(f"SDK {type(error).__name__}") from None
        else:
            response, tries = reply.http_response, 1 + reply.retries_taken
        self._history.counts["by SDK"] += 1
        return Answer(
            status=response.status_code,
            headers=dict(response.headers.items()),
            body=response.content,
            seen_ns=time.monotonic_ns(),
            tries=tries,
        )

    def _gave_up(self, error: openai.APIError) -> None:
        self._history.gave_up_s.append(time.monotonic())
        print(f"the SDK gave up: {error}", file=sys.stderr, flush=True)

    def _request(self, planned: Plan, body: bytes, id: str) -> bytes:
        api_key = self._tenants[planned.workspace].api_key
        return wire.request(self._port, body, api_key=api_key, key=planned.key, request_id=id)

    def _logical(self, planned: Plan) -> Logical:
        assert planned.key is not None
        workspace = self._tenants[planned.workspace].workspace
        claim = idempotency.claim_id(workspace, ROUTE, planned.key)
        name = f"{workspace}-{planned.number}"
        return self._history.keyed.setdefault(claim, Logical(name=name, workspace=workspace))

    def _id(self, name: str) -> str:
        """A request id of its own for each try."""
        return f"{name}.{next(self._numbers)}"


def _again(answer: Answer) -> bool:
    if answer.status == 409:
        return _code(answer) == "idempotency_in_progress"
    return answer.status in (408, 429) or answer.status >= 500


def _code(answer: Answer) -> str:
    """Of an error in the service's shape."""
    if answer.status == 200:
        return ""
    try:
        return str(orjson.loads(answer.body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return f"not the service's: {answer.body[:60]!r}"


def _words(name: str, answer: Answer | None) -> str:
    return f"{name}: {f'{answer.status} {_code(answer)}' if answer else 'no answer'}"

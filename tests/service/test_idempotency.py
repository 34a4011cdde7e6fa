"""Retries with an Idempotency-Key, as a client sees them: one inference, one bill, one answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from serve_app.api import build_app
from serve_app.core import idempotency, keys
from serve_app.core.keys import ApiKey, Plan, Workspace
from serve_app.core.ledger import UsageEvent, shard_of
from serve_app.dispatch import Unit, UnitReply
from serve_app.stores import Store, open_store
from tests.service.fakes import (
    CARD,
    KEY,
    WORKSPACE,
    DeskClerk,
    FakeModel,
    FakeModels,
    add_workspace,
    card,
    made_up,
    service_over,
)

OTHER = Workspace(id="ws_other", name="other", plan=Plan.PRO, created_ms=0)
OTHER_KEY = keys.mint(bytes([7] * 32))
SECOND_KEY = keys.mint(bytes([8] * 32))  # of the first workspace
DAY_MS = 24 * 3600 * 1000


class Clock:
    def __init__(self) -> None:
        self.now_ms = 1_764_115_200_000

    def __call__(self) -> int:
        return self.now_ms


class Slow:
    """A model that never gives the same vector twice, and answers when it may."""

    def __init__(self) -> None:
        self.runs = 0
        self.computing = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.fails = 0

    async def send(self, unit: Unit) -> UnitReply:
        self.runs += 1
        self.computing.set()
        await self.may_answer.wait()
        if self.fails:
            self.fails -= 1
            raise RuntimeError("failed")
        noise = np.random.default_rng(self.runs).standard_normal(384, np.float32) / np.float32(1000)
        return UnitReply(vectors=np.add(made_up(unit.packed), noise, dtype=np.float32), compute_s=0.001)


class Served:
    """Two workspaces, three keys, and as many ingresses as are asked for."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.folder = folder
        self.clock = Clock()
        self.model = Slow()
        self.card = CARD
        self.clients: list[httpx.AsyncClient] = []

    def ingress(self, key: str = KEY, **settings: Any) -> httpx.AsyncClient:
        service = service_over(
            FakeModels(FakeModel(self.card, send=self.model.send)),
            store=self.store,
            clerk=DeskClerk(self.store, cache_bytes=0),
            blobs=self.folder / "blobs",
            clock=self.clock,
            **settings,
        )
        app = build_app(service, max_body_bytes=4_000_000)
        headers = {"Authorization": f"Bearer {key}"}
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=headers)
        self.clients.append(client)
        return client

    async def events(self, workspace: str = WORKSPACE.id) -> list[UsageEvent]:
        return [recorded.event for recorded in await self.store.events(shard_of(workspace), 0, 1000)]


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    served = Served(None, tmp_path)  # type: ignore[arg-type]
    store = served.store = await open_store(f"sqlite:{tmp_path}/store.db", clock=served.clock)
    await add_workspace(store, WORKSPACE, KEY)
    await add_workspace(store, OTHER, OTHER_KEY)
    digest = keys.digest(SECOND_KEY)
    await store.put_key(ApiKey(id="key_second", workspace=WORKSPACE.id, name="second", digest=digest, created_ms=1))
    yield served
    for client in served.clients:
        await client.aclose()
    await store.close()


async def ask(ingress: httpx.AsyncClient, key: str | None = "k", **body: Any) -> httpx.Response:
    request = {"model": CARD.id, "input": "a text"} | body
    return await ingress.post("/v1/embeddings", json=request, headers={"Idempotency-Key": key} if key else {})


def is_replay(response: httpx.Response) -> bool:
    names = ("idempotent-replayed", "x-runinfra-idempotent-replay")
    values = {response.headers.get(name) for name in names}
    assert values in ({"true"}, {None})
    return values == {"true"}


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
@pytest.mark.parametrize("inputs", [1, 1024])
async def test_a_replay_is_the_same_answer_byte_for_byte(served: Served, inputs: int, encoding_format: str) -> None:
    body: dict[str, Any] = {"input": [f"text {n}" for n in range(inputs)], "encoding_format": encoding_format}
    first = await ask(served.ingress(), **body)
    replay = await ask(served.ingress(), **body)
    assert (first.status_code, is_replay(first)) == (200, False)
    assert (replay.status_code, is_replay(replay), replay.content) == (200, True, first.content)
    assert replay.headers["x-request-id"] != first.headers["x-request-id"]
    assert replay.headers["x-original-request-id"] == first.headers["x-request-id"]
    assert replay.headers["x-model-fingerprint"] == CARD.fingerprint
    assert "compute" not in replay.headers["server-timing"]
    (event,) = await served.events()
    assert event.quantity == first.json()["usage"]["total_tokens"]


async def test_truncation_warnings_are_replayed_too(served: Served) -> None:
    body: dict[str, Any] = {"input": ["the " * 400, "short"]}
    first, replay = [await ask(served.ingress(), **body) for _ in range(2)]
    assert first.json()["usage"]["warnings"][0]["index"] == 0
    assert (is_replay(replay), replay.content) == (True, first.content)


async def test_with_a_key_the_work_goes_on_when_the_client_has_waited_long_enough(served: Served) -> None:
    served.model.may_answer.clear()
    ingress = served.ingress()
    body, key = {"model": CARD.id, "input": "a text"}, {"Idempotency-Key": "k"}
    patience = {"x-stainless-read-timeout": "0.1"}
    late = await ingress.post("/v1/embeddings", json=body, headers=key | patience)
    assert late.status_code == 504
    served.model.may_answer.set()
    again = await ask(ingress)
    assert (again.status_code, served.model.runs) == (200, 1)
    assert len(await served.events()) == 1


async def test_without_a_key_nothing_is_billed_that_came_too_late(served: Served) -> None:
    served.model.may_answer.clear()
    body, patience = {"model": CARD.id, "input": "a text"}, {"x-stainless-read-timeout": "0.1"}
    late = await served.ingress().post("/v1/embeddings", json=body, headers=patience)
    served.model.may_answer.set()
    assert late.status_code == 504
    assert await served.events() == []


async def test_without_a_key_the_same_text_is_a_call_of_its_own(served: Served) -> None:
    ingress = served.ingress()
    first, second = [await ask(ingress, None) for _ in range(2)]
    assert not is_replay(second)
    assert second.content != first.content
    assert len({event.id for event in await served.events()}) == 2


async def test_a_request_id_that_a_caller_repeats_does_not_spare_it_the_bill(served: Served) -> None:
    ingress = served.ingress()
    for _ in range(3):
        headers = {"X-Request-Id": "mine"}
        await ingress.post("/v1/embeddings", json={"model": CARD.id, "input": "a"}, headers=headers)
    events = await served.events()
    assert len({event.id for event in events}) == 3
    assert {event.details["request_id"] for event in events} == {"mine"}


async def test_key_order_white_space_and_stated_defaults_make_no_other_request(served: Served) -> None:
    ingress, headers = served.ingress(), {"Idempotency-Key": "k", "Content-Type": "application/json"}
    bodies = [
        b'{"model": "all-MiniLM-L6-v2", "input": "a"}',
        b'{ "input" : ["a"],\n "encoding_format":"float", "model": "all-MiniLM-L6-v2", "user": null }',
    ]
    first, replay = [await ingress.post("/v1/embeddings", content=body, headers=headers) for body in bodies]
    assert (is_replay(replay), replay.content) == (True, first.content)


@pytest.mark.parametrize(
    "change", [{"input": "another"}, {"encoding_format": "base64"}, {"dimensions": 128}, {"user": "u"}]
)
async def test_a_key_with_another_body_is_refused_and_changes_nothing(served: Served, change: dict[str, Any]) -> None:
    ingress = served.ingress()
    first = await ask(ingress)
    conflict = await ask(ingress, **change)
    assert (conflict.status_code, conflict.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert conflict.headers["x-should-retry"] == "false"
    assert (await ask(ingress)).content == first.content
    assert len(await served.events()) == 1


async def test_another_key_of_the_workspace_gets_the_replay_and_another_workspace_a_call_of_its_own(
    served: Served,
) -> None:
    first = await ask(served.ingress())
    same = await ask(served.ingress(SECOND_KEY))
    other = await ask(served.ingress(OTHER_KEY))
    assert (is_replay(same), same.content) == (True, first.content)
    assert (is_replay(other), other.content == first.content) == (False, False)
    assert [event.api_key for event in await served.events()] == [f"key_of_{WORKSPACE.id}"]
    assert len(await served.events(OTHER.id)) == 1


async def test_64_duplicates_at_once_are_one_inference_64_equal_answers_and_one_bill(served: Served) -> None:
    served.model.may_answer.clear()
    ingress = served.ingress()
    calls = [asyncio.create_task(ask(ingress)) for _ in range(64)]
    await served.model.computing.wait()
    await asyncio.sleep(0.3)
    served.model.may_answer.set()
    answered = await asyncio.gather(*calls)
    assert {response.status_code for response in answered} == {200}
    assert len({response.content for response in answered}) == 1
    assert sum(map(is_replay, answered)) == 63
    assert served.model.runs == 1
    assert len(await served.events()) == 1


async def test_a_first_call_that_fails_leaves_the_key_free_at_once(served: Served) -> None:
    served.model.fails = 2  # a unit that fails is tried again once
    ingress = served.ingress()
    failed = await ask(ingress)
    assert failed.status_code == 500
    assert await served.events() == []
    await asyncio.sleep(0.05)
    second = await ask(ingress)
    assert (second.status_code, is_replay(second)) == (200, False)
    assert len(await served.events()) == 1


async def test_what_is_refused_for_its_tokens_leaves_the_key_free(served: Served) -> None:
    ingress = served.ingress()
    refused = await ask(ingress, input=["the " * 300] * 2000)
    assert refused.json()["error"]["code"] == "too_many_tokens"
    await asyncio.sleep(0.05)
    assert (await ask(ingress)).status_code == 200


async def test_a_client_that_hangs_up_finds_the_answer_when_it_comes_again(served: Served) -> None:
    served.model.may_answer.clear()
    ingress = served.ingress()
    call = asyncio.create_task(ask(ingress))
    await served.model.computing.wait()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    served.model.may_answer.set()
    again = await ask(ingress)
    assert (again.status_code, is_replay(again)) == (200, True)
    assert served.model.runs == 1
    assert len(await served.events()) == 1


async def test_a_client_that_hangs_up_without_a_key_is_not_billed(served: Served) -> None:
    served.model.may_answer.clear()
    call = asyncio.create_task(ask(served.ingress(), None))
    await served.model.computing.wait()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    served.model.may_answer.set()
    await asyncio.sleep(0.05)
    assert await served.events() == []


async def test_the_promise_holds_for_24_hours_from_success_and_then_the_key_is_new(served: Served) -> None:
    first = await ask(served.ingress())
    served.clock.now_ms += DAY_MS
    assert is_replay(await ask(served.ingress()))
    served.clock.now_ms += idempotency.GRACE_MS
    second = await ask(served.ingress())
    assert (is_replay(second), second.content == first.content) == (False, False)
    assert len({event.id for event in await served.events()}) == 2


async def test_a_large_reply_is_a_file_that_only_its_owner_may_read(served: Served) -> None:
    body: dict[str, Any] = {"input": [f"text {n}" for n in range(100)]}
    first = await ask(served.ingress(), **body)
    (record,) = [record async for record in served.store.records()]
    (file,) = [path for path in (served.folder / "blobs").rglob("*") if path.is_file()]
    assert record.reply
    assert record.reply.blob == file.name
    assert file.stat().st_mode & 0o777 == 0o600
    assert record.bytes == file.stat().st_size
    assert (await ask(served.ingress(), **body)).content == first.content


async def test_a_reply_whose_file_is_gone_is_computed_again_and_not_billed_again(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    body: dict[str, Any] = {"input": [f"text {n}" for n in range(100)]}
    await ask(served.ingress(), **body)
    (file,) = [path for path in (served.folder / "blobs").rglob("*") if path.is_file()]
    file.unlink()
    again = await ask(served.ingress(), **body)
    assert (again.status_code, is_replay(again)) == (200, False)
    assert "is gone" in caplog.text
    assert len(await served.events()) == 1
    assert (await ask(served.ingress(), **body)).content == again.content


async def test_a_folder_that_takes_no_file_refuses_the_promise_and_bills_nothing(served: Served) -> None:
    (served.folder / "blobs").write_text("not a folder")
    refused = await ask(served.ingress(), input=[f"text {n}" for n in range(100)])
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
    assert await served.events() == []


async def test_a_workspace_keeps_no_more_than_its_quota_and_others_are_not_touched(served: Served) -> None:
    limits: dict[str, Any] = {"replay_bytes": 4 * 384 * 3}
    assert (await ask(served.ingress(**limits), "first")).status_code == 200
    refused = await ask(served.ingress(**limits), "second", input=["a", "b", "c"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert served.model.runs == 1  # refused before anything was computed
    assert (await ask(served.ingress(OTHER_KEY, **limits), "second")).status_code == 200
    assert is_replay(await ask(served.ingress(**limits), "first"))
    served.clock.now_ms += DAY_MS + idempotency.GRACE_MS
    assert (await ask(served.ingress(**limits), "second")).status_code == 200


async def test_two_idempotency_keys_in_one_request_are_refused(served: Served) -> None:
    request = served.ingress().build_request("POST", "/v1/embeddings", json={"model": CARD.id, "input": "a"})
    request.headers = httpx.Headers(
        [*request.headers.multi_items(), ("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    )
    response = await served.clients[0].send(request)
    assert response.json()["error"]["code"] == "invalid_idempotency_key"


async def test_the_bill_says_what_it_is_made_of(served: Served) -> None:
    reply = await ask(served.ingress(), "k", input=["a", "b c"], user="end user", encoding_format="base64")
    (event,) = await served.events()
    assert (event.workspace, event.api_key, event.model) == (WORKSPACE.id, f"key_of_{WORKSPACE.id}", CARD.name)
    assert (event.plan, event.tier, event.size_class, event.unit_price) == ("team", "flex", "small", "0.008")
    assert event.quantity == reply.json()["usage"]["total_tokens"]
    assert event.amount == Decimal("0.008") * event.quantity / 1_000_000
    assert event.details == {
        "endpoint": "/v1/embeddings",
        "request_id": reply.headers["x-request-id"],
        "inputs": 2,
        "dimensions": 384,
        "model_fingerprint": CARD.fingerprint,
        "user": "end user",
        "idempotency": idempotency.claim_id(WORKSPACE.id, "/v1/embeddings", "k"),
    }


async def test_who_reserved_the_model_pays_the_active_rate_and_nobody_else(served: Served) -> None:
    served.card = card(reserved_by=WORKSPACE.id)
    await ask(served.ingress(), None)
    await ask(served.ingress(OTHER_KEY), None)
    (mine,), (theirs,) = await served.events(), await served.events(OTHER.id)
    assert (mine.tier, mine.unit_price) == ("active", "0.0048")
    assert (theirs.tier, theirs.unit_price) == ("flex", "0.01")


async def test_usage_tells_a_workspace_what_it_used_and_nothing_of_others(served: Served) -> None:
    for client in (served.ingress(), served.ingress(SECOND_KEY), served.ingress(SECOND_KEY), served.ingress(OTHER_KEY)):
        await ask(client, None)
    report = (await served.clients[0].get("/v1/usage", params={"group_by": "api_key"})).json()
    assert report["workspace"] == WORKSPACE.id
    assert [(row["api_key"], row["requests"], row["input_tokens"]) for row in report["data"]] == [
        ("key_of_ws_test", 1, 4),
        ("key_second", 2, 8),
    ]
    assert (report["from"], report["to"]) == ("2025-11-01", "2025-11-26")
    by_day = (await served.clients[0].get("/v1/usage", params={"from": "2025-11-26"})).json()["data"]
    assert [(row["day"], row["model"], row["input_tokens"]) for row in by_day] == [("2025-11-26", CARD.name, 12)]
    earlier = (await served.clients[0].get("/v1/usage", params={"to": "2025-11-25"})).json()["data"]
    assert earlier == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"from": "yesterday"}, "from"),
        ({"to": "2026-02-30"}, "to"),
        ({"from": "2026-02-02", "to": "2026-02-01"}, "from"),
        ({"group_by": "day,hour"}, "group_by"),
        ({"group_by": "day,day"}, "group_by"),
        ({"workspace": "ws_other"}, "workspace"),
    ],
)
async def test_usage_refuses_what_it_does_not_know(served: Served, query: dict[str, str], param: str) -> None:
    response = await served.ingress().get("/v1/usage", params=query)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_claim_carries_no_key_in_the_clear() -> None:
    claim = idempotency.claim_id("ws", "/v1/embeddings", "my-order-4711")
    assert "4711" not in claim + idempotency.op_id(claim, "attempt") + idempotency.fingerprint("my-order-4711", b"{}")


async def test_a_dead_ingress_is_waited_for_no_longer_than_its_lease(served: Served) -> None:
    """Its claim is still there; the retry takes it over, under the same operation."""
    claim = idempotency.claim_id(WORKSPACE.id, "/v1/embeddings", "k")
    body = (
        b'{"dimensions":null,"encoding_format":"float","input":["a text"],"model":"%b","user":null}' % CARD.id.encode()
    )
    left_behind = idempotency.Begin(
        claim=claim,
        workspace=WORKSPACE.id,
        fingerprint=idempotency.fingerprint("k", body),
        attempt="dead",
        op="op-of-the-dead",
        lease_ms=400,
        reserve_bytes=1536,
        max_bytes=10**9,
        max_records=10**6,
    )
    await served.store.run([left_behind])

    async def time_passes() -> None:
        await asyncio.sleep(0.2)
        served.clock.now_ms += 400

    response, _ = await asyncio.gather(ask(served.ingress(duplicate_wait_s=10.0)), time_passes())
    assert (response.status_code, is_replay(response)) == (200, False)
    assert [event.id for event in await served.events()] == ["op-of-the-dead"]

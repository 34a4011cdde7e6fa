"""Two workspaces that use the same of every id there is: neither sees, replays, pays for or waits for the other's.

The ids are as alike as ids can be: in one shard of the ledger, and one is the beginning of the other.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from serve_app import books
from serve_app.core import keys
from serve_app.core.keys import ApiKey, Plan, Workspace
from serve_app.core.ledger import shard_of
from serve_app.stores import open_store
from tests.service.fakes import CARD
from tests.service.test_idempotency import Served, is_replay
from tests.stores.homes import HOMES, Home

A = Workspace(id="ws_a", name="first", plan=Plan.TEAM, created_ms=0)
B = Workspace(
    id=next(id for n in itertools.count() if shard_of(id := f"ws_a{n}") == shard_of(A.id)),
    name="second",
    plan=Plan.PRO,
    created_ms=0,
)
KEYS = {workspace.id: keys.mint(bytes([40 + at] * keys.SECRET_BYTES)) for at, workspace in enumerate((A, B))}
SMALL, LARGE = ["a text"], [f"text {n}" for n in range(100)]  # a reply in the record, and one in a file
both_sizes = pytest.mark.parametrize("input", [SMALL, LARGE], ids=["record", "file"])


@pytest.fixture(scope="module", params=HOMES)
def home(request: pytest.FixtureRequest) -> Iterator[Home]:
    with HOMES[request.param]() as home:
        yield home


@pytest.fixture
async def served(home: Home, tmp_path: Path) -> AsyncIterator[Served]:
    served = Served(None, tmp_path)  # type: ignore[arg-type]
    served.store = store = await open_store(home.fresh(), clock=served.clock)
    for workspace in (A, B):
        await store.add_workspace(workspace)
        digest = keys.digest(KEYS[workspace.id])
        await store.put_key(
            ApiKey(id=f"key_of_{workspace.id}", workspace=workspace.id, name="test", digest=digest, created_ms=0)
        )
    yield served
    for client in served.clients:
        await client.aclose()
    await store.close()


@pytest.fixture
def a(served: Served) -> httpx.AsyncClient:
    return served.ingress(KEYS[A.id])


@pytest.fixture
def b(served: Served) -> httpx.AsyncClient:
    return served.ingress(KEYS[B.id])


async def ask(client: httpx.AsyncClient, input: list[str], *, key: str = "k", **headers: str) -> httpx.Response:
    body = {"model": CARD.id, "input": input, "user": "the same user"}
    return await client.post("/v1/embeddings", json=body, headers={"Idempotency-Key": key, **headers})


async def events_of(served: Served, workspace: Workspace) -> list[Any]:
    return [event for event in await served.events(workspace.id) if event.workspace == workspace.id]


@both_sizes
async def test_an_idempotency_key_replays_nothing_of_another_workspace(
    served: Served, a: httpx.AsyncClient, b: httpx.AsyncClient, input: list[str]
) -> None:
    first, others = await ask(a, input), await ask(b, input)
    assert (first.status_code, is_replay(first), others.status_code, is_replay(others)) == (200, False, 200, False)
    assert served.model.runs >= 2
    assert first.json()["data"] != others.json()["data"]
    for client, before in ((a, first), (b, others)):
        again = await ask(client, input)
        assert (is_replay(again), again.content) == (True, before.content)
        assert again.headers["x-original-request-id"] == before.headers["x-request-id"]
    assert [len(await events_of(served, workspace)) for workspace in (A, B)] == [1, 1]


async def test_an_idempotency_key_conflicts_with_no_body_of_another_workspace(
    a: httpx.AsyncClient, b: httpx.AsyncClient
) -> None:
    """A conflict would tell that the key is in use over there."""
    assert (await ask(a, SMALL)).status_code == 200
    other = await ask(b, ["another text"])
    assert (other.status_code, is_replay(other)) == (200, False)


async def test_an_idempotency_key_that_runs_holds_up_nobody_elsewhere(
    served: Served, a: httpx.AsyncClient, b: httpx.AsyncClient
) -> None:
    """Neither a wait nor a 409: both would tell of the other's call."""
    served.model.may_answer.clear()
    first = asyncio.create_task(ask(a, SMALL))
    await served.model.computing.wait()
    second = asyncio.create_task(ask(b, SMALL))
    for _ in range(3000):
        if served.model.runs == 2:
            break
        await asyncio.sleep(0.01)
    assert served.model.runs == 2
    served.model.may_answer.set()
    assert not is_replay(await first)
    assert not is_replay(await second)


async def test_a_lost_file_is_computed_again_for_its_own_workspace(
    served: Served, a: httpx.AsyncClient, b: httpx.AsyncClient
) -> None:
    """Were files found by the key, or by the body, the other's would do."""
    await ask(a, LARGE)
    (mine,) = [path for path in (served.folder / "blobs").rglob("*") if path.is_file()]
    others = await ask(b, LARGE)
    mine.unlink()
    again = await ask(a, LARGE)
    assert (again.status_code, is_replay(again)) == (200, False)
    assert again.json()["data"] != others.json()["data"]


async def test_ids_do_not_run_into_each_other(a: httpx.AsyncClient, b: httpx.AsyncClient) -> None:
    """The end of one workspace's id as the beginning of a key."""
    tail = B.id.removeprefix(A.id)
    assert tail
    assert not is_replay(await ask(b, SMALL, key="k"))
    assert not is_replay(await ask(a, SMALL, key=f"{tail}k"))
    assert not is_replay(await ask(a, SMALL, key=f"{tail}/v1/embeddingsk"))


async def test_a_request_id_of_another_workspace_is_nothing_special(
    served: Served, a: httpx.AsyncClient, b: httpx.AsyncClient
) -> None:
    theirs, ours = [await ask(client, SMALL, **{"X-Request-Id": "the-same"}) for client in (a, b)]
    assert theirs.json()["data"] != ours.json()["data"]
    (their_event,), (our_event,) = await events_of(served, A), await events_of(served, B)
    assert their_event.id != our_event.id
    for workspace, client in ((A, a), (B, b)):
        report = (await client.get("/v1/usage", headers={"X-Request-Id": "the-same"})).json()
        assert report["workspace"] == workspace.id
        assert [row["requests"] for row in report["data"]] == [1]


async def test_usage_is_ones_own_however_it_is_asked_for(
    served: Served, a: httpx.AsyncClient, b: httpx.AsyncClient
) -> None:
    await ask(a, LARGE)
    nothing = (await b.get("/v1/usage")).json()
    assert (nothing["data"], nothing["total_amount_micros"]) == ([], 0)
    tokens = (await ask(b, SMALL)).json()["usage"]["total_tokens"]
    for group_by in ("day", "model", "api_key", "day,model,api_key"):
        answer = await b.get("/v1/usage", params={"group_by": group_by, "from": "1970-01-01", "to": "9999-12-31"})
        report = answer.json()
        assert report["workspace"] == B.id
        assert [(row["requests"], row["input_tokens"]) for row in report["data"]] == [(1, tokens)]
        assert {row.get("api_key", f"key_of_{B.id}") for row in report["data"]} == {f"key_of_{B.id}"}


@pytest.mark.parametrize(
    "name", ["workspace", "workspace_id", "api_key", "api_key_id", "key", "key_id", "user", "project"]
)
async def test_usage_has_no_filter_that_could_name_another_workspace(
    a: httpx.AsyncClient, b: httpx.AsyncClient, name: str
) -> None:
    await ask(a, SMALL)
    for value in (A.id, f"key_of_{A.id}", "the same user", "*"):
        refused = await b.get("/v1/usage", params={name: value})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unknown_parameter")
        assert A.id not in refused.text.replace(B.id, "")


@pytest.mark.parametrize(
    "id", [A.id, f"key_of_{A.id}", f"{A.id}%2F{CARD.id}", f"..%2F..%2F{A.id}", "ws_*", keys.digest(KEYS[A.id])]
)
async def test_no_id_of_a_workspace_is_a_model(b: httpx.AsyncClient, id: str) -> None:
    answer = await b.get(f"/v1/models/{id}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_scope_is_of_its_key_and_narrows_no_other(served: Served, a: httpx.AsyncClient) -> None:
    await ask(a, SMALL)
    narrow = keys.mint(bytes([50] * keys.SECRET_BYTES))
    await served.store.put_key(
        ApiKey(
            id=f"key_of_{A.id}_2",
            workspace=A.id,
            name="narrow",
            digest=keys.digest(narrow),
            created_ms=0,
            models=("another",),
        )
    )
    narrowed = served.ingress(narrow)
    refused = await ask(narrowed, SMALL)  # though a replay would run nothing
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
    assert (await narrowed.get("/v1/models")).json()["data"] == []
    for key in KEYS.values():
        wide = served.ingress(key)
        assert (await ask(wide, SMALL)).status_code == 200
        assert [model["id"] for model in (await wide.get("/v1/models")).json()["data"]] == [CARD.id]


async def test_headers_that_claim_another_workspace_change_nothing(
    served: Served, a: httpx.AsyncClient, b: httpx.AsyncClient
) -> None:
    theirs = await ask(a, SMALL)
    claims = dict.fromkeys(("X-Workspace", "X-Workspace-Id", "OpenAI-Organization", "OpenAI-Project"), A.id)
    ours = await ask(b, SMALL, **claims)
    assert (is_replay(ours), ours.json()["data"] == theirs.json()["data"]) == (False, False)
    assert (await b.get("/v1/usage", headers=claims)).json()["workspace"] == B.id
    assert [len(await events_of(served, workspace)) for workspace in (A, B)] == [1, 1]


async def test_a_workspace_that_spent_its_rate_or_its_quota_spends_no_others(served: Served) -> None:
    slow: dict[str, Any] = {"plans": {plan: {"requests_per_minute": 20} for plan in ("pro", "team", "enterprise")}}
    a, b = (served.ingress(KEYS[workspace.id], limits=slow) for workspace in (A, B))
    before = int((await b.get("/v1/models")).headers["x-ratelimit-remaining"])
    assert 429 in [(await ask(a, SMALL, key=f"{n}")).status_code for n in range(4)]
    assert int((await b.get("/v1/models")).headers["x-ratelimit-remaining"]) == before == 2
    full: dict[str, Any] = {"replay_records": 1}
    a, b = (served.ingress(KEYS[workspace.id], **full) for workspace in (A, B))
    await ask(a, SMALL, key="one")
    assert (await ask(a, SMALL, key="two")).status_code == 429
    assert (await ask(b, SMALL, key="two")).status_code == 200


async def test_a_cap_that_one_workspace_has_reached_stops_no_other(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books, "SPENT_S", -1.0)  # what was spent is asked for each time
    await served.store.put_workspace(replace(A, monthly_cap_micros=1))
    a, b = (served.ingress(KEYS[workspace.id]) for workspace in (A, B))
    assert (await ask(a, LARGE, key="one")).status_code == 200
    refused = await ask(a, LARGE, key="two")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "plan_limit_exceeded")
    for key in ("one", "two"):
        assert (await ask(b, LARGE, key=key)).status_code == 200


async def test_in_any_order_an_answer_goes_to_the_workspace_it_was_computed_for(served: Served) -> None:
    """Both use the same few keys and texts, several at a time, over two ingresses each."""
    rng = random.Random(7)
    clients = {workspace.id: [served.ingress(KEYS[workspace.id]) for _ in range(2)] for workspace in (A, B)}
    texts = {"k1": SMALL, "k2": ["a b", "c"], "k3": LARGE}
    answers: dict[tuple[str, str], set[bytes]] = {}

    async def call(workspace: str) -> None:
        key = rng.choice(sorted(texts))
        answer = await ask(rng.choice(clients[workspace]), texts[key], key=key)
        assert answer.status_code == 200
        answers.setdefault((workspace, key), set()).add(answer.content)

    for _ in range(10):
        await asyncio.gather(*(call(rng.choice((A.id, B.id))) for _ in range(8)))
    assert len(answers) == 6
    assert {len(contents) for contents in answers.values()} == {1}, "a workspace got two answers for one key"
    assert len(set.union(*answers.values())) == 6, "two workspaces got the same answer"
    assert [len(await events_of(served, workspace)) for workspace in (A, B)] == [3, 3]


def test_the_two_are_as_alike_as_ids_can_be() -> None:
    assert B.id.startswith(A.id)
    assert shard_of(A.id) == shard_of(B.id)

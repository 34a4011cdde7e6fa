"""Retries and bills over the whole service: its actors are killed, it is restarted, and the audit finds nothing."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve_app.sinks.jsonl import read
from tests.deployments.conftest import FAST, MINILM, LiveServer

pytestmark = [pytest.mark.live, pytest.mark.timeout(700)]

ID = str(MINILM["id"])


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers=server.headers, timeout=60) as client:
        yield client


def ask(http: httpx.Client, key: str | None = None, **body: Any) -> httpx.Response:
    headers = {"Idempotency-Key": key} if key else {}
    return http.post("/v1/embeddings", json={"model": ID, "input": "a text"} | body, headers=headers)


def is_replay(response: httpx.Response) -> bool:
    return bool(response.headers.get("idempotent-replayed") == "true")


def delivered(server: LiveServer, key: str | None = None) -> list[dict[str, Any]]:
    """Events that arrived in the sink's files, of requests with this user."""
    return [event for event in read(server.usage_folder) if key is None or event["data"].get("user") == key]


def pid_of(server: LiveServer, app: str) -> int:
    (pid,) = server.replica_pids()[app]
    return pid


def kill(server: LiveServer, app: str) -> int:
    victim = pid_of(server, app)
    os.kill(victim, signal.SIGKILL)
    return victim


def test_no_route_but_two_answers_without_a_key(server: LiveServer) -> None:
    with httpx.Client(base_url=server.url) as anybody:
        for path in ("/v1/models", "/v1/usage", "/openapi.json", "/docs", "/nothing"):
            assert anybody.get(path).status_code == 401
        assert anybody.get("/health").status_code == anybody.get("/ready").status_code == 200


@pytest.mark.parametrize("inputs", [1, 1024])
@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_a_replay_is_the_same_bytes(http: httpx.Client, inputs: int, encoding_format: str) -> None:
    key, body = uuid.uuid4().hex, {"input": [f"t {n}" for n in range(inputs)], "encoding_format": encoding_format}
    first, replay = ask(http, key, **body), ask(http, key, **body)
    assert (first.status_code, is_replay(first)) == (200, False)
    assert (is_replay(replay), replay.content == first.content) == (True, True)


async def test_64_duplicates_at_once_are_computed_and_billed_once(server: LiveServer) -> None:
    key, user = uuid.uuid4().hex, uuid.uuid4().hex
    body = {"model": ID, "input": ["the " * 100] * 16, "user": user}
    async with httpx.AsyncClient(base_url=server.url, headers=server.headers, timeout=60) as http:
        calls = [http.post("/v1/embeddings", json=body, headers={"Idempotency-Key": key}) for _ in range(64)]
        answers = await asyncio.gather(*calls)
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert sum(map(is_replay, answers)) == 63
    server.wait_until(lambda: delivered(server, user), 20)
    (event,) = delivered(server, user)
    assert event["data"]["input_tokens"] == answers[0].json()["usage"]["total_tokens"]


def test_calls_with_a_key_wait_for_a_killed_idempotency_actor_and_others_do_not_notice(
    server: LiveServer, http: httpx.Client
) -> None:
    key = uuid.uuid4().hex
    first = ask(http, key)
    victim = pid_of(server, "idempotency")
    os.kill(victim, signal.SIGSTOP)
    assert ask(http).status_code == 200  # no key, no actor
    os.kill(victim, signal.SIGKILL)
    again, fresh = ask(http, key), ask(http, uuid.uuid4().hex)
    assert (is_replay(again), again.content == first.content) == (True, True)
    assert (fresh.status_code, is_replay(fresh)) == (200, False)
    server.wait_until(lambda: server.replica_pids()["idempotency"] not in ([], [victim]), 60)


def test_bills_wait_for_a_killed_usage_actor(server: LiveServer, http: httpx.Client) -> None:
    victim, user = kill(server, "usage"), uuid.uuid4().hex
    for _ in range(3):
        assert ask(http, user=user).status_code == 200
    server.wait_until(lambda: len(delivered(server, user)) == 3, 60)
    server.wait_until(lambda: server.replica_pids()["usage"] not in ([], [victim]), 60)
    sequences: dict[str, list[int]] = {}
    for event in delivered(server):
        sequences.setdefault(event["source"], []).append(int(event["sequence"]))
    for source in sequences.values():
        assert source == list(range(1, len(source) + 1))


def test_the_openai_sdk_retries_with_its_key(server: LiveServer) -> None:
    key = {"Idempotency-Key": uuid.uuid4().hex}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=5) as sdk:
        first = sdk.embeddings.with_raw_response.create(model=ID, input="hello", extra_headers=key)
        again = sdk.embeddings.with_raw_response.create(model=ID, input="hello", extra_headers=key)
        assert again.content == first.content
        with pytest.raises(openai.ConflictError) as conflict:
            sdk.embeddings.create(model=ID, input="another", extra_headers=key)
    assert conflict.value.code == "idempotency_conflict"


def test_usage_and_the_audit_agree(server: LiveServer, http: httpx.Client) -> None:
    before = http.get("/v1/usage").json()["data"]
    tokens = ask(http, uuid.uuid4().hex).json()["usage"]["total_tokens"]
    ask(http)
    after = http.get("/v1/usage").json()["data"]
    assert sum(row["input_tokens"] for row in after) - sum(row["input_tokens"] for row in before) == 2 * tokens
    audit = server.audit()
    assert (audit.returncode, audit.stderr) == (0, ""), audit.stdout


def test_what_is_under_way_when_it_is_stopped_is_answered_and_replayed_after_a_restart(tmp_path: Path) -> None:
    body = {"model": ID, "input": [f"{number} " * 250 for number in range(40)]}

    def stopped_amid(server: LiveServer, names: list[str], by: signal.Signals) -> list[httpx.Response]:
        def reply(name: str) -> httpx.Response:
            headers = server.headers | {"Idempotency-Key": name}
            return httpx.post(f"{server.url}/v1/embeddings", json=body, headers=headers, timeout=60)

        with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
            try:
                server.start()
                calls = [pool.submit(reply, name) for name in names]
                server.wait_until(lambda: server.pending() > 3 * len(body["input"]), 30)  # all four, or four new ones
            finally:
                server.stop(by)
            return [call.result() for call in calls]

    old, new = [f"old-{it}" for it in range(4)], [f"new-{it}" for it in range(4)]
    first = stopped_amid(LiveServer(tmp_path, [MINILM], FAST), old, signal.SIGTERM)
    server = LiveServer(tmp_path, [MINILM], {})
    second = stopped_amid(server, [*old, *new], signal.SIGINT)
    assert [it.status_code for it in (*first, *second)] == [200] * 12
    assert [is_replay(it) for it in (*first, *second)] == [False] * 4 + [True] * 4 + [False] * 4
    assert [it.content for it in second[:4]] == [it.content for it in first]
    audit = server.audit()
    assert audit.returncode == 0, audit.stdout + audit.stderr

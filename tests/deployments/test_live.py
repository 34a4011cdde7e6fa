"""The whole service, over HTTP, through the OpenAI SDK. Every test runs behind both proxies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from sentence_transformers import SentenceTransformer

from serve_app.core import keys
from serve_app.core.catalog import ModelSpec
from serve_app.encoders.sources import fetch
from tests.checkpoints import make_checkpoint, prose
from tests.deployments.conftest import MINILM, PASSWORD, LiveServer

pytestmark = [pytest.mark.live, pytest.mark.timeout(700)]

MINILM_ID, MINILM_NAME = str(MINILM["id"]), str(MINILM["name"])


def head_of(server: LiveServer, length: int) -> bytes:
    """A request's, up to its body."""
    lines = [
        "POST /v1/embeddings HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {server.key}",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def texts(count: int, *, shortest: int = 3, longest: int = 400, seed: int = 7) -> list[str]:
    chance = random.Random(seed)
    return [prose(chance.randint(shortest, longest), chance) for _ in range(count)]


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, timeout=120) as sdk:
        yield sdk


@pytest.fixture(scope="session")
def expected() -> tuple[list[str], Any]:
    """Texts, and what sentence-transformers says of them in float32."""
    folder = fetch(ModelSpec.model_validate(MINILM))
    inputs = texts(40)
    reference = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return inputs, reference.encode(inputs, normalize_embeddings=True)


@pytest.mark.parametrize(("model", "floor"), [(MINILM_ID, 0.9998), ("minilm-float32", 0.999999)])
def test_vectors_are_those_of_sentence_transformers(
    client: openai.OpenAI, expected: tuple[list[str], Any], model: str, floor: float
) -> None:
    def worst_cosine(vectors: list[Any]) -> float:
        return float((np.asarray(vectors, np.float32) * rows).sum(axis=1).min())

    inputs, rows = expected
    together = client.embeddings.create(model=model, input=inputs)
    as_floats = client.embeddings.create(model=model, input=inputs, encoding_format="float")
    alone = [client.embeddings.create(model=model, input=text).data[0].embedding for text in inputs]
    assert worst_cosine([row.embedding for row in together.data]) >= floor
    assert worst_cosine([row.embedding for row in as_floats.data]) >= floor
    assert worst_cosine(alone) >= floor
    assert [row.index for row in together.data] == list(range(len(inputs)))


async def test_the_async_sdk_gets_the_same(server: LiveServer, client: openai.OpenAI) -> None:
    inputs = texts(8)
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key) as sdk:
        replies = await asyncio.gather(*(sdk.embeddings.create(model=MINILM_ID, input=text) for text in inputs))
    together = client.embeddings.create(model=MINILM_ID, input=inputs)
    for reply, row in zip(replies, together.data, strict=True):
        assert np.dot(reply.data[0].embedding, row.embedding) > 0.9999


def test_every_model_answers_to_its_id_and_its_canonical_name_in_any_case(
    server: LiveServer, client: openai.OpenAI
) -> None:
    names = {"tiny-xlmr": "tests/Tiny-XLMR", "TINY-xlmr": "tests/Tiny-XLMR", "tests/tiny-xlmr": "tests/Tiny-XLMR"}
    names |= {MINILM_ID.upper(): MINILM_NAME, MINILM_NAME: MINILM_NAME}
    for name, canonical in names.items():
        assert client.embeddings.create(model=name, input="hello").model == canonical
    assert {model.id for model in client.models.list()} == {entry["id"] for entry in server.models}
    assert client.models.retrieve(MINILM_NAME).id == MINILM_NAME


def test_headers_tell_the_request_the_model_and_the_time(client: openai.OpenAI, server: LiveServer) -> None:
    raw = client.embeddings.with_raw_response.create(model=MINILM_ID, input="hello")
    assert len(raw.headers.get_list("x-request-id")) == 1
    assert len(raw.headers["x-model-fingerprint"]) == 12
    assert {"tokenize", "queue", "compute", "total"} <= {
        part.split(";")[0].strip() for part in raw.headers["server-timing"].split(",")
    }
    mine = httpx.get(f"{server.url}/v1/models", headers=server.headers | {"X-Request-Id": "mine"})
    assert mine.headers.get_list("x-request-id") == ["mine"]


def test_errors_have_the_openai_shape_behind_the_proxy(client: openai.OpenAI, server: LiveServer) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.embeddings.create(model="no-such-model", input="hello")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as ids:
        client.embeddings.create(model=MINILM_ID, input=[[101, 2023]])
    assert (ids.value.code, ids.value.param) == ("unsupported_parameter", "input")
    unrouted = httpx.get(f"{server.url}/v2/embeddings", headers=server.headers)
    assert unrouted.json()["error"]["code"] == "route_not_found"
    assert len(unrouted.headers.get_list("x-request-id")) == 1


def test_a_body_over_the_limit_is_refused_before_it_is_sent_whole(server: LiveServer) -> None:
    """Only the head and one MiB go out; the answer is there while the other 16 MiB never leave."""
    head = head_of(server, 17 << 20)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head + b" " * (1 << 20))
        assert connection.recv(64).startswith(b"HTTP/1.1 413 ")


def test_2048_strings_pass_for_the_small_class_and_one_more_does_not(client: openai.OpenAI) -> None:
    assert len(client.embeddings.create(model=MINILM_ID, input=["hi"] * 2048).data) == 2048
    with pytest.raises(openai.BadRequestError, match=r"2,049 inputs.* 2,048") as refused:
        client.embeddings.create(model=MINILM_ID, input=["hi"] * 2049)
    assert refused.value.code == "too_many_inputs"


def test_clients_that_hang_up_leave_nothing_behind(server: LiveServer, client: openai.OpenAI) -> None:
    """HAProxy does not tell of a client that is gone within milliseconds: such a request is computed to its end, so
    the requests are small enough for all of them to be done in time."""
    rng = random.Random(3)
    inputs = texts(64, shortest=20, longest=40)
    body = json.dumps({"model": MINILM_ID, "input": inputs}).encode()
    head = head_of(server, len(body))
    most = 0
    for _ in range(25):
        connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
        for connection in connections:
            connection.sendall(head + body)
        time.sleep(rng.uniform(0.02, 0.2))
        most = max(most, server.pending())
        for connection in connections:
            connection.close()
    assert most > 0
    server.wait_until(lambda: server.pending() == 0, 60)
    assert client.embeddings.create(model=MINILM_ID, input="still there").model == MINILM_NAME


class Loop:
    """A client that asks, over and over, until told to stop."""

    def __init__(self, ask: Callable[[], object]) -> None:
        self.answers, self.errors = 0, list[Exception]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ask,))

    def _run(self, ask: Callable[[], object]) -> None:
        while not self._stop.is_set():
            try:
                ask()
                self.answers += 1
            except Exception as error:
                self.errors.append(error)

    def __enter__(self) -> Loop:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_a_model_comes_and_goes_and_the_others_do_not_notice(
    server: LiveServer, client: openai.OpenAI, checkpoint: dict[str, Any]
) -> None:
    before = server.replica_pids()
    third = checkpoint | {"id": "third", "name": "tests/Third"}
    with Loop(lambda: client.embeddings.create(model=MINILM_ID, input="hello")) as loop:
        server.deploy([*server.models, third])
        with contextlib.suppress(openai.InternalServerError):
            while True:  # until it is known: 404, then 503 while it loads
                with contextlib.suppress(openai.NotFoundError):
                    client.embeddings.create(model="third", input="hello")
                    break
                time.sleep(0.05)
        server.wait_until(lambda: server.states().get("third") == "ready", 120)
        assert client.embeddings.create(model="tests/third", input="hello").model == "tests/Third"
        after = server.replica_pids()
        server.deploy(server.models)
        with contextlib.suppress(openai.NotFoundError):  # served by the replica that drains, or told
            client.embeddings.create(model="third", input="hello")
        server.wait_until(lambda: "model-third" not in server.replica_pids(), 60)
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="third", input="hello")
    assert loop.errors == []
    assert loop.answers > 20
    assert {app: pids for app, pids in after.items() if app in before} == before
    assert server.replica_pids() == before


def test_a_model_changes_under_load_and_no_answer_is_of_two(
    server: LiveServer, client: openai.OpenAI, checkpoint: dict[str, Any], tmp_path: Path
) -> None:
    old = checkpoint | {"id": "changing", "name": "tests/Changing"}
    new = old | {"source": str(make_checkpoint(tmp_path / "xlmr", "xlm-roberta", seed=1))}
    many = texts(120)  # a dozen units
    answers: list[tuple[str, Any]] = []
    patient = client.with_options(max_retries=5)

    def ask() -> None:
        raw = patient.embeddings.with_raw_response.create(model="changing", input=many)
        answers.append((raw.headers["x-model-fingerprint"], np.array([it.embedding for it in raw.parse().data])))

    def served() -> str:
        return answers[-1][0] if answers else ""

    server.deploy([*server.models, old])
    server.wait_until(lambda: server.states().get("changing") == "ready", 120)
    with Loop(ask) as loop:
        server.wait_until(lambda: bool(served()), 30)
        first = served()
        server.deploy([*server.models, new])
        server.wait_until(lambda: served() != first, 120)
        before = len(answers)
        server.wait_until(lambda: len(answers) > before + 2, 30)
    server.deploy(server.models)
    assert loop.errors == []
    own = {first: answers[0][1], served(): answers[-1][1]}
    assert {fingerprint for fingerprint, _ in answers} == {*own}
    for fingerprint, vectors in answers:
        assert (vectors * own[fingerprint]).sum(axis=1).min() > 0.99
    assert (own[first] * own[served()]).sum(axis=1).max() < 0.9
    server.wait_until(lambda: "model-changing" not in server.replica_pids(), 60)


def test_prices_and_limits_change_and_no_process_does(server: LiveServer, client: openai.OpenAI) -> None:
    before = server.replica_pids()
    plans = {plan: {"requests_per_minute": 77_000_000} for plan in ("pro", "team", "enterprise")}

    def told() -> tuple[str, str]:
        reply = client.embeddings.with_raw_response.create(model=MINILM_ID, input="hello")
        event = json.loads(server.command("ledger", "tail", "-n", "1", "--json").stdout)
        return reply.headers["x-ratelimit-limit"], event["data"]["rate_card"]

    usual = told()
    with Loop(lambda: client.embeddings.create(model=MINILM_ID, input="hello")) as loop:
        server.deploy(server.models, {"rates": {"version": "next"}, "limits": {"plans": plans}})
        server.wait_until(lambda: told() == ("77000000", "next"), 30)
        server.deploy(server.models, {"rates": {"version": "worse", "plans": {"pro": {"gpu_hour": "-1"}}}})
        server.wait_until(
            lambda: any("so the old terms stay" in it.read_text(errors="replace") for it in server.logs()), 30
        )
        assert told() == ("77000000", "next")
        server.deploy(server.models)
        server.wait_until(lambda: told() == usual, 30)
    assert loop.errors == []
    assert server.replica_pids() == before


def test_a_killed_replica_is_replaced_and_retries_get_through(server: LiveServer) -> None:
    victim = server.replica_pids()["model-tiny-xlmr"][0]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=5) as sdk:
        sdk.embeddings.create(model="tiny-xlmr", input="before")
        os.kill(victim, signal.SIGKILL)
        assert sdk.embeddings.create(model="tiny-xlmr", input="after").model == "tests/Tiny-XLMR"
    server.wait_until(lambda: victim not in server.replica_pids()["model-tiny-xlmr"], 60)
    server.wait_until(lambda: set(server.states().values()) == {"ready"}, 60)


def test_no_secret_and_no_text_reaches_a_log_a_metric_or_a_process_list(
    server: LiveServer, client: openai.OpenAI
) -> None:
    marker = "xyzzy-plugh-7391"
    wrong_key = keys.mint(secrets.token_bytes(keys.SECRET_BYTES))
    headers = {"Idempotency-Key": f"order {marker}"}
    client.embeddings.create(model=MINILM_ID, input=marker, user=marker, extra_headers=headers)
    client.embeddings.create(model=MINILM_ID, input=marker, user=marker, extra_headers=headers)
    for wrong in (
        {"input": f"another {marker}", "extra_headers": headers},
        {"input": marker, "user": marker * 50},
        {"input": [marker, ""]},
        {"input": marker, "model": f"no {marker}"},
        {"input": marker, "extra_body": {f"field {marker}": marker}},
        {"input": marker, "extra_headers": {"Authorization": f"Bearer {wrong_key}"}},
        {"input": marker, "extra_headers": {"Authorization": f"Bearer {marker}"}},
    ):
        with pytest.raises(openai.APIStatusError) as refused:
            client.embeddings.create(**{"model": MINILM_ID} | wrong)
        assert marker not in refused.value.response.text
    kept_secret = (marker, PASSWORD, server.key[12:], wrong_key[12:])
    logs = {str(path): path.read_text(errors="replace") for path in server.logs()}
    assert len(logs) > 5
    processes = {
        f"process {process.pid}": " ".join([process.name(), *process.cmdline()]) for process in server.processes()
    }
    assert len(processes) > 5
    workspaces = json.loads(server.command("workspace", "list", "--json").stdout)
    commands = [server.command("key", "list", workspace["id"], "--json") for workspace in workspaces]
    assert workspaces
    told = logs | processes | {"metrics": server.metrics(), "commands": str(commands)}
    assert "ray_" in told["metrics"]
    assert not [place for place, text in told.items() for secret in kept_secret if secret in text]

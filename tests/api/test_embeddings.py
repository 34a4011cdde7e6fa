"""What a caller gets when all goes well, mostly through OpenAI's own client, unmodified."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Scope

from serve_app.api import build_app
from serve_app.core.catalog import SizeClass
from serve_app.core.vectors import Vectors
from tests.service.fakes import (
    AUTHORIZATION,
    CARD,
    KEY,
    FakeModel,
    FakeModels,
    bundled_tokenizer,
    card,
    made_up,
    never_answers,
    service_over,
)

ID, NAME = CARD.id, CARD.name
MAX_BODY_BYTES = 4_000_000
EDGE_BODY_BYTES = 4_096  # where the limit itself is tested
ONE_TOKEN = "a"  # three with the special ones


def app_of(*models: FakeModel, loading: dict[str, float] | None = None, **settings: Any) -> ASGIApp:
    return app_over(FakeModels(*(models or (FakeModel(),)), loading=loading), **settings)


def app_over(models: FakeModels, *, request_timeout_s: float = 30.0, max_body_bytes: int = MAX_BODY_BYTES) -> ASGIApp:
    return build_app(service_over(models, request_timeout_s=request_timeout_s), max_body_bytes=max_body_bytes)


@contextmanager
def sdk(app: ASGIApp, *, max_retries: int = 0) -> Iterator[openai.OpenAI]:
    """OpenAI's client; the app runs in one event loop beside it."""
    with TestClient(app) as http:
        yield openai.OpenAI(api_key=KEY, base_url="http://testserver/v1", http_client=http, max_retries=max_retries)


def async_sdk(app: ASGIApp, *, max_retries: int = 0) -> openai.AsyncOpenAI:
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app))
    return openai.AsyncOpenAI(api_key=KEY, base_url="http://test/v1", http_client=http, max_retries=max_retries)


def plain(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=AUTHORIZATION)


@pytest.fixture
def client() -> Iterator[openai.OpenAI]:
    with sdk(app_of()) as client:
        yield client


def expected(*texts: str) -> Vectors:
    return made_up(bundled_tokenizer()(texts).packed)


def received(response: openai.types.CreateEmbeddingResponse) -> Vectors:
    assert [item.index for item in response.data] == list(range(len(response.data)))
    return np.array([item.embedding for item in response.data], np.float32)


def tokens(count: int) -> str:
    """A text of exactly so many tokens."""
    return "the " * (count - 2)


def texts_of(total: int) -> list[str]:
    """As few texts as can be, of exactly so many tokens together."""
    whole, rest = divmod(total, CARD.max_tokens)
    if 0 < rest < 3:  # no text is as short as that
        return [tokens(CARD.max_tokens)] * (whole - 1) + [tokens(CARD.max_tokens - 3), tokens(rest + 3)]
    return [tokens(CARD.max_tokens)] * whole + [tokens(rest)] * bool(rest)


# OpenAI's client


@pytest.mark.parametrize("input", ["one text", ["one text"], ["one", "two", "three"]])
def test_the_sdk_gets_a_vector_for_each_text(client: openai.OpenAI, input: str | list[str]) -> None:
    response = client.embeddings.create(model=ID, input=input)
    texts = [input] if isinstance(input, str) else input
    assert received(response) == pytest.approx(expected(*texts))
    assert response.object == "list"
    assert {item.object for item in response.data} == {"embedding"}


def test_the_sdk_asks_for_base64_when_its_caller_says_nothing(client: openai.OpenAI) -> None:
    raw = client.embeddings.with_raw_response.create(model=ID, input="hello")
    assert json.loads(raw.http_request.content)["encoding_format"] == "base64"
    sent = json.loads(raw.text)["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(sent), "<f4").tobytes() == expected("hello").tobytes()
    assert received(raw.parse()).tobytes() == expected("hello").tobytes()


def test_float_and_base64_are_the_same_numbers(client: openai.OpenAI) -> None:
    floats = client.embeddings.create(model=ID, input="hello", encoding_format="float")
    encoded = client.embeddings.create(model=ID, input="hello", encoding_format="base64")
    text: Any = encoded.data[0].embedding  # whoever asks for base64 gets it, though the SDK's type says floats
    assert isinstance(text, str)
    assert np.frombuffer(base64.b64decode(text), "<f4").tobytes() == received(floats).tobytes()


def test_a_request_that_names_no_format_gets_floats() -> None:
    with TestClient(app_of(), headers=AUTHORIZATION) as http:
        response = http.post("/v1/embeddings", json={"model": ID, "input": "hello"})
    assert response.json()["data"][0]["embedding"] == pytest.approx(expected("hello")[0].tolist())


@pytest.mark.parametrize("nothing", [{"encoding_format": None}, {"dimensions": None}, {"user": None}])
def test_null_means_the_default(nothing: dict[str, None]) -> None:
    with TestClient(app_of(), headers=AUTHORIZATION) as http:
        response = http.post("/v1/embeddings", json={"model": ID, "input": "hello"} | nothing)
    assert response.json()["data"][0]["embedding"] == pytest.approx(expected("hello")[0].tolist())


def test_user_is_taken_and_changes_nothing(client: openai.OpenAI) -> None:
    with_user = client.embeddings.create(model=ID, input="hello", user="u" * 256)
    assert received(with_user).tobytes() == expected("hello").tobytes()


def test_native_dimensions_may_be_asked_for(client: openai.OpenAI) -> None:
    assert received(client.embeddings.create(model=ID, input="hello", dimensions=384)).shape == (1, 384)


def test_fewer_dimensions_are_the_first_ones_at_unit_length(client: openai.OpenAI) -> None:
    response = client.embeddings.create(model=ID, input=["hello", "world"], dimensions=128)
    first = expected("hello", "world")[:, :128]
    assert received(response) == pytest.approx(first / np.linalg.norm(first, axis=1, keepdims=True))


@pytest.mark.parametrize("name", [ID, NAME, ID.upper(), NAME.lower()])
def test_a_model_has_two_names_in_any_case_and_answers_with_the_canonical_one(client: openai.OpenAI, name: str) -> None:
    response = client.embeddings.create(model=name, input="hello")
    assert response.model == NAME
    assert received(response).tobytes() == expected("hello").tobytes()


def test_usage_counts_special_tokens(client: openai.OpenAI) -> None:
    usage = client.embeddings.create(model=ID, input=["hello world", "hello"]).usage
    assert (usage.prompt_tokens, usage.total_tokens) == (7, 7)
    assert usage.model_extra == {}


def test_a_text_that_is_cut_is_counted_as_cut_and_warned_of(client: openai.OpenAI) -> None:
    texts = ["hello", tokens(901), tokens(256), tokens(257)]
    response = client.embeddings.create(model=ID, input=texts)
    assert response.usage.prompt_tokens == response.usage.total_tokens == 3 + 3 * 256
    assert response.usage.model_extra == {
        "warnings": [
            {"code": "input_truncated", "index": 1, "tokens": 901, "kept": 256},
            {"code": "input_truncated", "index": 3, "tokens": 257, "kept": 256},
        ]
    }
    vectors = received(response)
    assert vectors[1].tobytes() == vectors[2].tobytes() == vectors[3].tobytes()


def test_raw_responses_have_their_headers(client: openai.OpenAI) -> None:
    raw = client.embeddings.with_raw_response.create(model=ID, input="hello", extra_headers={"X-Request-Id": "mine-7"})
    assert raw.headers["x-request-id"] == raw.request_id == "mine-7"
    assert raw.headers["x-model-fingerprint"] == CARD.fingerprint
    steps = [step.partition(";dur=") for step in raw.headers["server-timing"].split(", ")]
    assert [name for name, _, _ in steps] == ["tokenize", "queue", "compute", "total"]
    spent = {name: float(milliseconds) for name, _, milliseconds in steps}
    assert spent["compute"] == 1.0  # what the fake says
    assert spent["total"] >= spent["tokenize"]
    assert raw.headers["content-type"] == "application/json"


def test_requests_without_an_id_are_given_one_each(client: openai.OpenAI) -> None:
    ids = [client.embeddings.with_raw_response.create(model=ID, input="hello").request_id for _ in range(3)]
    assert len(set(ids)) == 3
    assert all(re.fullmatch("[0-9a-f]{32}", id or "") for id in ids)


async def test_the_async_sdk_gets_the_same() -> None:
    async with async_sdk(app_of()) as client:
        default = await client.embeddings.create(model=ID, input=["one", "two"])
        floats = await client.embeddings.create(model=NAME, input=["one", "two"], encoding_format="float")
        raw = await client.embeddings.with_raw_response.create(model=ID, input="one", dimensions=128, user="me")
    assert received(default).tobytes() == received(floats).tobytes() == expected("one", "two").tobytes()
    assert raw.headers["x-model-fingerprint"] == CARD.fingerprint
    assert received(raw.parse()).shape == (1, 128)


async def test_requests_at_the_same_time_get_each_its_own() -> None:
    model = FakeModel()
    texts = [f"text number {number}" for number in range(40)]
    async with async_sdk(app_of(model)) as client:
        responses = await asyncio.gather(*(client.embeddings.create(model=ID, input=text) for text in texts))
    assert np.concatenate([received(response) for response in responses]).tobytes() == expected(*texts).tobytes()
    assert len(model.units) < len(texts)  # what waited while others were under way travelled together


def test_sdk_errors_carry_our_code_and_param(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model=ID, input=["hello", ""])
    assert (refused.value.code, refused.value.param) == ("invalid_input", "input[1]")
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.embeddings.create(model="text-embedding-3-small", input="hello")
    assert unknown.value.code == "model_not_found"


# Retries


class Flaky(FakeModels):
    """Models of which the first few requests find none loaded."""

    def __init__(self, failures: int) -> None:
        super().__init__(FakeModel(), loading={ID: 0.01})
        self._failures = failures

    def resolve(self, name: str) -> Any:
        if len(self.asked) == self._failures:
            self.loading = {}
        return super().resolve(name)


def test_the_sdk_waits_for_a_model_that_loads() -> None:
    models = Flaky(failures=1)
    with sdk(app_over(models), max_retries=2) as client:
        response = client.embeddings.create(model=ID, input="hello")
    assert received(response).tobytes() == expected("hello").tobytes()
    assert len(models.asked) == 2


async def test_the_async_sdk_waits_for_a_model_that_loads() -> None:
    models = Flaky(failures=1)
    async with async_sdk(app_over(models), max_retries=2) as client:
        response = await client.embeddings.create(model=ID, input="hello")
    assert received(response).tobytes() == expected("hello").tobytes()
    assert len(models.asked) == 2


def test_the_sdk_gives_up_after_its_retries() -> None:
    models = Flaky(failures=9)
    with sdk(app_over(models), max_retries=1) as client, pytest.raises(openai.InternalServerError) as failed:
        client.embeddings.create(model=ID, input="hello")
    assert (failed.value.status_code, failed.value.code) == (503, "model_loading")
    assert len(models.asked) == 2


def test_the_sdk_does_not_repeat_what_cannot_succeed() -> None:
    models = FakeModels(FakeModel())
    with sdk(app_over(models), max_retries=3) as client, pytest.raises(openai.BadRequestError):
        client.embeddings.create(model=ID, input="hello", dimensions=7)
    assert len(models.asked) == 1


def test_a_request_that_takes_too_long_is_a_504() -> None:
    model = FakeModel(send=never_answers)
    with sdk(app_of(model, request_timeout_s=0.05)) as client, pytest.raises(openai.InternalServerError) as failed:
        client.embeddings.create(model=ID, input="hello")
    assert (failed.value.status_code, failed.value.code, failed.value.type) == (504, "timeout", "api_error")
    assert model.dispatcher.pending_sequences == 0


async def test_what_a_client_said_it_waits_is_all_it_gets() -> None:
    model = FakeModel(send=never_answers)
    async with async_sdk(app_of(model), max_retries=0) as client:
        with pytest.raises(openai.InternalServerError) as failed:  # the SDK says it in x-stainless-read-timeout
            await client.embeddings.create(model=ID, input="hello", timeout=0.05)
    assert failed.value.code == "timeout"
    assert model.dispatcher.pending_sequences == 0


@pytest.mark.parametrize("given", ["", "0", "-1", "nan", "inf", "1e-3", "0x1", "soon", "1" * 400])
async def test_a_read_timeout_that_is_none_says_nothing(given: str) -> None:
    async with async_sdk(app_of(FakeModel()), max_retries=0) as client:
        headers = {"x-stainless-read-timeout": given}
        response = await client.embeddings.create(model=ID, input="hello", extra_headers=headers)
    assert received(response).tobytes() == expected("hello").tobytes()


# Limits


def test_2048_strings_pass_for_the_small_class(client: openai.OpenAI) -> None:
    response = client.embeddings.create(model=ID, input=[ONE_TOKEN] * 2048)
    assert received(response).shape == (2048, 384)
    assert response.usage.total_tokens == 3 * 2048


def test_2049_strings_are_too_many_for_the_small_class(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=f"2,049 inputs; {NAME} takes at most 2,048") as refused:
        client.embeddings.create(model=ID, input=[ONE_TOKEN] * 2049)
    assert (refused.value.code, refused.value.param) == ("too_many_inputs", "input")


@pytest.mark.parametrize(("size", "limit"), [(SizeClass.BASE, 1024), (SizeClass.LARGE, 1024), (SizeClass.XL, 256)])
async def test_each_class_has_its_limit_of_strings(size: SizeClass, limit: int) -> None:
    async with plain(app_of(FakeModel(card(size_class=size)))) as http:
        fits = await http.post("/v1/embeddings", json={"model": ID, "input": [ONE_TOKEN] * limit})
        over = await http.post("/v1/embeddings", json={"model": ID, "input": [ONE_TOKEN] * (limit + 1)})
    assert (fits.status_code, len(fits.json()["data"])) == (200, limit)
    assert (over.status_code, over.json()["error"]["code"]) == (400, "too_many_inputs")
    assert f"{limit + 1:,} inputs; {NAME} takes at most {limit:,}" in over.json()["error"]["message"]


@pytest.mark.parametrize(
    ("size", "limit"),
    [(SizeClass.SMALL, 262_144), (SizeClass.BASE, 131_072), (SizeClass.LARGE, 131_072), (SizeClass.XL, 32_768)],
)
async def test_each_class_has_its_limit_of_tokens(size: SizeClass, limit: int) -> None:
    request = {"model": ID, "encoding_format": "base64"}
    async with plain(app_of(FakeModel(card(size_class=size)))) as http:
        fits = await http.post("/v1/embeddings", json=request | {"input": texts_of(limit)})
        over = await http.post("/v1/embeddings", json=request | {"input": texts_of(limit + 1)})
    assert (fits.status_code, fits.json()["usage"]["total_tokens"]) == (200, limit)
    assert (over.status_code, over.json()["error"]["code"]) == (400, "too_many_tokens")
    assert f"{limit + 1:,} tokens; {NAME} takes at most {limit:,}" in over.json()["error"]["message"]


async def test_tokens_are_limited_after_each_text_is_cut() -> None:
    texts = [tokens(400)] * 128  # 51,200 before the cut, 32,768 after it
    async with plain(app_of(FakeModel(card(size_class=SizeClass.XL)))) as http:
        response = await http.post("/v1/embeddings", json={"model": ID, "input": texts})
    assert (response.status_code, response.json()["usage"]["total_tokens"]) == (200, 32_768)


# The body's size, counted in bytes as they come


class Caller:
    """The other end of the bare protocol: sends a body in pieces, and counts how many were read."""

    def __init__(self, pieces: Sequence[bytes], *, then: Message | None = None) -> None:
        self._messages: list[Message] = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        self._messages.append(then or {"type": "http.request", "body": b"", "more_body": False})
        self.read = 0
        self.heard: list[Message] = []

    async def receive(self) -> Message:
        self.read += 1
        return self._messages[self.read - 1]

    async def send(self, message: Message) -> None:
        self.heard.append(message)

    async def call(self, app: ASGIApp, **headers: str) -> int:
        """The status of the answer."""
        sent = {"content-type": "application/json", "authorization": AUTHORIZATION["Authorization"]}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/embeddings",
            "raw_path": b"/v1/embeddings",
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await app(scope, self.receive, self.send)
        return int(self.heard[0]["status"]) if self.heard else 0

    @property
    def body(self) -> Any:
        return json.loads(b"".join(message.get("body", b"") for message in self.heard[1:]))


def body_of(size: int) -> bytes:
    """A good request of exactly so many bytes: white space before it counts, too."""
    return json.dumps({"model": ID, "input": "hello"}).encode().rjust(size)


def in_pieces(body: bytes, size: int) -> list[bytes]:
    return [body[first : first + size] for first in range(0, len(body), size)]


@pytest.fixture
def edge_app() -> ASGIApp:
    return app_of(max_body_bytes=EDGE_BODY_BYTES)


async def test_a_body_of_exactly_the_limit_is_read(edge_app: ASGIApp) -> None:
    for declared in ({}, {"content_length": str(EDGE_BODY_BYTES)}):
        assert await Caller(in_pieces(body_of(EDGE_BODY_BYTES), 100)).call(edge_app, **declared) == 200


async def test_a_chunked_body_is_read_no_further_than_the_limit(edge_app: ASGIApp) -> None:
    caller = Caller(in_pieces(body_of(100 * EDGE_BODY_BYTES), 1024))
    assert await caller.call(edge_app, transfer_encoding="chunked") == 413
    assert caller.read == 5  # the fourth piece is the limit, the fifth is over it
    assert caller.body["error"]["code"] == "request_too_large"
    assert "4,096 bytes" in caller.body["error"]["message"]


async def test_one_byte_over_the_limit_is_too_much(edge_app: ASGIApp) -> None:
    assert await Caller([body_of(EDGE_BODY_BYTES + 1)]).call(edge_app) == 413


async def test_a_body_that_is_declared_too_long_is_not_read_at_all(edge_app: ASGIApp) -> None:
    caller = Caller(in_pieces(body_of(EDGE_BODY_BYTES + 1), 1024))
    assert await caller.call(edge_app, content_length=str(EDGE_BODY_BYTES + 1)) == 413
    assert caller.read == 0


async def test_bytes_are_counted_whatever_was_declared(edge_app: ASGIApp) -> None:
    caller = Caller(in_pieces(body_of(100 * EDGE_BODY_BYTES), 1024))
    assert await caller.call(edge_app, content_length="10") == 413
    assert caller.read == 5


async def test_a_body_of_another_type_is_not_read_at_all(edge_app: ASGIApp) -> None:
    caller = Caller([body_of(1024)])
    assert await caller.call(edge_app, content_type="text/plain") == 415
    assert caller.read == 0


async def test_a_caller_who_hangs_up_breaks_nothing(edge_app: ASGIApp, caplog: pytest.LogCaptureFixture) -> None:
    caller = Caller([b'{"model": '], then={"type": "http.disconnect"})
    assert await caller.call(edge_app) == 499  # in the access log; the caller is gone
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_chunked_bodies_pass_through_a_client(edge_app: ASGIApp) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in in_pieces(body_of(EDGE_BODY_BYTES), 64):
            yield piece

    async with plain(edge_app) as http:
        response = await http.post("/v1/embeddings", content=pieces(), headers={"Content-Type": "application/json"})
    assert response.request.headers["transfer-encoding"] == "chunked"
    assert response.status_code == 200


@pytest.mark.parametrize("type", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
async def test_json_may_be_spelled_in_several_ways(edge_app: ASGIApp, type: str) -> None:
    assert await Caller([body_of(100)]).call(edge_app, content_type=type) == 200


# The other routes


@pytest.mark.parametrize("input", ["hello world", ["hello", tokens(300), "a much longer text, in words"]])
async def test_tokenize_counts_what_embeddings_bills(input: str | list[str]) -> None:
    async with plain(app_of()) as http:
        counted = (await http.post("/v1/tokenize", json={"model": ID, "input": input})).json()
        billed = (await http.post("/v1/embeddings", json={"model": ID, "input": input})).json()
    assert counted["usage"] == billed["usage"]
    assert sum(item["tokens"] for item in counted["data"]) == billed["usage"]["total_tokens"]
    assert (counted["object"], counted["model"]) == ("list", NAME)


async def test_tokenize_tells_of_each_text() -> None:
    async with plain(app_of()) as http:
        counted = await http.post("/v1/tokenize", json={"model": ID, "input": ["hello", tokens(300)]})
    assert counted.json()["data"] == [
        {"object": "token_count", "index": 0, "tokens": 3, "truncated": False},
        {"object": "token_count", "index": 1, "tokens": 256, "truncated": True},
    ]
    assert re.fullmatch(r"tokenize;dur=[\d.]+, total;dur=[\d.]+", counted.headers["server-timing"])


async def test_tokenize_counts_what_is_too_much_to_embed() -> None:
    async with plain(app_of(FakeModel(card(size_class=SizeClass.XL)))) as http:
        counted = await http.post("/v1/tokenize", json={"model": ID, "input": texts_of(32_769)})
    assert (counted.status_code, counted.json()["usage"]["total_tokens"]) == (200, 32_769)


def test_models_are_listed_by_id(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.created) == (ID, "sentence-transformers", CARD.created)
    assert model.model_extra == {
        "canonical_name": NAME,
        "task": "embed",
        "dimensions": 384,
        "max_tokens": 256,
        "input_types": [],
    }


@pytest.mark.parametrize("name", [ID, NAME, NAME.upper()])
def test_a_model_answers_under_the_name_that_was_asked_for(client: openai.OpenAI, name: str) -> None:
    model = client.models.retrieve(name)
    assert model.id == name
    assert model.model_extra is not None
    assert model.model_extra["canonical_name"] == NAME


@pytest.mark.parametrize("slash", ["/", "%2F", "%2f"])
async def test_the_slash_in_a_models_name_may_be_encoded(slash: str) -> None:
    async with plain(app_of()) as http:
        response = await http.get(f"/v1/models/{NAME.replace('/', slash)}")
    assert (response.status_code, response.json()["id"]) == (200, NAME)
    assert response.headers["x-model-fingerprint"] == CARD.fingerprint


async def test_health_answers_whatever_the_models_do() -> None:
    async with plain(app_of(loading={"bge-m3": 9.0})) as http:
        response = await http.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


async def test_ready_means_that_every_model_is() -> None:
    async with plain(app_of()) as http:
        ready = await http.get("/ready")
    async with plain(app_of(loading={"bge-m3": 9.0})) as http:
        waiting = await http.get("/ready")
    async with plain(app_over(FakeModels())) as http:
        empty = await http.get("/ready")
    one = {"state": "ready", "replicas": 1, "pending_sequences": 0}
    other = {"state": "loading", "replicas": 0, "pending_sequences": 0}
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "models": {ID: one}})
    assert (waiting.status_code, waiting.json()) == (503, {"status": "not_ready", "models": {ID: one, "bge-m3": other}})
    assert (empty.status_code, empty.json()) == (503, {"status": "not_ready", "models": {}})


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/openapi.json"])
async def test_every_response_has_one_request_id(path: str) -> None:
    async with plain(app_of()) as http:
        response = await http.get(path, headers={"X-Request-Id": "mine-8"})
    assert response.status_code == 200
    assert response.headers.get_list("x-request-id") == ["mine-8"]
    assert response.headers.get_list("server-timing")


async def test_the_openapi_page_shows_every_route_and_what_it_answers() -> None:
    async with plain(app_of()) as http:
        page = (await http.get("/openapi.json")).json()
    routes = {f"{method.upper()} {path}" for path, methods in page["paths"].items() for method in methods}
    assert routes == {
        "POST /v1/embeddings",
        "POST /v1/rerank",
        "POST /v1/tokenize",
        "GET /v1/models",
        "GET /v1/models/{id}",
        "GET /v1/usage",
        "GET /health",
        "GET /ready",
    }
    embeddings = page["paths"]["/v1/embeddings"]["post"]
    assert set(embeddings["responses"]) == {
        "200",
        "400",
        "401",
        "403",
        "404",
        "409",
        "413",
        "415",
        "429",
        "500",
        "503",
        "504",
    }
    assert "too_many_tokens" in embeddings["responses"]["400"]["description"]
    body = embeddings["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == {"model", "input", "encoding_format", "dimensions", "user", "input_type"}
    assert set(body["required"]) == {"model", "input"}


async def test_the_openapi_page_promises_no_answer_that_is_never_given() -> None:
    async with plain(app_of()) as http:
        page = (await http.get("/openapi.json")).json()
    promised = {
        status for methods in page["paths"].values() for route in methods.values() for status in route["responses"]
    }
    assert promised <= {"200", "400", "401", "403", "404", "409", "413", "415", "429", "500", "503", "504"}

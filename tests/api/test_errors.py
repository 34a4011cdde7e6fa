"""Every error that a caller can get: its status, its body, its headers, and never the caller's text."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import re
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx
import pytest
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor

from serve_app.api import build_app
from serve_app.books import Clerk
from serve_app.core import keys
from serve_app.core.catalog import SizeClass
from serve_app.core.errors import every_error
from serve_app.core.idempotency import Begin, ClaimStep, Outcome
from serve_app.core.truncation import Tokenized
from serve_app.dispatch import Unit, UnitReply
from serve_app.stores import StoreDown
from tests.service.fakes import (
    AUTHORIZATION,
    CAPPED_KEY,
    CARD,
    KEY,
    NARROW_KEY,
    DeskClerk,
    FakeModel,
    FakeModels,
    answers,
    bundled_tokenizer,
    card,
    never_answers,
    service_over,
    shared_store,
)

MARKER = "quixotic"  # stands in every text that is sent here
MODEL = CARD.id
MAX_BODY_BYTES = 1_000_000
FULL_QUEUE = 3  # requests: two units under way, one waiting

# The contract's error table, as far as the service can give these errors: code -> (status, type).
CONTRACT = {
    "invalid_json": (400, "invalid_request_error"),
    "missing_required_field": (400, "invalid_request_error"),
    "unknown_parameter": (400, "invalid_request_error"),
    "unsupported_parameter": (400, "invalid_request_error"),
    "invalid_input": (400, "invalid_request_error"),
    "too_many_inputs": (400, "invalid_request_error"),
    "too_many_tokens": (400, "invalid_request_error"),
    "invalid_idempotency_key": (400, "invalid_request_error"),
    "invalid_api_key": (401, "authentication_error"),
    "endpoint_not_allowed": (403, "permission_error"),
    "model_not_allowed": (403, "permission_error"),
    "plan_limit_exceeded": (403, "permission_error"),
    "model_not_found": (404, "not_found_error"),
    "route_not_found": (404, "not_found_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "idempotency_conflict": (409, "invalid_request_error"),
    "idempotency_in_progress": (409, "invalid_request_error"),
    "rate_limit_exceeded": (429, "rate_limit_error"),
    "request_too_large": (413, "invalid_request_error"),
    "unsupported_media_type": (415, "invalid_request_error"),
    "internal_error": (500, "api_error"),
    "model_loading": (503, "service_unavailable"),
    "at_capacity": (503, "service_unavailable"),
    "store_unavailable": (503, "service_unavailable"),
    "timeout": (504, "api_error"),
}

CAPPED = {"Authorization": f"Bearer {CAPPED_KEY}"}
NARROW = {"Authorization": f"Bearer {NARROW_KEY}"}


@dataclass(frozen=True, kw_only=True)
class World:
    """The service around a request. settings: of the ingress. before: a body that was answered, with the same headers.

    crowd: how many such requests came just before and are not answered yet.
    """

    model: Callable[[], FakeModel] = FakeModel
    loading: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    clerk: Callable[[], Clerk] = lambda: DeskClerk(shared_store())
    before: dict[str, Any] | None = None
    crowd: int = 0


EVERYDAY = World()


@dataclass(frozen=True, kw_only=True)
class Row:
    """A request, and the error that answers it. says: what the message must hold, as a regular expression."""

    title: str
    code: str
    body: bytes | dict[str, Any] | None = None
    param: str | None = None
    says: str = "."
    method: str = "POST"
    path: str = "/v1/embeddings"
    request_headers: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)  # of the response, besides those of every response
    resolved: bool = False  # the model was found before it went wrong
    world: World = EVERYDAY


def asking(input: Any, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": input} | fields


def in_words(tokens: int) -> str:
    """A text of exactly so many tokens."""
    words = [MARKER, *["the"] * tokens]
    excess = bundled_tokenizer(10_000)([" ".join(words)]).packed.tokens - tokens
    return " ".join(words[: len(words) - excess])


async def cannot_tokenize(texts: Sequence[str]) -> Tokenized:
    raise ValueError(f"cannot tokenize {texts[0]!r}")


async def never_tokenizes(texts: Sequence[str]) -> Tokenized:
    await asyncio.Event().wait()
    raise AssertionError("somebody set an event that nobody holds")


async def cannot_encode(unit: Unit) -> UnitReply:
    text = bundled_tokenizer()._tokenizer.decode(unit.packed.ids.tolist())
    assert MARKER in text
    raise RuntimeError(f"cannot encode {text!r}")


def in_a_full_queue() -> FakeModel:
    return FakeModel(card(unit_tokens=64), send=never_answers, max_pending_tokens=100)


class OutOfOrder:
    """See `books.Clerk`."""

    async def run(self, step: ClaimStep) -> Outcome:
        raise StoreDown(f"no {MARKER}")

    async def wait(self, step: Begin, wait_s: float) -> Outcome:
        raise StoreDown(f"no {MARKER}")


NO_KEY = {"Authorization": ""}
HELLO = asking(f"hello {MARKER}", user=f"user {MARKER}")
DEEP = 990
TABLE = [
    # 400 invalid_json
    Row(title="an empty body", code="invalid_json", body=b"", says="not valid JSON"),
    Row(title="half a body", code="invalid_json", body=json.dumps(HELLO).encode()[:-1], says="not valid JSON"),
    Row(title="an array", code="invalid_json", body=json.dumps([HELLO]).encode(), says="must be a JSON object"),
    Row(title="Latin-1", code="invalid_json", body=f'{{"input": "{MARKER} \xe9"}}'.encode("latin-1"), says="UTF-8"),
    Row(title="not a number", code="invalid_json", body=b'{"model": NaN, "input": "%b"}' % MARKER.encode()),
    Row(
        title="a key twice",
        code="invalid_json",
        body=f'{{"model": "{MODEL}", "input": "{MARKER}", "input": "b"}}'.encode(),
        says="key 'input' stands in the body twice",
    ),
    Row(
        title="a key twice, spelled in two ways",
        code="invalid_json",
        body=f'{{"model": "{MODEL}", "input": "{MARKER}", "inp\\u0075t": "b"}}'.encode(),
        says="key 'input' stands in the body twice",
    ),
    Row(title="brackets without end", code="invalid_json", body=b'{"input":' + b"[" * 50_000),
    Row(
        title="brackets too deep",
        code="invalid_json",
        body=b'{"model":"input","input":"%b","user":%b}' % (MARKER.encode(), b"[" * 1_010 + b"]" * 1_010),
    ),
    # 400 missing_required_field
    Row(title="no fields", code="missing_required_field", body={}, param="model", says="'model' is required"),
    Row(title="no model", code="missing_required_field", body={"input": MARKER}, param="model"),
    Row(title="no input", code="missing_required_field", body={"model": MODEL}, param="input"),
    Row(
        title="no model, and a field too many",
        code="missing_required_field",
        body={"input": MARKER, "modle": MODEL},
        param="model",
    ),
    # 400 unknown_parameter
    Row(
        title="a misspelled field",
        code="unknown_parameter",
        body=asking(MARKER, dimension=384),
        param="dimension",
        says="no parameter 'dimension' here. Did you mean 'dimensions'",
    ),
    Row(title="a strange field", code="unknown_parameter", body=asking(MARKER, zzz=MARKER), param="zzz"),
    Row(
        title="a field that is not a name",
        code="unknown_parameter",
        body=asking(MARKER, **{"<b>?": MARKER}),
        param=None,
        says="no parameter of that name here",
    ),
    Row(
        title="a field of the other route",
        code="unknown_parameter",
        path="/v1/tokenize",
        body=asking(MARKER, encoding_format="float"),
        param="encoding_format",
    ),
    Row(
        title="an unknown field, nested deep",
        code="unknown_parameter",
        body=b'{"model":"input","input":"%b","x":%b}' % (MARKER.encode(), b"[" * DEEP + b"]" * DEEP),
        param="x",
    ),
    # 400 unsupported_parameter
    Row(
        title="dimensions that the model lacks",
        code="unsupported_parameter",
        body=asking(MARKER, dimensions=1024),
        param="dimensions",
        says="all-MiniLM-L6-v2 has no 1,024 dimensions; it has: 128, 384",
        resolved=True,
    ),
    *(
        Row(
            title=f"dimensions {dimensions!r}",
            code="unsupported_parameter",
            body=asking(MARKER, dimensions=dimensions),
            param="dimensions",
            says="positive integer",
        )
        for dimensions in (0, -1, 384.5, "384", MARKER, True, [384], 2**70)
    ),
    *(
        Row(
            title=f"encoding_format {encoding!r}",
            code="unsupported_parameter",
            body=asking(MARKER, encoding_format=encoding),
            param="encoding_format",
            says="'float' or 'base64'",
        )
        for encoding in ("int8", "Base64", MARKER, 1, ["float"])
    ),
    *(
        Row(
            title=f"token ids {ids!r} to {path}",
            code="unsupported_parameter",
            path=path,
            body=asking(ids),
            param="input",
            says="check_embedding_ctx_length=False",
        )
        for ids in ([101, 7592, 102], [[101, 102], [7592]])
        for path in ("/v1/embeddings", "/v1/tokenize")
    ),
    # 400 invalid_input
    Row(title="an empty string", code="invalid_input", body=asking(""), param="input", says="empty string"),
    Row(title="an empty array", code="invalid_input", body=asking([]), param="input", says="empty array"),
    Row(title="no string or array", code="invalid_input", body=asking({"text": MARKER}), param="input"),
    Row(title="input null", code="invalid_input", body=asking(None), param="input"),
    Row(title="an empty item", code="invalid_input", body=asking([MARKER, "a", ""]), param="input[2]"),
    Row(title="a number among strings", code="invalid_input", body=asking([MARKER, 5]), param="input[1]"),
    Row(title="a string among numbers", code="invalid_input", body=asking([5, MARKER]), param="input[0]"),
    Row(title="a null item", code="invalid_input", body=asking([MARKER, None]), param="input[1]", says="not a string"),
    Row(title="an array in an array", code="invalid_input", body=asking([[MARKER]]), param="input[0]"),
    Row(title="a boolean", code="invalid_input", body=asking([True]), param="input[0]"),
    Row(title="NUL", code="invalid_input", body=asking(f"{MARKER}\0"), param="input", says=r"U\+0000"),
    Row(title="NUL in an item", code="invalid_input", body=asking(["a", f"{MARKER}\0"]), param="input[1]"),
    Row(
        title="half a character",
        code="invalid_input",
        body=f'{{"model": "{MODEL}", "input": "{MARKER}\\ud83d"}}'.encode(),
        param="input",
        says="lone surrogate",
    ),
    Row(
        title="half a character in an item",
        code="invalid_input",
        body=f'{{"model": "{MODEL}", "input": ["a", "{MARKER}\\ud83d"]}}'.encode(),
        param="input[1]",
        says="lone surrogate",
    ),
    Row(title="a long user", code="invalid_input", body=asking(MARKER, user="u" * 257), param="user", says="256"),
    Row(title="a user that is no string", code="invalid_input", body=asking(MARKER, user=7), param="user"),
    Row(title="a model that is no string", code="invalid_input", body={"model": 7, "input": MARKER}, param="model"),
    # 400 limits of the model's class
    Row(
        title="one string too many",
        code="too_many_inputs",
        body=asking([MARKER] * 2049),
        param="input",
        says="2,049 inputs; sentence-transformers/all-MiniLM-L6-v2 takes at most 2,048",
        resolved=True,
    ),
    Row(
        title="strings too many to look at",
        code="too_many_inputs",
        body=asking([MARKER] * 2049 + [None]),
        param="input",
        says="2,050 inputs",
        resolved=True,
    ),
    Row(
        title="one string too many to count",
        code="too_many_inputs",
        path="/v1/tokenize",
        body=asking([MARKER] * 257),
        param="input",
        says="257 inputs; .* at most 256",
        resolved=True,
        world=World(model=lambda: FakeModel(card(size_class=SizeClass.XL))),
    ),
    Row(
        title="one token too many",
        code="too_many_tokens",
        body=asking([in_words(256)] * 127 + [in_words(200), in_words(57)]),
        param="input",
        says="32,769 tokens; sentence-transformers/all-MiniLM-L6-v2 takes at most 32,768",
        resolved=True,
        world=World(model=lambda: FakeModel(card(size_class=SizeClass.XL))),
    ),
    Row(
        title="an idempotency key of nothing",
        code="invalid_idempotency_key",
        body=HELLO,
        request_headers={"Idempotency-Key": ""},
        says="1 to 255 printable ASCII",
        resolved=True,
    ),
    # 401
    *(
        Row(title=f"{title} API key", code="invalid_api_key", body=HELLO, request_headers={"Authorization": header})
        for title, header in {
            "no": "",
            "half an": f"Bearer {KEY[:-1]}",
            "an unknown": f"Bearer {keys.mint(bytes(32))}",
            "an API key of another scheme, not a bearer's": f"Basic {KEY}",
        }.items()
    ),
    Row(title="no key on a path that is not there", path="/v1/nothing", code="invalid_api_key", request_headers=NO_KEY),
    # 409, and the quota's 429
    Row(
        title="an idempotency key of another request",
        code="idempotency_conflict",
        body=HELLO,
        request_headers={"Idempotency-Key": "UNIQUE"},
        says="used for another request",
        headers={"x-should-retry": "false"},
        resolved=True,
        world=World(before=asking("another text")),
    ),
    Row(
        title="an idempotency key whose first call still runs",
        code="idempotency_in_progress",
        body=HELLO,
        request_headers={"Idempotency-Key": "UNIQUE"},
        headers={"retry-after": "15"},
        resolved=True,
        world=World(model=lambda: FakeModel(send=never_answers), settings={"duplicate_wait_s": 0.0}, crowd=1),
    ),
    Row(
        title="more replies than a workspace may keep",
        code="rate_limit_exceeded",
        body=HELLO,
        request_headers={"Idempotency-Key": "UNIQUE"},
        says="kept for this workspace's replays",
        headers={"retry-after": "60"},
        resolved=True,
        world=World(settings={"replay_records": 0}),
    ),
    # 403
    *(
        Row(
            title=f"a cap that is reached, {title}",
            code="plan_limit_exceeded",
            body=HELLO,
            says="has spent the 0 US dollars",
            request_headers=CAPPED | headers,
            resolved=True,
        )
        for title, headers in {"without a key": {}, "with one": {"Idempotency-Key": "UNIQUE"}}.items()
    ),
    Row(
        title="an endpoint outside of the key's",
        code="endpoint_not_allowed",
        path="/v1/tokenize",
        body=HELLO,
        request_headers=NARROW,
    ),
    Row(
        title="a model outside of the key's",
        code="model_not_allowed",
        body=HELLO,
        param="model",
        says="all-MiniLM-L6-v2",
        request_headers=NARROW,
    ),
    # 404, 405
    Row(
        title="an unknown model",
        code="model_not_found",
        body={"model": "all-MiniLM-L6-v3", "input": MARKER},
        param="model",
        says="no model 'all-MiniLM-L6-v3' here. Did you mean 'all-minilm-l6-v2'",
    ),
    Row(
        title="an unknown model that is not a name",
        code="model_not_found",
        body={"model": f"say {MARKER}", "input": MARKER},
        param="model",
        says="no model of that name here",
    ),
    Row(title="no name of a model", code="model_not_found", body={"model": "", "input": MARKER}, param="model"),
    Row(
        title="an unknown model to count for",
        code="model_not_found",
        path="/v1/tokenize",
        body={"model": "gpt", "input": MARKER},
        param="model",
    ),
    Row(
        title="an unknown model to look at", code="model_not_found", method="GET", path="/v1/models/gpt", param="model"
    ),
    Row(
        title="an unknown model with a slash",
        code="model_not_found",
        method="GET",
        path="/v1/models/BAAI%2Fbge-m3",
        param="model",
        says="'BAAI/bge-m3'",
    ),
    Row(title="an unknown path", code="route_not_found", method="GET", path="/v2/models", says="/openapi.json"),
    Row(title="the root", code="route_not_found", method="GET", path="/"),
    Row(title="a slash too many", code="route_not_found", path="/v1/embeddings/", body=HELLO),
    Row(
        title="GET where POST is right",
        code="method_not_allowed",
        method="GET",
        says="takes: POST",
        headers={"allow": "POST"},
    ),
    Row(
        title="POST where GET is right",
        code="method_not_allowed",
        path="/v1/models",
        body=HELLO,
        says="takes: GET",
        headers={"allow": "GET"},
    ),
    Row(
        title="DELETE of a model",
        code="method_not_allowed",
        method="DELETE",
        path=f"/v1/models/{MODEL}",
        headers={"allow": "GET"},
    ),
    # 413, 415
    Row(
        title="a body over the limit",
        code="request_too_large",
        body=asking(MARKER + " " * MAX_BODY_BYTES),
        says="1,000,000 bytes",
        headers={"connection": "close"},
    ),
    Row(
        title="a body that says it is over the limit",
        code="request_too_large",
        body=HELLO,
        request_headers={"Content-Length": str(MAX_BODY_BYTES + 1)},
        headers={"connection": "close"},
    ),
    Row(
        title="a body that says it is beyond all limits",
        code="request_too_large",
        body=HELLO,
        request_headers={"Content-Length": "9" * 5000},
        headers={"connection": "close"},
    ),
    Row(
        title="no type",
        code="unsupported_media_type",
        body=json.dumps(HELLO).encode(),
        request_headers={"Content-Type": ""},
        says="Content-Type: application/json",
    ),
    Row(title="a form", code="unsupported_media_type", body=HELLO, request_headers={"Content-Type": "text/plain"}),
    Row(
        title="a compressed body",
        code="unsupported_media_type",
        body=HELLO,
        request_headers={"Content-Encoding": "gzip"},
        says="Content-Encoding",
    ),
    Row(
        title="a form to count",
        code="unsupported_media_type",
        path="/v1/tokenize",
        body=HELLO,
        request_headers={"Content-Type": "application/x-www-form-urlencoded"},
    ),
    # 500, 503, 504
    Row(
        title="a tokenizer that breaks",
        code="internal_error",
        body=HELLO,
        says="on our side",
        resolved=True,
        world=World(model=lambda: FakeModel(tokenize=cannot_tokenize)),
    ),
    Row(
        title="an encoder that breaks",
        code="internal_error",
        body=HELLO,
        says="failed on this request",
        resolved=True,
        world=World(model=lambda: FakeModel(send=cannot_encode)),
    ),
    Row(
        title="a model that loads",
        code="model_loading",
        body={"model": "bge-m3", "input": MARKER},
        param="model",
        says="'bge-m3' is loading",
        headers={"retry-after": "7"},
        world=World(loading={"bge-m3": 6.2}),
    ),
    Row(
        title="a model that loads for an hour",
        code="model_loading",
        body={"model": "bge-m3", "input": MARKER},
        param="model",
        headers={"retry-after": "120"},
        world=World(loading={"bge-m3": 3600}),
    ),
    Row(
        title="a model that has nearly loaded",
        code="model_loading",
        path="/v1/tokenize",
        body={"model": "bge-m3", "input": MARKER},
        param="model",
        headers={"retry-after": "1"},
        world=World(loading={"bge-m3": 0.0}),
    ),
    Row(
        title="a model to look at that loads",
        code="model_loading",
        method="GET",
        path="/v1/models/bge-m3",
        param="model",
        headers={"retry-after": "7"},
        world=World(loading={"bge-m3": 6.2}),
    ),
    Row(
        title="a queue that is full",
        code="at_capacity",
        body=asking(in_words(70)),
        says="70 tokens wait for this model; .* more than 100",
        headers={"retry-after": "1"},
        resolved=True,
        world=World(model=in_a_full_queue, crowd=FULL_QUEUE),
    ),
    Row(
        title="a store that does not answer",
        code="store_unavailable",
        body=HELLO,
        request_headers={"Idempotency-Key": "UNIQUE"},
        headers={"retry-after": "1"},
        resolved=True,
        world=World(clerk=OutOfOrder, settings={"patience_s": 0.05}),
    ),
    Row(
        title="an encoder that does not answer",
        code="timeout",
        body=HELLO,
        says=r"No answer within 0\.05 s",
        resolved=True,
        world=World(model=lambda: FakeModel(send=never_answers), settings={"request_timeout_s": 0.05}),
    ),
    Row(
        title="a tokenizer that does not answer",
        code="timeout",
        path="/v1/tokenize",
        body=asking(f"hello {MARKER}"),
        resolved=True,
        world=World(model=lambda: FakeModel(tokenize=never_tokenizes), settings={"request_timeout_s": 0.05}),
    ),
]


@asynccontextmanager
async def served(world: World) -> AsyncIterator[tuple[httpx.AsyncClient, FakeModel]]:
    model = world.model()
    service = service_over(FakeModels(model, loading=world.loading), clerk=world.clerk(), **world.settings)
    app = build_app(service, max_body_bytes=MAX_BODY_BYTES)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test", headers=AUTHORIZATION
    ) as client:
        yield client, model


async def send(client: httpx.AsyncClient, row: Row, unique: str, body: Any = None) -> httpx.Response:
    """unique: what `UNIQUE` stands for in the row's headers."""
    body = body or row.body
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    headers = {"Content-Type": "application/json", "X-Request-Id": "request-of-a-test", **row.request_headers}
    headers = {name: value.replace("UNIQUE", unique) for name, value in headers.items()}
    return await client.request(row.method, row.path, content=body, headers=headers)


async def answer_to(row: Row) -> httpx.Response:
    unique = f"{MARKER}-{uuid.uuid4().hex}"
    async with served(row.world) as (client, model):
        if row.world.before:
            assert (await send(client, row, unique, row.world.before)).status_code == 200
        crowd = [asyncio.create_task(send(client, row, unique)) for _ in range(row.world.crowd)]
        for _ in range(1000):
            if model.dispatcher.pending_sequences == row.world.crowd:
                break
            await asyncio.sleep(0.001)
        response = await send(client, row, unique)
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
    return response


every_row = pytest.mark.parametrize("row", [pytest.param(row, id=row.title) for row in TABLE])


@every_row
async def test_an_error_has_its_status_its_code_and_a_message_that_says_what_was_wrong(row: Row) -> None:
    response = await answer_to(row)
    status, type = CONTRACT[row.code]
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"], error["param"]) == (status, type, row.code, row.param)
    assert re.search(row.says, error["message"])
    assert response.json() == {"error": {key: error[key] for key in ("message", "type", "param", "code")}}
    assert response.headers["content-type"] == "application/json"


@every_row
async def test_an_error_has_its_headers_and_each_once(row: Row) -> None:
    response = await answer_to(row)
    assert response.headers.get_list("x-request-id") == ["request-of-a-test"]
    assert len(response.headers.get_list("server-timing")) == 1
    assert re.search(r"\btotal;dur=\d+\.\d\d$", response.headers["server-timing"])
    assert response.headers.get_list("x-model-fingerprint") == [CARD.fingerprint] * row.resolved
    for name in ("retry-after", "allow", "connection", "x-should-retry"):
        assert response.headers.get_list(name) == ([row.headers[name]] if name in row.headers else [])


@every_row
async def test_an_error_never_repeats_the_text_to_the_caller_or_to_the_log(
    row: Row, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    response = await answer_to(row)
    answered, logged = response.text + str(response.headers), caplog.text + str([vars(it) for it in caplog.records])
    assert MARKER not in (answered + logged).lower()
    assert KEY[12:] not in answered + logged


def test_the_table_holds_every_error_there_is() -> None:
    assert {row.code for row in TABLE} == {kind.code for kind in every_error()}
    assert {kind.code: (kind.status, kind.type) for kind in every_error()} == CONTRACT


def test_no_two_errors_share_a_code() -> None:
    codes = [kind.code for kind in every_error()]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("title", ["a tokenizer that breaks", "an encoder that breaks"])
async def test_what_broke_is_in_the_log_by_type_and_place(title: str, caplog: pytest.LogCaptureFixture) -> None:
    (row,) = (row for row in TABLE if row.title == title)
    await answer_to(row)
    assert re.search("ValueError|RuntimeError", caplog.text)
    assert re.search("in cannot_tokenize|in cannot_encode", caplog.text)


async def test_an_unhandled_exception_is_logged_under_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    (row,) = (row for row in TABLE if row.title == "a tokenizer that breaks")
    await answer_to(row)
    assert "request request-of-a-test: ValueError" in caplog.text


async def test_telemetry_that_an_operator_turns_on_does_not_carry_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """FastAPI, for one, hands unhandled exceptions to OpenTelemetry's logs, in the exception's own words."""
    records = InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]
    provider = LoggerProvider()
    provider.add_log_record_processor(SimpleLogRecordProcessor(records))
    monkeypatch.setattr("opentelemetry._logs._internal._LOGGER_PROVIDER", provider)  # can be set but once, really
    (row,) = (row for row in TABLE if row.title == "a tokenizer that breaks")
    await answer_to(row)
    logged = [data.log_record for data in records.get_finished_logs()]
    assert MARKER not in str([(record.body, record.attributes) for record in logged])


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"model": "unknown", "input": "", "dimensions": 7}, "invalid_input"),
        ({"model": "unknown", "input": ["a"] * 2049, "dimensions": 7}, "model_not_found"),
        ({"model": MODEL, "input": ["a"] * 2049, "dimensions": 7}, "unsupported_parameter"),
        ({"model": MODEL, "input": ["the " * 100] * 2049}, "too_many_inputs"),
    ],
    ids=["the body first", "then the model", "then its dimensions", "then its strings, before its tokens"],
)
async def test_the_first_thing_wrong_decides(body: dict[str, Any], code: str) -> None:
    async with served(EVERYDAY) as (client, _):
        response = await client.post("/v1/embeddings", json=body)
    assert response.json()["error"]["code"] == code


async def test_a_failed_request_leaves_nothing_in_the_queue() -> None:
    world = World(model=lambda: FakeModel(send=never_answers), settings={"request_timeout_s": 0.05})
    async with served(world) as (client, model):
        assert (await client.post("/v1/embeddings", json=HELLO)).status_code == 504
        assert model.dispatcher.pending_sequences == 0


async def test_one_request_that_breaks_the_encoder_does_not_fail_its_neighbours() -> None:
    async def dislikes_one_text(unit: Unit) -> UnitReply:
        await asyncio.sleep(0.01)  # time for the others to get into one unit
        if MARKER in bundled_tokenizer()._tokenizer.decode(unit.packed.ids.tolist()):
            raise RuntimeError("disliked")
        return await answers(unit)

    async with served(World(model=lambda: FakeModel(send=dislikes_one_text))) as (client, model):
        texts = ["one", "two", "three", MARKER, "five", "six"]
        responses = await asyncio.gather(*(client.post("/v1/embeddings", json=asking(text)) for text in texts))
    assert [response.status_code for response in responses] == [200, 200, 200, 500, 200, 200]
    assert max(len(unit.packed.lengths) for unit in model.units) > 1


async def test_many_unknown_fields_are_not_looked_at_one_by_one() -> None:
    """While one body is read, every other request of this process waits."""

    async def calls(unknown_fields: int) -> int:
        body = json.dumps(asking(MARKER) | {f"field-{number}": 0 for number in range(unknown_fields)}).encode()
        headers = {"Content-Type": "application/json"}
        async with served(EVERYDAY) as (client, _):
            counted = itertools.count()
            sys.setprofile(lambda _frame, event, _arg: next(counted) if event.endswith("call") else None)
            try:
                response = await client.post("/v1/embeddings", content=body, headers=headers)
            finally:
                sys.setprofile(None)
        assert response.json()["error"]["code"] == "unknown_parameter"
        return next(counted)

    assert await calls(20_000) - await calls(1) < 2_000

"""Nobody gets in without a key, on whatever path and with whatever method; and nothing administrative is inside."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, cast
from urllib.parse import unquote_to_bytes

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import Message

from serve_app.api import ALIASES, OPEN, Edge, build_app
from serve_app.core import keys
from serve_app.stores import Store
from tests.service.fakes import AUTHORIZATION, CARD, KEY, FakeModel, FakeModels, service_over, shared_store

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY", "get", "BREW")
API = {
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{id:path}"),
    ("GET", "/v1/usage"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/rerank"),
    ("POST", "/v1/tokenize"),
}
# What only `serve-app` may do: see `stores.Store`.
ADMINISTRATION = {
    "add_workspace",
    "put_workspace",
    "put_key",
    "put_reservation",
    "advance",
    "bury",
    "trim",
    "purge",
    "workspaces",
}


def app_over(store: Store | None = None) -> Edge:
    return build_app(service_over(FakeModels(FakeModel()), store=store), max_body_bytes=10_000)


def inner(edge: Edge) -> Starlette:
    return cast(Starlette, edge.app)


async def ask(
    app: Edge, method: str, target: str, headers: Sequence[tuple[str, str]] = (), body: bytes = b""
) -> tuple[int, bytes]:
    """Status and body. target: as it stands in the request line; a client library would tidy it up."""
    path, _, query = target.partition("?")
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote_to_bytes(path).decode("utf-8", "replace"),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
        "client": ("192.0.2.1", 1),
        "server": ("192.0.2.2", 80),
    }
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def paths_of(routes: Sequence[Any], prefix: str = "") -> Iterator[str]:
    """Of a route table, what a mount holds included, with something in each parameter's place."""
    for route in routes:
        path = prefix + getattr(route, "path", "")
        yield path.replace("{id:path}", "x").replace("{path:path}", "x")
        if isinstance(route, Mount):
            yield from paths_of(route.routes, path)


async def check_closed(app: Edge, path: str) -> None:
    for method in METHODS:
        for headers in ([], [("Authorization", f"Bearer {KEY[:-1]}")], [("X-Api-Key", KEY)], [("Cookie", KEY)]):
            status, body = await ask(app, method, path, headers)
            assert status == 401, f"{method} {path} {headers}"
            assert json.loads(body)["error"]["code"] == "invalid_api_key"


async def test_every_route_of_the_table_is_closed_but_two() -> None:
    app = app_over()
    paths = set(paths_of(inner(app).routes))
    assert paths > OPEN
    for path in sorted(paths - OPEN):
        await check_closed(app, path)
    assert {"/health", "/ready"} == OPEN
    for path in OPEN:
        assert (await ask(app, "GET", path))[0] == 200


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "",
        "*",
        "//v1/models",
        "/v1//models",
        "/v1/models/",
        "/V1/models",
        "/v1/models;x=/health",
        "/v1/models?path=/health",
        "/v1/models#/health",
        "/v1/models%00",
        "/v1/models%2f",
        "/v1/models/..%2f..%2fhealth",
        "/v1/../health",
        "/v1/%2e%2e/health",
        "/%2e/health",
        "/./health",
        "/health/",
        "/health/.",
        "/health/../v1/models",
        "/health%2f..%2fv1%2fmodels",
        "/health%00",
        "/health%20",
        "/health%0a",
        "/health;",
        "/health.json",
        "/Health",
        "/HEALTH",
        "/ready/",
        "/ready/x",
        "/READY",
        "//health",
        "/\\health",
        "/he%61lth%2f",
        "http://test/health",
        *ALIASES,
        "/docs",
        "/redoc",
        "/openapi.yaml",
        "/metrics",
        "/admin",
        "/-/routes",
        "/v1/keys",
        "/.env",
        "/%ff%fe",
        "/" + "x" * 10_000,
    ],
)
async def test_a_path_that_looks_like_an_open_one_is_closed(target: str) -> None:
    await check_closed(app_over(), target)


async def test_what_is_added_later_without_a_decision_is_closed() -> None:
    app = app_over()

    async def later(_: Request) -> Response:
        return Response("inside")

    added = ["/later", "/health/details", "/v2/later", "/mounted/deep"]
    inner(app).routes.extend(Route(path, later) for path in added[:3])
    inner(app).routes.append(Mount("/mounted", routes=[Route("/deep", later)]))
    assert set(added) <= set(paths_of(inner(app).routes))
    for path in added:
        await check_closed(app, path)
        assert await ask(app, "GET", path, [*AUTHORIZATION.items()]) == (200, b"inside")


async def test_a_key_opens_under_one_header_only() -> None:
    app = app_over()
    for method, path in sorted(it for it in API if it[0] == "GET"):
        path = path.replace("{id:path}", CARD.id)
        assert (await ask(app, method, path, [*AUTHORIZATION.items()]))[0] == 200
    two = [("Authorization", "Bearer x"), ("Authorization", f"Bearer {KEY}")]
    assert (await ask(app, "GET", "/v1/models", two))[0] == 401
    assert (await ask(app, "GET", f"/v1/models?api_key={KEY}"))[0] == 401


# Administration


def test_the_api_is_these_routes_and_no_other() -> None:
    table = {
        (method, getattr(route, "path", None))
        for route in inner(app_over()).routes
        for method in getattr(route, "methods", None) or {"ANY"}
    }
    assert table == API


@pytest.mark.parametrize("noun", ["workspaces", "workspace", "keys", "key", "plans", "ledger", "limits", "admin"])
async def test_no_route_administers_anything(noun: str) -> None:
    app = app_over()
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        for path in (f"/{noun}", f"/v1/{noun}", f"/v1/{noun}/ws_test", f"/admin/{noun}", f"/v1/organization/{noun}"):
            assert (await ask(app, method, path, [*AUTHORIZATION.items()]))[0] == 404


class Watched:
    """A store that tells what was asked of it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.asked: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.asked.add(name)
        return getattr(self._store, name)


async def test_no_request_reaches_what_the_command_does_to_the_store() -> None:
    store = Watched(shared_store())
    app = app_over(cast(Store, store))
    headers = [*AUTHORIZATION.items(), ("Content-Type", "application/json"), ("Idempotency-Key", keys.digest("once"))]
    body = json.dumps({"model": CARD.id, "input": "hello"}).encode()
    for _, path in sorted(API):
        for method in METHODS:
            await ask(app, method, path.replace("{id:path}", CARD.id), headers, body)
    assert {"find_key", "run", "usage"} <= store.asked, "else the requests did nothing"
    assert not store.asked & ADMINISTRATION

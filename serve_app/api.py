"""HTTP: routes, headers, and every error in one shape. No Ray; the same app answers under a test client.

Bodies go to `service.py` as bytes and come back as bytes; the models of `core/schema.py` are here for the OpenAPI page.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from serve_app import tracing
from serve_app.access import HUNG_UP, Access, Log
from serve_app.core import schema
from serve_app.core.errors import (
    InternalError,
    MethodNotAllowed,
    RequestTooLarge,
    RouteNotFound,
    ServiceError,
    UnsupportedMediaType,
    every_error,
)
from serve_app.core.metrics import IngressMetrics
from serve_app.core.settings import LogLevel
from serve_app.service import Call, Service
from serve_app.throttle import Standing

logger = logging.getLogger(__name__)

MODEL_ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}

IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "Makes retries safe for 24 hours from the first success: the same answer, computed and billed once.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
}
DAY: dict[str, Any] = {"type": "string", "format": "date"}
GROUP_BY: dict[str, Any] = {"type": "array", "items": {"enum": schema.GROUPS}, "minItems": 1, "uniqueItems": True}
USAGE_QUERY: list[dict[str, Any]] = [
    {"name": "from", "in": "query", "description": "Day, UTC. Default: the first of the month of `to`.", "schema": DAY},
    {"name": "to", "in": "query", "description": "Day, UTC. Default: today.", "schema": DAY},
    {"name": "group_by", "in": "query", "style": "form", "explode": False, "schema": GROUP_BY},
]
ALIASES = {"/v2/rerank": "/v1/rerank"}  # where Cohere's newer client looks; one route, whichever way it is called
OPEN = frozenset({"/health", "/ready"})  # whatever is not named here asks for a key, routes that come later included
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")  # what a caller may choose: it goes into logs and the ledger
SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
CORS_REQUEST_HEADERS = ("Authorization", "Cache-Control", "Content-Type", "Idempotency-Key", "X-Request-Id")
CORS_RESPONSE_HEADERS = (
    "Idempotent-Replayed",
    "Retry-After",
    "retry-after-ms",
    "Server-Timing",
    "X-Model-Fingerprint",
    *(f"X-RateLimit-{name}{suffix}" for suffix in ("", "-Tokens") for name in ("Limit", "Remaining", "Reset")),
    "X-Request-Id",
)

Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


def build_app(
    service: Service,
    *,
    max_body_bytes: int,
    cors_origins: Sequence[str] = (),
    lifespan: Lifespan | None = None,
    metrics: IngressMetrics | None = None,
    log: Log | None = None,
    log_from: LogLevel = "info",
) -> Edge:
    """The whole HTTP side of the service. cors_origins: of web pages that may call it. log: takes a line a request."""
    documented = _documented_app()
    routes = [_undocumented(route) for route in documented.routes]
    app = Starlette(
        routes=routes,
        exception_handlers={
            HTTPException: _unrouted,
            ServiceError: _refused,
            ClientDisconnect: _gone,
            Exception: _broken,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    app.state.max_body_bytes = max_body_bytes
    app.state.openapi = functools.cache(functools.partial(_openapi, documented))
    paths = [route.path for route in routes]
    access = Access(metrics or IngressMetrics(), paths, log=log, log_from=log_from, unlogged=OPEN)
    return Edge(app, service, access, cors_origins)


def _undocumented(route: BaseRoute) -> Route:
    """The same without FastAPI, which would look for dependencies in each request: a tenth of an ingress's time."""
    assert isinstance(route, APIRoute)
    plain = Route(route.path, route.endpoint)
    plain.methods = route.methods  # said to Route, HEAD would be added to GET
    return plain


def _documented_app() -> FastAPI:
    """What the OpenAPI page is made of: it answers nothing itself."""
    app = FastAPI(
        title="Embeddings",
        summary="OpenAI-compatible embeddings, many models behind one address.",
        version="1",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    embeddings_route = _documented(
        schema.EmbeddingsResponse,
        *(400, 404, 409, 429, 504),
        bodies=(schema.EmbeddingsRequest,),
        parameters=[IDEMPOTENCY_KEY],
    )
    rerank_route = _documented(
        schema.RerankResponse,
        *(400, 404, 409, 429, 504),
        bodies=(schema.RerankRequest,),
        parameters=[IDEMPOTENCY_KEY],
    )
    tokenize_route = _documented(
        schema.TokenizeResponse, 400, 404, 429, 504, bodies=(schema.TokenizeRequest, schema.TokenizePairsRequest)
    )
    app.post("/v1/embeddings", **embeddings_route)(embeddings)
    app.post("/v1/rerank", **rerank_route)(rerank)
    app.post("/v1/tokenize", **tokenize_route)(tokenize)
    app.get("/v1/models", **_documented(schema.ModelList))(list_models)
    app.get("/v1/models/{id:path}", **_documented(schema.Model, 404, parameters=[MODEL_ID]))(retrieve_model)
    app.get("/v1/usage", **_documented(schema.UsageReport, 400, 429, parameters=USAGE_QUERY))(usage)
    app.get("/health", **_documented(schema.Health, open=True))(health)
    app.get("/ready", **_documented(schema.Readiness, open=True, also={503: schema.Readiness}))(ready)
    app.get("/openapi.json", include_in_schema=False)(openapi)
    return app


async def embeddings(request: Request) -> Response:
    """One vector per text, L2-normalised, in the order of `input`."""
    service = _service(request)
    async with service.deadline(_call(request).read_timeout_s):
        return _json(await service.embed(_call(request), await _body(request)))


async def rerank(request: Request) -> Response:
    """One score per document, and the documents in its order, best first. `/v2/rerank` is the same route."""
    service = _service(request)
    async with service.deadline(_call(request).read_timeout_s):
        return _json(await service.rerank(_call(request), await _body(request)))


async def tokenize(request: Request) -> Response:
    """The tokens that `/v1/embeddings` or `/v1/rerank` would bill for the same input. Free."""
    service = _service(request)
    async with service.deadline(_call(request).read_timeout_s):
        return _json(await service.tokenize(_call(request), await _body(request)))


async def list_models(request: Request) -> Response:
    """The models that answer right now. Free."""
    return _json(_service(request).list_models(_call(request)))


async def retrieve_model(request: Request) -> Response:
    """One model, by short id or canonical name (`BAAI%2Fbge-m3`). Free."""
    return _json(_service(request).retrieve_model(_call(request), request.path_params["id"]))


async def usage(request: Request) -> Response:
    """What your workspace used, by day, model or key. Free."""
    return _json(await _service(request).usage(_call(request), request.query_params))


async def health(request: Request) -> Response:
    """Liveness: this process answers."""
    return _json({"status": "ok"})


async def ready(request: Request) -> Response:
    """Readiness: every deployed model answered its self-test."""
    readiness = _service(request).readiness()
    return _json(readiness, 200 if readiness["status"] == "ready" else 503)


async def openapi(request: Request) -> Response:
    """This page."""
    return _json(request.app.state.openapi())


class Edge:
    """Around everything: a request id, the time and the security headers on every response, and what is told of it."""

    def __init__(self, app: ASGIApp, service: Service, access: Access, cors_origins: Sequence[str]) -> None:
        self.app = app
        self.service = service
        self.access = access
        self.door = Door(app, service)
        self.under_way = 0  # requests that came and are not answered yet
        self.cors_origins = frozenset(cors_origins)
        self.cors_door = CORSMiddleware(
            self.door,
            allow_origins=cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=CORS_REQUEST_HEADERS,
            expose_headers=CORS_RESPONSE_HEADERS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await WebSocketClose(1008)(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scope["path"] = ALIASES.get(scope["path"], scope["path"])
        call = Call(
            request_id=_request_id(headers),
            started_s=time.perf_counter(),
            route=scope["path"],
            idempotency_keys=headers.getlist("idempotency-key"),
            read_timeout_s=_read_timeout_s(headers),
            no_store=_no_store(headers),
        )
        scope["call"] = call
        status = HUNG_UP  # until it is answered

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                _add_headers(call, headers)
                _add_limits(self.service.standing(call), headers)
            await send(message)

        way_in = self.cors_door if headers.get("origin") in self.cors_origins else self.door
        self.under_way += 1
        with tracing.NO_SPAN if call.route in OPEN else tracing.serving(headers) as span:
            try:
                await way_in(scope, receive, send_with_headers)
            except Exception:
                if status == HUNG_UP:
                    raise  # nothing was said, not even by _broken
            finally:
                self.under_way -= 1
                self.access.answered(call, status)
                if span is not None:
                    self.access.describe(span, scope["method"], call, status)


class Door:
    """No way in without a key, but to the open routes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call: Call = scope["call"]
        try:
            if call.route not in OPEN:
                await self.service.admit(call, Headers(scope=scope).get("authorization"))
            await self.app(scope, receive, send)
        except ServiceError as error:  # not admitted; what a route raises is answered further in
            await _error(call, error)(scope, receive, send)


def _request_id(headers: Headers) -> str:
    """The caller's, if it may stand in a log; else one of our own."""
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _read_timeout_s(headers: Headers) -> float:
    """OpenAI's clients say how long they wait for an answer. What is no number of seconds says nothing."""
    given = headers.get("x-stainless-read-timeout", "")
    return float(given) if SECONDS.fullmatch(given) and float(given) > 0 else math.inf


def _no_store(headers: Headers) -> bool:
    directives = ",".join(headers.getlist("cache-control")).lower().split(",")
    return "no-store" in (directive.strip() for directive in directives)


def _add_headers(call: Call, headers: MutableHeaders) -> None:
    headers["X-Request-Id"] = call.request_id
    for name, value in SECURITY_HEADERS.items():
        headers[name] = value
    if call.replay_of:
        headers["Idempotent-Replayed"] = "true"
        headers["X-Runinfra-Idempotent-Replay"] = "true"
        headers["X-Original-Request-Id"] = call.replay_of
    if call.fingerprint:
        headers["X-Model-Fingerprint"] = call.fingerprint
    steps = {"tokenize": call.tokenize_s, "queue": call.queue_s, "compute": call.compute_s}
    steps["total"] = time.perf_counter() - call.started_s
    headers["Server-Timing"] = ", ".join(
        f"{name};dur={1000 * seconds:.2f}" for name, seconds in steps.items() if seconds is not None
    )


def _add_limits(standing: tuple[Standing, Standing | None] | None, headers: MutableHeaders) -> None:
    for suffix, budget in zip(("", "-Tokens"), standing or (), strict=False):
        if budget is not None:
            headers[f"X-RateLimit-Limit{suffix}"] = str(budget.limit)
            headers[f"X-RateLimit-Remaining{suffix}"] = str(budget.remaining)
            headers[f"X-RateLimit-Reset{suffix}"] = str(math.ceil(time.time() + budget.full_in_s))


async def _body(request: Request) -> bytes:
    """The body, once its type is right and while it is short enough. Reads no further than the limit."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType("The body must be JSON: send Content-Type: application/json.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("Compressed bodies are not read: send it without Content-Encoding.")
    limit: int = request.app.state.max_body_bytes
    declared = request.headers.get("content-length", "")
    # More digits than any size has: int() refuses to read them.
    chunks, size = [], int(declared[:20]) if declared.isdecimal() else 0
    if size <= limit:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                break
            chunks.append(chunk)
    if size > limit:
        raise RequestTooLarge(f"The body is longer than {limit:,} bytes, which is the limit. Split the request.")
    return b"".join(chunks)


async def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        response = _error(_call(request), MethodNotAllowed(f"This path takes: {allowed}."))
        response.headers["Allow"] = allowed
        return response
    return _error(_call(request), RouteNotFound("There is no such path. GET /openapi.json lists them."))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return _error(_call(request), error)


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=HUNG_UP)  # nobody is left to read it


async def _broken(request: Request, error: Exception) -> Response:
    """Logged by type and place; not in the exception's own words, which may quote the caller's text."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s: %s\n%s", _call(request).request_id, type(error).__qualname__, frames)
    return _error(_call(request), InternalError("Something broke on our side."))


def _error(call: Call, error: ServiceError) -> Response:
    call.error = error
    response = Response(
        orjson.dumps(error.body()), error.status, media_type="application/json", headers=error.headers()
    )
    if error.status == 413:
        response.headers["Connection"] = "close"  # the rest of the body will not be read
    return response


def _json(content: bytes | dict[str, Any], status: int = 200) -> Response:
    body = content if isinstance(content, bytes) else orjson.dumps(content)
    return Response(body, status, media_type="application/json")


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _call(request: Request) -> Call:
    call: Call = request.scope["call"]
    return call


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's page, and how the key is sent."""
    page = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    page["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return page


def _documented(
    answer: type[BaseModel],
    *statuses: int,
    bodies: Sequence[type[BaseModel]] = (),
    parameters: Sequence[dict[str, Any]] = (),
    open: bool = False,
    also: dict[int, type[BaseModel]] | None = None,
) -> dict[str, Any]:
    """What the OpenAPI page says of a route: its body and its answers. At run time it decides nothing."""
    if not open:
        statuses += (401, 403, 503)
    if bodies:
        statuses += (413, 415)
    errors = {
        status: {
            "model": schema.ErrorBody,
            "description": "; ".join(kind.code for kind in every_error() if kind.status == status),
        }
        for status in (*statuses, 500)
    }
    extra: dict[str, Any] = {} if open else {"security": [{"key": []}]}
    if parameters:
        extra["parameters"] = [*parameters]
    if bodies:
        shapes = [body.model_json_schema(ref_template="#/components/schemas/{model}") for body in bodies]
        content = {"application/json": {"schema": shapes[0] if len(shapes) == 1 else {"anyOf": shapes}}}
        extra["requestBody"] = {"required": True, "content": content}
    return {
        "response_class": Response,
        "responses": {
            200: {"model": answer},
            **errors,
            **{status: {"model": model} for status, model in (also or {}).items()},
        },
        "openapi_extra": extra,
    }

"""Requests that nobody should send, and many that somebody will: bytes as an HTTP server hands them on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis import Case
from schemathesis.config import SchemathesisConfig

from serve_app.core import keys
from tests.service.fakes import CARD, KEY, RERANKER

UNKNOWN_KEY = keys.mint(bytes([99] * keys.SECRET_BYTES))
MODELS = (CARD.id, CARD.name, CARD.id.upper(), RERANKER.id, "gpt-4", "", "..", "BAAI/bge-m3")
ROUTES = (
    *(("POST", "/v1/embeddings"),) * 12,
    *(("POST", "/v1/rerank"),) * 6,
    ("POST", "/v2/rerank"),
    *(("POST", "/v1/tokenize"),) * 4,
    *(("GET", "/v1/usage"),) * 2,
    *(("GET", path) for path in ("/v1/models", "/health", "/ready", "/openapi.json", "/")),
    *(("GET", f"/v1/models/{quote(model)}") for model in MODELS),
)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY", "post", "X")
HEADERS = (
    *(
        "accept",
        "accept-encoding",
        "connection",
        "cookie",
        "expect",
        "forwarded",
        "host",
        "idempotency-key",
        "if-match",
    ),
    *("origin", "range", "te", "transfer-encoding", "upgrade", "user-agent", "x-api-key", "x-forwarded-for"),
    *("x-http-method-override", "x-original-url", "x-request-id", "access-control-request-method"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """key: whether the request carries one that is right, once. hangs_up: before its body is whole."""

    method: str
    path: str  # as in the request line: escaped
    query: str = ""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    chunks: tuple[bytes, ...] = ()
    key: bool = False
    hangs_up: bool = False


def _header_values() -> st.SearchStrategy[bytes]:
    """All that a server lets through: no line ends, no NUL."""
    visible = st.characters(min_codepoint=9, max_codepoint=255, exclude_characters="\n\r\x0b\x0c")
    return st.text(visible, max_size=40).map(lambda text: text.strip().encode("latin-1"))


def _many() -> list[str]:
    return ["a"] * 2049


def _long() -> bytes:
    return b" " * 120_000


huge_numbers = st.sampled_from(
    [2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, -0.0, 1e-320, float("inf"), float("nan")]
)
good_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)
strange_texts = st.sampled_from(
    [
        "\ud800",
        "a\udfffb",
        "\0",
        "\ufeff",
        "\u202e",
        "é" * 3,
        "e\u0301",
        "𐍈",
        "\r\n",
        "{{7*7}}",
        "' OR 1=1 --",
        "a" * 9000,
    ]
)
texts = st.one_of(st.text(max_size=30), st.text(max_size=30), strange_texts)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), huge_numbers, st.floats(), texts)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
inputs = st.one_of(texts, st.lists(texts, max_size=4), st.builds(_many), st.lists(st.integers(), max_size=3), values)
documents = st.one_of(
    st.lists(texts, max_size=4),
    st.lists(st.fixed_dictionaries({"text": texts}, optional={"id": texts | values}), max_size=3),
    st.builds(_many),
    values,
)
pairs = st.fixed_dictionaries(
    {"model": st.sampled_from([RERANKER.id, RERANKER.name]) | values, "query": texts | values},
    optional={
        "texts": documents,
        "documents": documents,
        "top_n": st.sampled_from([1, 3, 0, -1, None]) | huge_numbers | values,
        "return_documents": st.booleans() | values,
        "max_tokens_per_doc": st.sampled_from([1, 5, None]) | huge_numbers | values,
    },
)
likely_fields: dict[str, st.SearchStrategy[Any]] = {
    "model": st.one_of(st.sampled_from(MODELS[:3]), st.sampled_from(MODELS), values),
    "input": inputs,
}
possible_fields: dict[str, st.SearchStrategy[Any]] = {
    "encoding_format": st.sampled_from(["float", "base64", "int8", None]) | values,
    "dimensions": st.sampled_from([1, 128, 384, 385, 0, -1, None]) | huge_numbers | values,
    "user": texts | values,
    "Input": inputs,
}
objects = st.one_of(
    pairs,
    st.fixed_dictionaries(likely_fields, optional=possible_fields),
    st.fixed_dictionaries({}, optional=likely_fields | possible_fields),
    st.builds(dict.__or__, st.fixed_dictionaries(likely_fields), st.dictionaries(texts, values, max_size=3)),
)


def _nested(depth: int, brackets: tuple[str, str]) -> bytes:
    left, right = brackets
    return f'{{"model": "{CARD.id}", "input": {left * depth}1{right * depth}}}'.encode()


def _spoilt(body: bytes, at: int, by: bytes, drops: int) -> bytes:
    at %= len(body) + 1
    return body[:at] + by + body[at + drops :]


good = st.fixed_dictionaries(
    {
        "model": st.sampled_from(MODELS[:3]),
        "input": st.one_of(good_texts, st.lists(good_texts, min_size=1, max_size=4)),
    },
    optional={"encoding_format": st.sampled_from(["float", "base64", None])},
)
as_json = objects.map(lambda it: json.dumps(it).encode())
good_pairs = st.fixed_dictionaries(
    {"model": st.just(RERANKER.id), "query": good_texts, "texts": st.lists(good_texts, min_size=1, max_size=4)},
    optional={"top_n": st.integers(1, 5)},
)
good_json = (good | good_pairs).map(lambda it: json.dumps(it).encode())
encodings = st.sampled_from(["utf-8", "utf-16", "utf-16-le", "utf-32", "utf-7", "latin-1", "cp037", "utf-8-sig"])
bodies = st.one_of(
    *[good_json] * 16,
    as_json,
    as_json,
    as_json,
    st.builds(lambda it: json.dumps(it, ensure_ascii=False).encode("utf-8", "surrogatepass"), objects),
    st.builds(lambda it, encoding: json.dumps(it, ensure_ascii=False).encode(encoding, "replace"), objects, encodings),
    st.builds(_spoilt, as_json, st.integers(0, 200), st.binary(max_size=4), st.integers(0, 8)),
    st.builds(lambda first, second: first[:-1] + b"," + second[1:], as_json, as_json),  # keys twice
    st.builds(
        _nested, st.sampled_from([5, 500, 1023, 1024, 1025, 20_000]), st.sampled_from([("[", "]"), ('{"a":', "}")])
    ),
    values.map(lambda it: json.dumps(it).encode()),
    st.builds(
        lambda digits: b'{"model": "m", "input": "a", "dimensions": %b}' % digits,
        st.from_regex(rb"\A-?[0-9]{1,300}(\.[0-9]{1,300})?([eE][+-]?[0-9]{1,6})?\Z"),
    ),
    st.binary(max_size=200),
    st.sampled_from([b"", b"null", b"{}", b"[]"]),
    st.builds(_long),
)


@st.composite
def _chunks(draw: st.DrawFn, body: bytes) -> tuple[bytes, ...]:
    cuts = sorted(draw(st.lists(st.integers(0, len(body)), max_size=4)))
    return tuple(body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True))


@st.composite
def _authorization(draw: st.DrawFn) -> tuple[bool, tuple[tuple[bytes, bytes], ...]]:
    good = f"Bearer {KEY}".encode()
    match draw(st.sampled_from((*("right",) * 24, "none", "unknown", "spoilt", "strange", "twice"))):
        case "right":
            return True, ((b"authorization", good),)
        case "none":
            return False, ()
        case "unknown":
            return False, ((b"authorization", f"Bearer {UNKNOWN_KEY}".encode()),)
        case "spoilt":
            at = draw(st.integers(7, len(good) - 1))
            other = draw(st.sampled_from([b"", b"-", b"\xe9", b" "]))
            return False, ((b"authorization", good[:at] + other + good[at + 1 :]),)
        case "twice":
            return False, ((b"authorization", b"Bearer x"), (b"authorization", good))
        case _:
            return False, ((b"authorization", draw(_header_values())),)


@st.composite
def raw(draw: st.DrawFn) -> Sent:
    """Made byte by byte."""
    key, authorization = draw(_authorization())
    method, path = draw(st.sampled_from(ROUTES))
    if draw(st.integers(0, 7)) == 0:
        method = draw(st.sampled_from(METHODS))
    if draw(st.integers(0, 7)) == 0:
        path = "/" + quote(draw(st.text(max_size=12)), safe="/%.;:@", errors="replace")
    body = draw(bodies)
    types = st.sampled_from(
        [b"application/json"] * 40 + [b"", b"text/plain", b"application/json; charset=utf-16", b"*/*"]
    )
    headers = [(b"content-type", draw(types))]
    if draw(st.booleans()):
        lies = [str(len(body)), "0", "1", "-1", "1e3", "99999999", "9" * 5000, "0x10", " 5", "5, 5", "\u00b2"]
        headers.append((b"content-length", draw(st.sampled_from(lies)).encode("latin-1")))
    if draw(st.integers(0, 9)) == 0:
        headers.append((b"content-encoding", draw(st.sampled_from([b"gzip", b"identity", b"br", b"\xff"]))))
    if draw(st.booleans()):
        names = st.sampled_from(HEADERS) | st.from_regex(r"\A[!#$%&'*+.^_`|~0-9a-z-]{1,20}\Z")
        headers += [
            (name.encode(), value)
            for name, value in draw(st.lists(st.tuples(names, _header_values()), max_size=4))
            if name != "authorization"
        ]
    query = draw(
        st.sampled_from(["", "", "from=2026-01-01", "to=x&to=y", "group_by=day,day", "%00=%ff", "a&&=b"])
        | st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)
    )
    return Sent(
        method=method,
        path=path,
        query=query,
        headers=(*authorization, *headers),
        chunks=draw(_chunks(body)),
        key=key,
        hangs_up=draw(st.integers(0, 19)) == 0,
    )


def from_page(page: dict[str, Any]) -> st.SearchStrategy[Sent]:
    """Made by schemathesis from what `/openapi.json` says, both what it allows and what it does not."""
    api = schemathesis.openapi.from_dict(page, config=SchemathesisConfig.from_dict({}))
    cases = [
        operation.ok().as_strategy(generation_mode=mode)  # type: ignore[union-attr]
        for operation in api.get_all_operations()
        for mode in schemathesis.GenerationMode
        for _ in range(3 if operation.ok().method == "post" else 1)  # type: ignore[union-attr]
    ]
    return st.builds(_from_case, st.one_of(cases), _authorization(), st.sampled_from((True, True, True, True, False)))


def _from_case(case: Case[Any], authorization: tuple[bool, tuple[tuple[bytes, bytes], ...]], served: bool) -> Sent:
    if served and isinstance(case.body, dict) and "model" in case.body:
        case.body = case.body | {"model": RERANKER.id if "query" in case.body else CARD.id}
    arguments = case.as_transport_kwargs(base_url="http://test")
    names = ("method", "url", "headers", "params", "data", "json", "cookies")
    prepared = requests.Request(**{name: arguments[name] for name in names if name in arguments}).prepare()
    path, _, query = (prepared.path_url or "/").partition("?")
    body: Any = prepared.body or b""
    key, headers = authorization
    return Sent(
        method=prepared.method or "GET",
        path=path,
        query=query,
        headers=(*headers, *_as_bytes(prepared.headers.items())),
        chunks=(body.encode() if isinstance(body, str) else body,),
        key=key,
    )


def _as_bytes(headers: Iterable[tuple[str | bytes, str | bytes]]) -> Iterable[tuple[bytes, bytes]]:
    for name, value in headers:
        name = name if isinstance(name, bytes) else name.encode("latin-1")
        if name.lower() != b"authorization":
            yield name.lower(), value if isinstance(value, bytes) else value.encode("latin-1")

"""Spans on the way through Ray: what crosses to encoders and the idempotency actor, and what a collector gets."""

from __future__ import annotations

import asyncio
import secrets
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import Context
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serve_app import tracing
from serve_app.core.catalog import ModelSpec
from serve_app.core.idempotency import Proceed, Settled
from serve_app.deployments.tracing import SCOPE, OursOnly, _name_process, otlp
from serve_app.desk import Desk
from serve_app.dispatch import TracedUnit, Unit, UnitReply
from serve_app.stores import open_store
from tests.deployments.collector import Collected
from tests.deployments.conftest import MINILM, LiveServer
from tests.deployments.test_encode_units import CARD, ENTRY, FakeEncoder, unit
from tests.spans import CLIENT, SAMPLED, Spans, recorded
from tests.stores.steps import begin, complete

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own: it still declares pydantic fields the old way
    from serve_app.deployments.encoder import EncoderReplica
    from serve_app.deployments.idempotency import Clerks, _Call

OTHER = f"00-{'7' * 32}-{CLIENT}-01"


@pytest.fixture
def spans() -> Iterator[Spans]:
    with recorded() as spans:
        yield spans


class OneBatch:
    """See `Gate`: what comes in one tick is computed together. `@serve.batch` needs a running Serve."""

    def __init__(self, replica: EncoderReplica) -> None:
        self._replica = replica
        self._units: list[Unit] = []
        self._batch: asyncio.Future[list[UnitReply | Exception]] | None = None

    async def submit(self, unit: Unit) -> UnitReply | Exception:
        self._units.append(unit)
        at = len(self._units) - 1
        await asyncio.sleep(0)
        self._batch = self._batch or asyncio.ensure_future(self._replica._forward(False, self._units))
        return (await self._batch)[at]


def replica(monkeypatch: pytest.MonkeyPatch, encoder: FakeEncoder) -> EncoderReplica:
    encoder.card = CARD  # type: ignore[attr-defined]
    monkeypatch.setattr("serve_app.deployments.encoder.open_encoder", lambda spec: encoder)
    made = EncoderReplica(ModelSpec.model_validate(ENTRY))
    made._gates[False] = OneBatch(made)  # type: ignore[assignment]
    return made


async def test_a_unit_and_its_forward_are_in_the_trace_of_each_of_its_requests(
    spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = replace(unit([1, 2]), fingerprint=CARD.fingerprint)
    traced = TracedUnit.of(plain, (SAMPLED["traceparent"], OTHER))
    encoder = replica(monkeypatch, FakeEncoder())
    reply, _ = await asyncio.gather(encoder.encode(traced), encoder.encode(plain))
    assert reply.vectors[:, 0].tolist() == [1, 2]
    assert spans.tree() == {"client": ["unit", "unit"], "unit": ["forward", "forward"]}
    forwards = [dict(span.attributes or {}) for span in spans.named("forward")]
    assert len({it.pop("serve_app.batch") for it in forwards}) == 1
    assert forwards == 2 * [{"serve_app.units": 2, "serve_app.tokens": 8}]
    assert len({span.context.trace_id for span in spans.named("forward")}) == 2


async def test_a_replica_that_does_not_trace_computes_what_another_process_traces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced = TracedUnit.of(replace(unit([1, 2]), fingerprint=CARD.fingerprint), (SAMPLED["traceparent"],))
    assert (await replica(monkeypatch, FakeEncoder()).encode(traced)).vectors[:, 0].tolist() == [1, 2]


async def test_only_steps_that_are_traced_take_a_trace_to_the_actor(tmp_path: Any, spans: Spans) -> None:
    store = await open_store(f"sqlite:{tmp_path}/store.db")
    desk = Desk(store, cache_bytes=1_000_000, waiters_per_key=10, waiters=10)
    called: list[tuple[Any, ...]] = []

    class Method:
        """In a context of its own, as in another process."""

        def __init__(self, method: Callable[..., Any]) -> None:
            self._method = method

        def remote(self, *arguments: Any) -> Any:
            called.append(arguments)
            return asyncio.get_running_loop().create_task(self._method(*arguments), context=Context())

    handle = SimpleNamespace(run=Method(desk.run), wait=Method(desk.wait))
    call = _Call(handle)
    first, second = begin(), begin(claim="feed", attempt="other")
    outcomes = await call([(first, None), (second, SAMPLED["traceparent"])])
    assert [type(it) for it in outcomes] == [Proceed, Proceed]
    assert await call([(complete(), None)]) == [Settled()]
    assert called == [([first, second], {1: SAMPLED["traceparent"]}), ([complete()],)]
    assert spans.tree() == {"client": ["begin"], "begin": ["store"]}
    called.clear()
    clerks = Clerks()
    clerks._handles = [handle]
    assert isinstance(await clerks.wait(second, 0.01), Proceed)
    with tracing.span("claim", OTHER):
        assert isinstance(await clerks.wait(second, 0.01), Proceed)
    ((*untraced,), (*alike, trace)) = called
    assert untraced == alike == [second, 0.01]
    (wait,), (claim,) = spans.named("wait"), spans.named("claim")
    assert trace == f"00-{'7' * 32}-{claim.context.span_id:016x}-01"
    assert wait.parent is not None
    assert wait.parent.span_id == claim.context.span_id
    await store.close()


def test_the_exporter_takes_our_spans_and_none_of_serves() -> None:
    memory = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(OursOnly(memory))
    for scope in ("ray.serve._private.tracing_utils", SCOPE):
        with provider.get_tracer(scope).start_as_current_span(scope):
            pass
    provider.force_flush()
    assert [span.name for span in memory.get_finished_spans()] == [SCOPE]
    provider.shutdown()


def test_a_replica_has_its_applications_name_unless_the_operator_chose_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    _name_process("SERVE_REPLICA::bge-m3#encoder:bge-m3:BAAI--bge-m3#x1y2")
    found = TracerProvider().resource.attributes
    assert found["service.name"] == "serve-app.bge-m3"
    assert found["service.instance.id"] == "encoder:bge-m3:BAAI--bge-m3#x1y2"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "vectors")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=staging")
    _name_process("SERVE_REPLICA::ingress#ingress#x1y2")
    found = TracerProvider().resource.attributes
    assert found["service.name"] == "vectors"
    assert found["deployment.environment.name"] == "staging"
    assert found["service.instance.id"] == "ingress#x1y2"


def test_without_the_package_a_replica_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ImportError, match=r"pip install 'serve-app\[tracing\]'"):
        otlp()
    assert tracing._tracer is None


MARKER = "xyzzy-plugh-4127"
THROUGH_ALL = {
    "POST /v1/embeddings": "",
    "admit": "POST /v1/embeddings",
    "claim": "POST /v1/embeddings",
    "tokenize": "POST /v1/embeddings",
    "encode": "POST /v1/embeddings",
    "settle": "POST /v1/embeddings",
    "begin": "claim",
    "queue": "encode",
    "dispatch": "encode",
    "unit": "dispatch",
    "forward": "unit",
    "complete": "settle",
}


def ask(server: LiveServer, headers: dict[str, str]) -> httpx.Response:
    body = {"model": MINILM["id"], "input": MARKER, "user": MARKER}
    return httpx.post(f"{server.url}/v1/embeddings", json=body, headers=server.headers | headers, timeout=60)


def traced(server: LiveServer, names: set[str], **headers: str) -> list[Collected]:
    """The spans of one request, once those of these names are there."""
    assert server.collector is not None
    collector, trace = server.collector, secrets.token_hex(16)
    answer = ask(server, {"traceparent": f"00-{trace}-{CLIENT}-01", "Idempotency-Key": MARKER, **headers})
    assert answer.status_code in (200, 401)
    server.wait_until(lambda: names <= {span.name for span in collector.spans(trace)}, 20)
    return collector.spans(trace)


@pytest.mark.live
@pytest.mark.timeout(700)
def test_one_request_is_one_trace_through_ingress_encoder_and_actor(server: LiveServer) -> None:
    assert server.collector is not None
    assert ask(server, {}).status_code == 200  # not sampled
    found = traced(server, {*THROUGH_ALL}, **{"Idempotency-Key": f"{MARKER}-first"})
    names = {span.id: span.name for span in found} | {CLIENT: ""}
    assert {span.name: names[span.parent] for span in found if span.name != "store"} == THROUGH_ALL
    assert [names[span.parent] for span in found if span.name == "store"] == ["begin", "complete"]
    where = {span.name: (span.service, span.instance) for span in found}
    assert where["POST /v1/embeddings"][0] == "serve-app.ingress"
    assert where["unit"][0] == where["forward"][0] == f"serve-app.model-{MINILM['id']}"
    assert where["begin"][0] == where["complete"][0] == "serve-app.idempotency"
    assert len({*where.values()}) == 3
    replay = traced(server, {"POST /v1/embeddings"}, **{"Idempotency-Key": f"{MARKER}-first"})
    assert replay[0].facts["serve_app.replayed"] is True
    refused = traced(server, {"POST /v1/embeddings"}, Authorization=f"Bearer {MARKER}")
    assert refused[0].facts["http.response.status_code"] == 401
    assert {span.trace for span in server.collector.all()} == {it[0].trace for it in (found, replay, refused)}
    for secret in (MARKER, server.key):
        assert secret.encode() not in server.collector.raw

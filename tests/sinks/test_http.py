from __future__ import annotations

import base64
import datetime as dt
import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from email.utils import format_datetime
from pathlib import Path

import httpx2
import orjson
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError
from standardwebhooks import Webhook

from serve_app.core.ledger import Recorded
from serve_app.sinks import Refused, SinkDown, SinkSettings, SinkUnfit, http, open_sink
from serve_app.sinks.http import WebhookSink, is_public
from tests.sinks.events import as_cloud_event, batch, ids
from tests.sinks.receiver import Answer, Call, Receiver, receiving

SECRET = "whsec_" + base64.b64encode(b"a secret of thirty-two bytes  .").decode()
NEXT_SECRET = "whsec_" + base64.b64encode(b"the secret that comes after it .").decode()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
async def sinks() -> AsyncIterator[list[WebhookSink]]:
    made: list[WebhookSink] = []
    yield made
    for sink in made:
        await sink.close()


@pytest.fixture
def sink_for(sinks: list[WebhookSink]) -> Callable[..., WebhookSink]:
    def make(receiver: Receiver, *, mode: str = "batch", secret: str = SECRET) -> WebhookSink:
        settings = SinkSettings.model_validate(
            {"name": "hook", "url": receiver.url, "secret": secret, "mode": mode, "allow_private": True}
        )
        sink = open_sink(settings, source="/test")
        assert isinstance(sink, WebhookSink)
        sinks.append(sink)
        return sink

    return make


SinkFor = Callable[..., WebhookSink]


def events_in(call: Call) -> list[str]:
    body = orjson.loads(call.body)
    return [event["id"] for event in (body if isinstance(body, list) else [body])]


def refuses(*poison: str, status: int = 400) -> Callable[[Call], Answer]:
    return lambda call: Answer(status=status if set(poison) & set(events_in(call)) else 204)


async def test_a_batch_is_one_call_of_cloud_events(receiver: Receiver, sink_for: SinkFor) -> None:
    assert await sink_for(receiver).deliver(0, batch([1, 2, 3])) == []
    (call,) = receiver.calls
    assert call.path == "/hook?channel=usage"
    assert call.headers["content-type"] == "application/cloudevents-batch+json"
    assert call.headers["host"] == f"127.0.0.1:{receiver.port}"
    events = [as_cloud_event(orjson.dumps(event)) for event in orjson.loads(call.body)]
    assert [event.get_id() for event in events] == ["0-1", "0-2", "0-3"]
    assert [event.get_extension("sequence") for event in events] == [f"{number:020d}" for number in (1, 2, 3)]


async def test_structured_mode_is_one_call_an_event_in_order(receiver: Receiver, sink_for: SinkFor) -> None:
    assert await sink_for(receiver, mode="structured").deliver(0, batch([1, 2, 3])) == []
    assert [as_cloud_event(call.body).get_id() for call in receiver.calls] == ["0-1", "0-2", "0-3"]
    assert {call.headers["content-type"] for call in receiver.calls} == {"application/cloudevents+json"}
    assert [call.headers["webhook-id"] for call in receiver.calls] == ["0-1", "0-2", "0-3"]
    assert receiver.connections == 1, "the connection is used again"


@pytest.mark.parametrize("mode", ["batch", "structured"])
async def test_a_call_is_signed_as_standard_webhooks_says(receiver: Receiver, sink_for: SinkFor, mode: str) -> None:
    await sink_for(receiver, mode=mode).deliver(0, batch([1]))
    (call,) = receiver.calls
    assert Webhook(SECRET).verify(call.body, call.headers)
    with pytest.raises(Exception, match="No matching signature"):
        Webhook(SECRET).verify(call.body + b" ", call.headers)
    with pytest.raises(Exception, match="No matching signature"):
        Webhook(NEXT_SECRET).verify(call.body, call.headers)


async def test_while_a_secret_changes_both_sign(receiver: Receiver, sink_for: SinkFor) -> None:
    await sink_for(receiver, secret=f"{SECRET} {NEXT_SECRET}").deliver(0, batch([1]))
    (call,) = receiver.calls
    for secret in (SECRET, NEXT_SECRET):
        assert Webhook(secret).verify(call.body, call.headers)


async def test_a_repeated_batch_has_the_same_id_and_another_batch_another(
    receiver: Receiver, sink_for: SinkFor
) -> None:
    sink = sink_for(receiver)
    for numbers in ([1, 2], [1, 2], [1, 2, 3]):
        await sink.deliver(0, batch(numbers))
    first, again, other = (call.headers["webhook-id"] for call in receiver.calls)
    assert first == again != other


async def test_a_secret_is_read_from_the_environment(
    receiver: Receiver, sink_for: SinkFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    await sink_for(receiver, secret="env:HOOK_SECRET").deliver(0, batch([1]))
    assert Webhook(SECRET).verify(receiver.calls[0].body, receiver.calls[0].headers)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"secret": None}, "needs a secret"),
        ({"secret": "env:NOT_SET"}, "no NOT_SET"),
        ({"secret": "swordfish"}, "must be whsec_"),
        ({"secret": "whsec_swordfish"}, "must be whsec_"),
        ({"secret": "whsec_*" + SECRET[7:]}, "must be whsec_"),
        ({"url": "http://example.com/hook"}, "plain http"),
        ({"url": "https:///hook"}, "no host"),
        ({"url": "https://swordfish:x@example.com/"}, "user name"),
        ({"url": "https://example.com:swordfish/"}, "not valid"),
        ({"url": "ftp://example.com/"}, "jsonl:FOLDER or https"),
    ],
)
def test_a_sink_that_cannot_work_says_why(changed: dict[str, str | None], why: str) -> None:
    settings = SinkSettings.model_validate({"name": "hook", "url": "https://example.com/", "secret": SECRET} | changed)
    with pytest.raises(SinkUnfit, match=why) as unfit:
        open_sink(settings, source="/test")
    assert "swordfish" not in str(unfit.value)


def test_no_error_or_representation_shows_a_secret() -> None:
    with pytest.raises(ValidationError) as refused:
        SinkSettings.model_validate({"name": "hook", "url": "https://example.com/", "secert": SECRET})
    assert SECRET[:12] not in str(refused.value)
    settings = SinkSettings.model_validate({"name": "hook", "url": "https://example.com/", "secret": SECRET})
    assert SECRET[:12] not in repr(settings)


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_any_success_is_taken(receiver: Receiver, sink_for: SinkFor, status: int) -> None:
    receiver.answer = lambda call: Answer(status=status)
    assert await sink_for(receiver).deliver(0, batch([1])) == []


@pytest.mark.parametrize(
    "status", [301, 302, 307, 308, 401, 403, 404, 405, 407, 408, 410, 415, 421, 425, 429, 500, 502, 503, 599]
)
async def test_trouble_that_is_not_the_events_is_tried_again(
    receiver: Receiver, sink_for: SinkFor, status: int
) -> None:
    receiver.answer = lambda call: Answer(status=status, headers={"location": f"http://127.0.0.1:{receiver.port}/new"})
    with pytest.raises(SinkDown, match=f"HTTP {status}") as down:
        await sink_for(receiver).deliver(0, batch([1, 2]))
    assert len(receiver.calls) == 1, "no redirect is followed, and nothing is sent one by one"
    assert down.value.retry_after_s is None


@pytest.mark.parametrize("status", [400, 402, 409, 413, 422, 451])
async def test_what_is_refused_in_a_batch_is_sought_one_by_one(
    receiver: Receiver, sink_for: SinkFor, status: int
) -> None:
    receiver.answer = refuses("0-2", "0-4", status=status)
    events = batch(range(1, 6))
    refused = await sink_for(receiver).deliver(0, events)
    assert refused == [
        Refused(recorded=events[1], reason=f"HTTP {status}"),
        Refused(recorded=events[3], reason=f"HTTP {status}"),
    ]
    assert [events_in(call) for call in receiver.calls] == [ids(events), *[[each] for each in ids(events)]]
    assert {call.headers["content-type"] for call in receiver.calls} == {"application/cloudevents-batch+json"}


async def test_structured_mode_returns_what_is_refused(receiver: Receiver, sink_for: SinkFor) -> None:
    receiver.answer = refuses("0-2")
    refused = await sink_for(receiver, mode="structured").deliver(0, batch([1, 2, 3]))
    assert ids([refusal.recorded for refusal in refused]) == ["0-2"]
    assert len(receiver.calls) == 3


@pytest.mark.parametrize("mode", ["batch", "structured"])
async def test_a_receiver_that_limits_the_rate_still_gets_through_a_batch(
    receiver: Receiver, sink_for: SinkFor, mode: str
) -> None:
    """Each try goes on where the last one was broken off; else a batch above the limit would never end."""
    allowed = 0

    def limited(call: Call) -> Answer:
        nonlocal allowed
        if len(events_in(call)) > 1:
            return Answer(status=400)
        allowed -= 1
        return Answer(status=429 if allowed < 0 else 400 if "0-3" in events_in(call) else 204)

    receiver.answer = limited
    sink, refused, tries = sink_for(receiver, mode=mode), list[Refused](), 0
    for tries in range(1, 10):  # noqa: B007
        allowed = 4
        try:
            refused = await sink.deliver(0, batch(range(1, 11)))
        except SinkDown:
            continue
        break
    assert tries == 3
    assert ids([refusal.recorded for refusal in refused]) == ["0-3"]
    assert not sink._settled, "nothing is remembered that is over"
    receiver.calls.clear()
    allowed = 10
    await sink.deliver(0, batch([5]))
    assert receiver.calls, "sent again when it is asked for again"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("17", 17.0), ("0", 0.0), ("soon", None), ("-5", None), ("", None), ("9" * 400, float("inf"))],
)
async def test_retry_after_is_read_as_seconds(
    receiver: Receiver, sink_for: SinkFor, header: str, seconds: float | None
) -> None:
    receiver.answer = lambda call: Answer(status=429, headers={"retry-after": header})
    with pytest.raises(SinkDown) as down:
        await sink_for(receiver).deliver(0, batch([1]))
    assert down.value.retry_after_s == seconds


@pytest.mark.parametrize(("ahead_s", "least_s", "most_s"), [(90, 60, 91), (-90, 0, 0)])
async def test_retry_after_is_read_as_a_date(
    receiver: Receiver, sink_for: SinkFor, ahead_s: int, least_s: float, most_s: float
) -> None:
    date = format_datetime(dt.datetime.now(dt.UTC) + dt.timedelta(seconds=ahead_s), usegmt=True)
    receiver.answer = lambda call: Answer(status=503, headers={"retry-after": date})
    with pytest.raises(SinkDown) as down:
        await sink_for(receiver).deliver(0, batch([1]))
    assert down.value.retry_after_s is not None
    assert least_s <= down.value.retry_after_s <= most_s


async def test_a_closed_connection_is_no_answer(receiver: Receiver, sink_for: SinkFor) -> None:
    receiver.answer = lambda call: Answer(hang_up=True)
    with pytest.raises(SinkDown, match="no answer"):
        await sink_for(receiver).deliver(0, batch([1]))


async def test_nobody_at_the_port_is_a_sink_that_is_down(sink_for: SinkFor) -> None:
    async with receiving() as receiver:
        sink = sink_for(receiver)
    with pytest.raises(SinkDown, match="cannot connect"):
        await sink.deliver(0, batch([1]))


async def test_a_slow_answer_is_not_waited_for(
    receiver: Receiver, sink_for: SinkFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "TOTAL_S", 0.2)
    receiver.answer = lambda call: Answer(delay_s=5)
    with pytest.raises(SinkDown, match="no answer"):
        await sink_for(receiver).deliver(0, batch([1]))


async def test_a_body_without_end_changes_nothing_about_the_status(receiver: Receiver, sink_for: SinkFor) -> None:
    receiver.answer = lambda call: Answer(status=200, endless=True)
    started = time.monotonic()
    assert await sink_for(receiver).deliver(0, batch([1])) == []
    assert time.monotonic() - started < http.TOTAL_S / 2


async def test_proxies_of_the_environment_are_ignored(
    receiver: Receiver, sink_for: SinkFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert await sink_for(receiver).deliver(0, batch([1])) == []


async def test_a_cookie_is_not_sent_back(receiver: Receiver, sink_for: SinkFor) -> None:
    receiver.answer = lambda call: Answer(headers={"set-cookie": "a=b"})
    sink = sink_for(receiver)
    await sink.deliver(0, batch([1]))
    await sink.deliver(0, batch([2]))
    assert "cookie" not in receiver.calls[1].headers


async def test_neither_secret_nor_body_nor_query_is_logged(
    receiver: Receiver, sink_for: SinkFor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sink = sink_for(receiver)
    receiver.answer = lambda call: Answer(status=500, body=b"what you sent: ws-0")
    with pytest.raises(SinkDown) as down:
        await sink.deliver(0, batch([1]))
    for text in (SECRET[6:], "channel=usage", "ws-0", "0-1"):
        assert text not in caplog.text + str(down.value)


PRIVATE = [
    "127.0.0.1",
    "127.8.8.8",
    "10.1.2.3",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "100.127.255.254",
    "0.0.0.0",
    "0.1.2.3",
    "192.0.0.8",
    "192.0.2.1",
    "198.18.0.1",
    "192.88.99.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "::ffff:10.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "::10.0.0.1",
    "64:ff9b::10.0.0.1",
    "64:ff9b:1::1",
    "2002:a00:1::1",
    "2001:0:53aa:64c::1",
    "2001:db8::1",
    "3fff::1",
    "fd00::1",
    "fc00::1",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
    "5f00::1",
    "not-an-address",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_is_no_public_host_is_known(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00::1"])
def test_a_public_address_is_known(address: str) -> None:
    assert is_public(address)


class Transport(httpx2.AsyncBaseTransport):
    """Keeps what would be sent; `unreachable` addresses cannot be connected to."""

    def __init__(self, *, unreachable: str = "") -> None:
        self.requests: list[httpx2.Request] = []
        self._unreachable = unreachable

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        if request.url.host == self._unreachable:
            raise httpx2.ConnectError("unreachable")
        return httpx2.Response(204, stream=httpx2.ByteStream(b""))


def resolves_to(*addresses: str) -> Callable[[str, int], Awaitable[list[str]]]:
    async def resolve(host: str, port: int) -> list[str]:
        return list(addresses)

    return resolve


def public_sink(transport: httpx2.AsyncBaseTransport, *addresses: str) -> WebhookSink:
    return WebhookSink(
        httpx2.URL("https://hooks.example.com:8443/usage"),
        [b"x" * 32],
        source="/test",
        resolve=resolves_to(*addresses),
        transport=transport,
    )


@pytest.mark.parametrize("address", PRIVATE)
@pytest.mark.parametrize("company", [[], ["8.8.8.8"]])
async def test_a_name_that_leads_inside_is_not_called(address: str, company: list[str]) -> None:
    transport = Transport()
    with pytest.raises(SinkDown, match="not public"):
        await public_sink(transport, *company, address).deliver(0, batch([1]))
    assert not transport.requests


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "[::1]", "[::ffff:127.0.0.1]"]
)
async def test_an_address_inside_is_not_called_however_it_is_spelt(host: str) -> None:
    transport = Transport()
    sink = WebhookSink(httpx2.URL(f"https://{host}/"), [b"x" * 32], source="/test", transport=transport)
    with pytest.raises(SinkDown, match=r"not public|cannot be resolved"):
        await sink.deliver(0, batch([1]))
    assert not transport.requests


async def test_the_checked_address_is_called_in_the_names_name() -> None:
    transport = Transport()
    await public_sink(transport, "8.8.8.8").deliver(0, batch([1]))
    (request,) = transport.requests
    assert str(request.url) == "https://8.8.8.8:8443/usage"
    assert request.headers["host"] == "hooks.example.com:8443"
    assert request.extensions["sni_hostname"] == "hooks.example.com"


async def test_a_name_is_looked_up_and_checked_before_every_call() -> None:
    answers = iter([["8.8.8.8"], ["127.0.0.1"]])

    async def rebinding(host: str, port: int) -> list[str]:
        return next(answers)

    transport = Transport()
    url = httpx2.URL("https://hooks.example.com/")
    sink = WebhookSink(url, [b"x" * 32], source="/test", resolve=rebinding, transport=transport)
    await sink.deliver(0, batch([1]))
    with pytest.raises(SinkDown, match="not public"):
        await sink.deliver(0, batch([2]))
    assert [request.url.host for request in transport.requests] == ["8.8.8.8"]


async def test_the_next_address_is_tried_when_one_cannot_be_reached() -> None:
    transport = Transport(unreachable="8.8.8.8")
    await public_sink(transport, "8.8.8.8", "2606:4700::1111").deliver(0, batch([1]))
    assert [request.url.host for request in transport.requests] == ["8.8.8.8", "2606:4700::1111"]
    with pytest.raises(SinkDown, match="cannot connect"):
        await public_sink(Transport(unreachable="8.8.8.8"), "8.8.8.8").deliver(0, batch([1]))
    with pytest.raises(SinkDown, match="no address"):
        await public_sink(Transport()).deliver(0, batch([1]))


async def test_a_name_that_nobody_knows_is_a_sink_that_is_down() -> None:
    async def nobody(host: str, port: int) -> list[str]:
        raise OSError("no such name")

    sink = WebhookSink(httpx2.URL("https://a.example/"), [b"x" * 32], source="/test", resolve=nobody)
    with pytest.raises(SinkDown, match="cannot be resolved"):
        await sink.deliver(0, batch([1]))
    await sink.close()


def certificate(folder: Path, name: str) -> Path:
    """Signed by itself, for that name."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{name}.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.mark.parametrize(("called", "taken"), [("hooks.example.com", True), ("other.example.com", False)])
async def test_the_certificate_must_be_the_names_though_an_address_is_called(
    tmp_path: Path, called: str, taken: bool
) -> None:
    pem = certificate(tmp_path, "hooks.example.com")
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=str(pem))
    server.load_cert_chain(pem)
    asked_for: list[str | None] = []
    server.sni_callback = lambda tls, name, context: asked_for.append(name)
    async with receiving(tls=server) as receiver:
        sink = WebhookSink(
            httpx2.URL(f"https://{called}:{receiver.port}/"),
            [b"x" * 32],
            source="/test",
            allow_private=True,
            resolve=resolves_to("127.0.0.1"),
            transport=httpx2.AsyncHTTPTransport(verify=client, trust_env=False),
        )
        events: list[Recorded] = batch([1])
        if taken:
            assert await sink.deliver(0, events) == []
            assert receiver.calls[0].headers["host"] == f"{called}:{receiver.port}"
        else:
            with pytest.raises(SinkDown, match="CERTIFICATE_VERIFY_FAILED"):
                await sink.deliver(0, events)
        await sink.close()
    assert asked_for == [called]

"""Usage events as webhooks: CloudEvents 1.0 over HTTP, signed as Standard Webhooks says.

A call goes to the very address that was checked, over TLS in the name's own name, and follows nothing that the
receiver says: so neither a name nor a redirect leads it inside. What the receiver answers decides between taken,
refused for good and try again.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime as dt
import hashlib
import hmac
import ipaddress
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from email.utils import parsedate_to_datetime

import httpx2
import orjson

from serve_app.core.ledger import Recorded, cloud_event
from serve_app.sinks import Refused, Sink, SinkDown, SinkSettings, SinkUnfit

CONNECT_S = 5.0  # to find the name, and again to connect
TOTAL_S = 20.0  # until the status is there
DRAIN_S, DRAIN_BYTES = 1.0, 16 * 2**10  # a body is read only so that its connection can be used again

# These speak of the webhook's URL, secret or mode, not of the event: they last until a person has mended it.
MISCONFIGURED = frozenset({401, 403, 404, 405, 407, 410, 415, 421})
TRY_AGAIN = frozenset({408, 425, 429})

# IPv6: nothing but global unicast, so no mapped, translated, local or multicast addresses. Here, what is in it or is
# public IPv4 by the tables of Python 3.11, and still no host of its own: 6to4, its relays, and protocol assignments.
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NO_HOSTS = [ipaddress.ip_network(net) for net in ("192.0.0.0/24", "192.88.99.0/24", "2002::/16", "3fff::/20")]

Resolve = Callable[[str, int], Awaitable[list[str]]]


def open(settings: SinkSettings, *, source: str) -> Sink:
    try:
        url = httpx2.URL(settings.url)
        if not url.host:
            raise SinkUnfit("its url has no host")
        if url.userinfo:
            raise SinkUnfit("its url holds a user name or password; a webhook is protected by its secret")
        if url.scheme != "https" and not settings.allow_private:
            raise SinkUnfit("plain http is only for private receivers: use https, or set allow_private")
        secrets = _secrets(settings.secret.get_secret_value() if settings.secret else "")
    except httpx2.InvalidURL:
        raise SinkUnfit(f"sink {settings.name}: its url is not valid") from None
    except SinkUnfit as unfit:
        raise SinkUnfit(f"sink {settings.name}: {unfit}") from None
    return WebhookSink(
        url, secrets, source=source, batched=settings.mode == "batch", allow_private=settings.allow_private
    )


async def resolve(host: str, port: int) -> list[str]:
    """Addresses, the preferred one first. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class WebhookSink:
    """One call at a time and shard. What a receiver refuses in a batch is sought by sending its events one by one."""

    def __init__(
        self,
        url: httpx2.URL,
        secrets: Sequence[bytes],
        *,
        source: str,
        batched: bool = True,
        allow_private: bool = False,
        resolve: Resolve = resolve,
        now_s: Callable[[], float] = time.time,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = url
        self._secrets = secrets
        self._source = source
        self._batched = batched
        self._allow_private = allow_private
        self._resolve = resolve
        self._now_s = now_s
        # No client around it: a client would follow, keep cookies, and log the URL.
        self._transport = transport or httpx2.AsyncHTTPTransport(trust_env=False)
        # (shard, sequence) -> why it was refused, if it was: what was sent one by one and need not go again when the
        # receiver breaks off in the middle, as one that limits the rate of calls does every time.
        self._settled: dict[tuple[int, int], str | None] = {}

    async def deliver(self, shard: int, batch: Sequence[Recorded]) -> list[Refused]:
        if self._batched and await self._send(batch) is None:
            reasons: list[str | None] = [None] * len(batch)
        else:
            for recorded in batch:
                if (shard, recorded.sequence) not in self._settled:
                    self._settled[shard, recorded.sequence] = await self._send([recorded])
            reasons = [self._settled[shard, recorded.sequence] for recorded in batch]
        for recorded in batch:
            self._settled.pop((shard, recorded.sequence), None)
        return [
            Refused(recorded=recorded, reason=reason) for recorded, reason in zip(batch, reasons, strict=True) if reason
        ]

    async def close(self) -> None:
        await self._transport.aclose()

    async def _send(self, batch: Sequence[Recorded]) -> str | None:
        """One call. None: taken; else why not, for good. Raises SinkDown."""
        body, headers = self._message(batch)
        try:
            async with asyncio.timeout(TOTAL_S):
                response = await self._call(body, headers)
        except httpx2.ConnectError as error:
            raise SinkDown(f"cannot connect: {error}") from None  # it names the host at most, or the certificate
        except (httpx2.HTTPError, TimeoutError) as error:
            raise SinkDown(f"no answer: {type(error).__name__}") from None
        await _drain(response)
        return _verdict(response.status_code, _retry_after_s(response.headers.get("retry-after"), self._now_s()))

    def _message(self, batch: Sequence[Recorded]) -> tuple[bytes, dict[str, str]]:
        events = [cloud_event(recorded, self._source) for recorded in batch]
        if self._batched:
            ids = "\0".join(recorded.event.id for recorded in batch)
            message_id, media_type = f"batch-{hashlib.sha256(ids.encode()).hexdigest()[:32]}", "cloudevents-batch+json"
            body = orjson.dumps(events)
        else:
            message_id, media_type = batch[0].event.id, "cloudevents+json"
            body = orjson.dumps(events[0])
        timestamp = str(int(self._now_s()))
        return body, {
            "content-type": f"application/{media_type}",
            "user-agent": "serve-app",
            "webhook-id": message_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": " ".join(sign(secret, message_id, timestamp, body) for secret in self._secrets),
        }

    async def _call(self, body: bytes, headers: dict[str, str]) -> httpx2.Response:
        name = self._url.raw_host.decode("ascii")
        addresses = await self._addresses(name)
        for last, address in enumerate(addresses, 1 - len(addresses)):
            request = httpx2.Request(
                "POST",
                self._url.copy_with(host=address),
                headers=headers | {"host": self._url.netloc.decode("ascii")},
                content=body,
                extensions={
                    "sni_hostname": name,  # whose certificate is asked for, and checked
                    "timeout": httpx2.Timeout(TOTAL_S, connect=CONNECT_S).as_dict(),
                },
            )
            try:
                return await self._transport.handle_async_request(request)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if last == 0:
                    raise
        raise SinkDown("its name has no address")

    async def _addresses(self, name: str) -> list[str]:
        """Of the name, at this moment; all of them are checked, or none is used."""
        try:
            async with asyncio.timeout(CONNECT_S):
                addresses = await self._resolve(name, self._url.port or (443 if self._url.scheme == "https" else 80))
        except (OSError, UnicodeError):  # TimeoutError is an OSError
            raise SinkDown("its name cannot be resolved") from None
        if not self._allow_private and not all(map(is_public, addresses)):
            raise SinkDown("its name leads to an address that is not public: mend the name, or set allow_private")
        return addresses


def is_public(address: str) -> bool:
    """Whether it is a host's on the Internet: not private, local, shared, multicast, reserved or translated."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip not in _GLOBAL_UNICAST:
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or any(ip in net for net in _NO_HOSTS))


def sign(secret: bytes, message_id: str, timestamp: str, body: bytes) -> str:
    """One signature of Standard Webhooks."""
    digest = hmac.digest(secret, f"{message_id}.{timestamp}.".encode() + body, "sha256")
    return f"v1,{base64.b64encode(digest).decode('ascii')}"


def _secrets(text: str) -> list[bytes]:
    """No message quotes it: it is a secret, even if it is a wrong one."""
    if text.startswith("env:"):
        variable = text.removeprefix("env:")
        text = os.environ.get(variable, "")
        if not text:
            raise SinkUnfit(f"the environment has no {variable}, which is to hold its secret")
    secrets = [_secret(word) for word in text.split()]
    if not secrets:
        raise SinkUnfit("a webhook needs a secret, else anybody could send bills in our name")
    return secrets


def _secret(word: str) -> bytes:
    encoded = word.removeprefix("whsec_")
    try:
        secret = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError:
        secret = b""
    if encoded == word or not 24 <= len(secret) <= 64:  # the bounds are Standard Webhooks'
        raise SinkUnfit("its secret must be whsec_ and the base64 of 24 to 64 random bytes")
    return secret


def _verdict(status: int, retry_after_s: float | None) -> str | None:
    if 200 <= status < 300:
        return None
    if 300 <= status < 400:
        raise SinkDown(
            f"HTTP {status}: redirects are not followed; set the url it leads to", retry_after_s=retry_after_s
        )
    if status in MISCONFIGURED:
        raise SinkDown(f"HTTP {status}: check its url, secret and mode", retry_after_s=retry_after_s)
    if status in TRY_AGAIN or not 400 <= status < 500:
        raise SinkDown(f"HTTP {status}", retry_after_s=retry_after_s)
    return f"HTTP {status}"


def _retry_after_s(value: str | None, now_s: float) -> float | None:
    """Seconds, or a date."""
    if value is None:
        return None
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (date if date.tzinfo else date.replace(tzinfo=dt.UTC)).timestamp() - now_s)


async def _drain(response: httpx2.Response) -> None:
    left = DRAIN_BYTES
    try:
        with contextlib.suppress(httpx2.HTTPError, TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                async for part in response.aiter_raw():
                    left -= len(part)
                    if left < 0:
                        break
    finally:
        await response.aclose()

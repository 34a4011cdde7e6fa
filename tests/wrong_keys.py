"""Keys that must not let anybody in, and whether how long their refusal takes tells how close one was.

`scripts/prove keys` runs this at full size; the suite, a seeded part of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import httpx2 as httpx

from serve_app.accounts import Accounts
from serve_app.api import build_app
from serve_app.core import keys
from serve_app.core.errors import InvalidAPIKey
from serve_app.core.keys import ApiKey, Plan, Workspace
from serve_app.stores import Store
from tests.service.fakes import CARD, FakeModel, FakeModels, now_ms, service_over

KINDS = ("malformed", "truncated", "expired", "revoked", "foreign")
PAIR = 50  # refusals that are timed of the same keys
SHARED = 24  # characters that a near miss has in common with the right key
WORKSPACE = Workspace(id="ws", name="test", plan=Plan.PRO, created_ms=0)


async def add_key(store: Store, text: str, **fields: int) -> ApiKey:
    id = f"key_{keys.digest(text)[:16]}"
    key = ApiKey(id=id, workspace="ws", name="test", digest=keys.digest(text), created_ms=0, **fields)  # type: ignore[arg-type]
    await store.put_key(key)
    return key


async def wrong_headers(store: Store, right: str, count: int, chance: random.Random) -> list[str]:
    """So many `Authorization` headers, of each kind as many."""
    headers = []
    for number in range(count):
        text = keys.mint(chance.randbytes(keys.SECRET_BYTES))
        match KINDS[number % len(KINDS)]:
            case "malformed":
                headers.append(chance.choice(list(_malformed(right, chance))))
            case "truncated":
                headers.append(f"Bearer {right[: chance.randrange(len(right))]}")
            case "expired":
                await add_key(store, text, expires_ms=now_ms() - chance.randrange(10**10))
                headers.append(f"Bearer {text}")
            case "revoked":
                await add_key(store, text, revoked_ms=now_ms() - chance.randrange(10**10))
                headers.append(f"Bearer {text}")
            case "foreign":
                headers.append(f"Bearer {text}")
    return headers


def _malformed(right: str, chance: random.Random) -> Iterator[str]:
    at, other = chance.randrange(len(right)), chance.choice("0aZ-_é")
    if other != right[at]:
        yield f"Bearer {right[:at]}{other}{right[at + 1 :]}"
    yield f"Bearer {right}{other}"
    yield f"Bearer {right} {right}"
    yield f"Basic {right}"
    yield f"Bearer{right}"
    yield right
    yield f"Bearer {right.swapcase()}"
    yield f"Bearer sk-{chance.randbytes(24).hex()}"
    yield "Bearer"
    yield ""


async def answers(store: Store, headers: Sequence[str]) -> set[tuple[int, bytes]]:
    """What they are answered with: status and body, each once."""
    app = build_app(service_over(FakeModels(FakeModel()), store=store), max_body_bytes=10_000)
    told = set()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        for header in headers:
            raw = [(b"authorization", header.encode())]
            answer = await http.post("/v1/embeddings", json={"model": CARD.id, "input": "a"}, headers=raw)
            told.add((answer.status_code, answer.content))
    return told


def near_miss(right: str, chance: random.Random) -> str:
    """A well-formed key that begins as the right one does."""
    body_at = len(keys.PREFIX)
    rest = keys.mint(chance.randbytes(keys.SECRET_BYTES))[body_at + SHARED : -6]
    body = right[body_at : body_at + SHARED] + rest
    return keys.PREFIX + body + keys._checksum(body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Refusals, measured in turns drawn by chance. z: of the Mann-Whitney rank test, near beside far.

    control: the largest of the same between keys of one kind, for bursts of a busy machine are not independent.
    """

    near_us: float
    far_us: float
    z: float
    control: float

    @property
    def told_apart(self) -> bool:
        """At one in ten thousand by chance, and twice as clearly as keys of one kind are."""
        return abs(self.z) > max(3.9, 2 * self.control)


async def timing(store: Store, right: str, count: int, chance: random.Random, *, warm: bool) -> Timing:
    """Keys that begin as the right one beside keys that do not. warm: looked up before, else never seen."""
    known = Accounts(store, now_ms=now_ms, patience_s=30)
    makers: list[Callable[[], str]] = [
        lambda: near_miss(right, chance),
        lambda: keys.mint(chance.randbytes(keys.SECRET_BYTES)),
    ] * 2
    taken: list[list[float]] = [[] for _ in makers]
    for _ in range(len(makers) * count // 2 // PAIR):
        # All of them before the clock starts, for making one warms a cache; in an order drawn by chance, for what was
        # looked up last is found a little faster; and warm ones are not used for long, for two digests may differ in
        # how fast a dict finds them.
        fixed = {which: makers[which]() for which in chance.sample(range(4), 4)}
        asked = [(which, fixed[which] if warm else makers[which]()) for which in chance.choices(range(4), k=PAIR)]
        for text in fixed.values():
            with contextlib.suppress(InvalidAPIKey):
                await known.authenticate(f"Bearer {text}")
        for which, text in asked:
            header = f"Bearer {text}"
            start = time.perf_counter_ns()
            try:
                await known.authenticate(header)
            except InvalidAPIKey:
                taken[which].append((time.perf_counter_ns() - start) / 1000)
    await known.close()
    near, far = taken[0] + taken[2], taken[1] + taken[3]
    return Timing(
        near_us=statistics.median(near),
        far_us=statistics.median(far),
        z=rank_test(near, far),
        control=max(abs(rank_test(taken[0], taken[2])), abs(rank_test(taken[1], taken[3]))),
    )


def rank_test(one: Sequence[float], other: Sequence[float]) -> float:
    """Mann-Whitney's U as a standard normal deviate: 0 where neither tends to be larger."""
    values = sorted([(value, 0) for value in one] + [(value, 1) for value in other])
    ranks, at, ties = [0.0, 0.0], 0, 0.0
    while at < len(values):
        end = at
        while end < len(values) and values[end][0] == values[at][0]:
            end += 1
        for _, which in values[at:end]:
            ranks[which] += (at + 1 + end) / 2
        ties += (end - at) ** 3 - (end - at)
        at = end
    n, m = len(one), len(other)
    total = n + m
    u, mean = ranks[0] - n * (n + 1) / 2, n * m / 2
    deviation = math.sqrt(n * m / 12 * (total + 1 - ties / (total * (total - 1))))
    return (u - mean) / deviation if deviation else 0.0


async def revocations(open_store: Callable[[], Store], store: Store, trials: int, chance: random.Random) -> float:
    """The longest time until three ingresses refuse a key that was revoked, each asked 20 times a second. Seconds."""
    ingresses = [Accounts(open_store(), now_ms=now_ms, patience_s=30) for _ in range(3)]

    async def trial() -> float:
        text = keys.mint(chance.randbytes(keys.SECRET_BYTES))
        key = await add_key(store, text)
        await asyncio.sleep(4 * chance.random())
        for ingress in ingresses:
            await ingress.authenticate(f"Bearer {text}")
        await asyncio.sleep(2 * chance.random())
        await store.put_key(replace(key, revoked_ms=now_ms()))
        revoked_s = time.monotonic()
        return max(await asyncio.gather(*(_refused(ingress, text, revoked_s) for ingress in ingresses)))

    longest_s = max(await asyncio.gather(*(trial() for _ in range(trials))))
    for ingress in ingresses:
        await ingress.close()
    return longest_s


async def _refused(ingress: Accounts, text: str, since_s: float) -> float:
    while True:
        try:
            await ingress.authenticate(f"Bearer {text}")
        except InvalidAPIKey:
            return time.monotonic() - since_s
        await asyncio.sleep(0.05)

"""The arithmetic of the whole: what a load asks of each resource, what one of it can do, and how many that takes.

What an ingress sends in a call comes from the slice (`runs.py`); all else is linear in the load. A cluster of cells is
so many clusters of their own, workspaces divided among them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from serve_app.accounts import KNOWN_S, USED_MS
from serve_app.books import INLINE_BYTES
from serve_app.core.ledger import SHARDS
from serve_app.throttle import REPORT_S
from simulation.constants import Constants
from simulation.load import Mix

DAY_S = 86_400
BATCH = 32  # of `deployments/idempotency.py`, which imports Ray: a test compares them
MOST_DESKS = 64  # of `core.settings.IdempotencySettings.shards`
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What there is, and what comes. primaries: of Redis, in each cell; the present driver speaks to one."""

    requests_per_s: float
    gpus: int
    cells: int = 1
    primaries: int = 1
    replicas_per_gpu: int = 1
    counted: int | None = None
    """Replicas that an ingress counts with when it decides what may leave; None: all of its cell, as it does now."""
    desks: int = MOST_DESKS
    keys: int = 10_000
    """API keys that are in use at once."""
    calls: float = 1.0
    """Of Ray, per request."""
    target: float = 0.7
    """How busy what is sized by this may be."""
    keep_days: float = 35.0
    """Events stay in the store so long: the usage actor's `keep_days`."""
    inline_bytes: int = INLINE_BYTES
    """Replies up to this lie in the store."""

    @property
    def replicas(self) -> int:
        """Of a cell."""
        return max(1, round(self.gpus * self.replicas_per_gpu / self.cells))


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """On one resource. have: None for what is added as needed."""

    resource: str
    demand: float
    unit: str
    one: float
    have: float | None
    target: float

    @property
    def needed(self) -> int:
        return math.ceil(self.demand / self.one / self.target)

    @property
    def saturated(self) -> bool:
        return self.have is not None and self.demand >= self.have * self.one


def ingress_ms(mix: Mix, costs: Constants, calls: float) -> float:
    """CPU of an ingress for a request, its calls included."""
    tokenize_ms = costs.tokenize_us / 1000 * mix.tokens
    return costs.ingress_ms + tokenize_ms + costs.render_us / 1000 * mix.vectors + costs.hop_ms * calls


def ingress_loop_ms(mix: Mix, costs: Constants, calls: float) -> float:
    """Of that, what runs on its one event loop: tokenizing long requests has a thread of its own."""
    long_tokens = mix.tokens - mix.short_part * mix.short_tokens
    return ingress_ms(mix, costs, calls) - costs.tokenize_us / 1000 * long_tokens


def ingresses(fleet: Fleet, mix: Mix, costs: Constants) -> int:
    """Processes, by what is busier: their loops, or their tokenizing threads."""
    busiest_ms = max(ingress_loop_ms(mix, costs, fleet.calls), costs.tokenize_us / 1000 * mix.tokens)
    room = 1 - (costs.status_ms / 1000) / fleet.target  # a second of each goes, in part, into asking for the status
    return math.ceil(fleet.requests_per_s * busiest_ms / 1000 / fleet.target / room)


def store_steps(fleet: Fleet, mix: Mix, costs: Constants) -> tuple[float, float]:
    """(scripts/s, reads/s) at all stores together: bills, claims, rate limits; keys that are looked up.

    A key that asks at many ingresses is looked up and reported at each of them.
    """
    per_s = fleet.requests_per_s
    seen = fleet.keys * max(1.0, ingresses(fleet, mix, costs) / fleet.cells)  # pairs of a key and an ingress
    each = per_s / seen
    reports = min(per_s, seen * (1 - math.exp(-each * REPORT_S)) / REPORT_S)
    lookups = seen / (KNOWN_S + 1 / each)
    uses = min(per_s, seen / (USED_MS / 1000))
    return per_s * (1 + mix.keyed_part) + reports + uses, 2 * lookups


def kept_bytes(fleet: Fleet, mix: Mix, costs: Constants) -> float:
    """In all stores together, once the retention is over: events, and a day of replies."""
    short, long = 4 * costs.dimensions, 4 * costs.dimensions * mix.texts
    inline = sum(
        part * size
        for part, size in ((mix.short_part, short), (1 - mix.short_part, long))
        if size <= fleet.inline_bytes
    )
    records = mix.keyed_part * DAY_S * (costs.record_bytes + inline)
    return fleet.requests_per_s * (costs.event_bytes * DAY_S * fleet.keep_days + records)


def network_gbit(fleet: Fleet, mix: Mix, costs: Constants) -> tuple[float, float]:
    """(at the ingresses, at the GPUs), each the busier of its two directions."""
    vectors = 4 * costs.dimensions * mix.vectors
    ids = 4 * mix.tokens + costs.unit_bytes * fleet.calls
    into = costs.text_bytes * mix.tokens + costs.headers + vectors
    out = ids + costs.headers + vectors * 4 / 3
    return tuple(fleet.requests_per_s * 8 * size / 1e9 for size in (max(into, out), max(ids, vectors)))  # type: ignore[return-value]


def demands(fleet: Fleet, mix: Mix, costs: Constants) -> Iterator[Demand]:
    per_s, cells, processes = fleet.requests_per_s, fleet.cells, ingresses(fleet, mix, costs)
    steps, reads = store_steps(fleet, mix, costs)
    at_ingress, at_gpus = network_gbit(fleet, mix, costs)
    cores = per_s * ingress_ms(mix, costs, fleet.calls) / 1000 + processes * costs.status_ms / 1000

    def row(resource: str, demand: float, unit: str, one: float, have: float | None = None, at: float = 1.0) -> Demand:
        return Demand(resource=resource, demand=demand, unit=unit, one=one, have=have, target=at)

    busy, replicas = fleet.target, fleet.gpus * fleet.replicas_per_gpu
    yield row("GPUs", per_s * mix.tokens, "tokens/s", costs.gpu_tokens, fleet.gpus, busy)
    replica_cores = per_s * fleet.calls * (costs.hop_ms + costs.replica_ms) / 1000
    yield row("replica event loops", replica_cores, "cores", 1, replicas, busy)
    yield row("ingress processes", processes * busy, "loops", 1, None, busy)
    yield row("ingress cores", cores, "cores", 1, None, busy)
    yield row("HAProxy", per_s * costs.haproxy_ms / 1000, "cores", costs.haproxy_threads, None, busy)
    yield row("NICs of ingress nodes", at_ingress, "Gbit/s", costs.nic_gbit, None, busy)
    yield row("NICs of GPU nodes", at_gpus, "Gbit/s", costs.nic_gbit, fleet.gpus / 8, busy)
    stores = cells * fleet.primaries
    yield row("Redis, its one thread", steps + reads * costs.redis_steps / costs.redis_reads, "scripts/s",
              costs.redis_steps, stores, busy)  # fmt: skip
    yield row("Redis, memory", kept_bytes(fleet, mix, costs) / GIB, "GiB", costs.primary_gib, stores, busy)
    yield row(
        "idempotency actors", desk_calls(fleet, mix, costs), "calls/s", costs.desk_calls, cells * fleet.desks, busy
    )
    yield row("usage actor", per_s * costs.usage_us / 1e6, "cores", 1, cells, busy)
    yield row("Serve controller, status", processes * costs.controller_ms / 1000, "cores", 1, cells, busy)
    yield row("Serve controller, long polls", 2.0 * processes + replicas, "calls", costs.long_polls, cells)
    yield row("actors in the GCS", 1.0 * processes + replicas, "actors", costs.actors, cells)


def desk_calls(fleet: Fleet, mix: Mix, costs: Constants) -> float:
    """Calls of all idempotency actors: an ingress gathers what comes while one call to an actor is under way."""
    steps = 2 * mix.keyed_part * fleet.requests_per_s
    pairs = max(1.0, ingresses(fleet, mix, costs) * fleet.desks)  # each ingress of a cell, each actor there
    gathered = steps / pairs / costs.desk_calls * 32  # it answered so many at 32 in flight
    return steps / min(BATCH, max(1.0, gathered))


def limits(fleet: Fleet, mix: Mix, costs: Constants) -> dict[str, float]:
    """Requests/s at which each resource that does not grow with the load saturates, the first one first."""
    names = [it.resource for it in demands(fleet, mix, costs) if it.have is not None]
    return dict(sorted(((name, _limit(name, fleet, mix, costs)) for name in names), key=lambda it: it[1]))


def _limit(resource: str, fleet: Fleet, mix: Mix, costs: Constants) -> float:
    low, high = 0.0, 1e12
    for _ in range(100):
        middle = math.sqrt(max(low, 1e-3) * high)
        rows = demands(replace(fleet, requests_per_s=middle), mix, costs)
        saturated = next(it.saturated for it in rows if it.resource == resource)
        low, high = (low, middle) if saturated else (middle, high)
    return high


def cells_for(fleet: Fleet, mix: Mix, costs: Constants) -> Fleet:
    """As many cells as keep everything that a cell has one of within the target; at least a GPU in each."""
    for cells in range(fleet.cells, fleet.gpus + 1):
        one = replace(fleet, cells=cells)
        if all(it.have is None or it.needed <= it.have for it in demands(one, mix, costs) if it.resource not in _SIZED):
            return one
    return replace(fleet, cells=fleet.gpus)


_SIZED = ("GPUs", "replica event loops", "NICs of GPU nodes")  # no number of cells changes these
REDIS_CLUSTER_PRIMARIES = SHARDS  # the ledger's shards are hash tags: each lies on one primary, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """USD per million tokens. gpus: that are needed, by tokens or by the event loops of their replicas."""

    gpus: int
    gpu: float
    ingress: float
    store: float
    network: float

    @property
    def total(self) -> float:
        return self.gpu + self.ingress + self.store + self.network


def cost(fleet: Fleet, mix: Mix, costs: Constants) -> Cost:
    """Of what the load needs at the target, not of what the fleet happens to have."""
    need = {it.resource: it.needed for it in demands(fleet, mix, costs)}
    millions_per_hour = fleet.requests_per_s * mix.tokens * 3600 / 1e6
    gpus = max(need["GPUs"], math.ceil(need["replica event loops"] / fleet.replicas_per_gpu))
    primaries = max(need["Redis, its one thread"], need["Redis, memory"], fleet.cells)
    cores = max(need["ingress cores"], need["ingress processes"]) + need["HAProxy"] * costs.haproxy_threads
    answer_bytes = costs.headers + 4 * costs.dimensions * mix.vectors * 4 / 3
    return Cost(
        gpus=gpus,
        gpu=gpus * costs.gpu_usd / millions_per_hour,
        ingress=cores * costs.core_usd / millions_per_hour,
        store=primaries * costs.primary_usd / millions_per_hour,
        network=fleet.requests_per_s * 3600 * answer_bytes / 1e9 * costs.traffic_usd / millions_per_hour,
    )

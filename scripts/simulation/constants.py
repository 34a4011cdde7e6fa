"""What one thing costs or can do: each with its unit, and whether it was measured, published, derived or assumed.

All can be set by arguments; what is set so is marked as given. `measure.py` measures the cheap ones anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, NamedTuple


class Origin(StrEnum):
    MEASURED = "measured"
    PUBLISHED = "published"
    DERIVED = "derived"
    ASSUMED = "assumed"
    GIVEN = "given"


class Row(NamedTuple):
    name: str
    value: float
    unit: str
    origin: Origin
    how: str


def _constant(value: float, unit: str, origin: Origin, how: str) -> Any:
    return field(default=value, metadata={"unit": unit, "origin": origin, "how": how})


def _measured(value: float, unit: str, how: str) -> Any:
    return _constant(value, unit, Origin.MEASURED, how)


def _published(value: float, unit: str, how: str) -> Any:
    return _constant(value, unit, Origin.PUBLISHED, how)


def _derived(value: float, unit: str, how: str) -> Any:
    return _constant(value, unit, Origin.DERIVED, how)


def _assumed(value: float, unit: str, how: str) -> Any:
    return _constant(value, unit, Origin.ASSUMED, how)


_BY_PROCESS = "CPU by process (/proc/PID/stat) while `scripts/bench` has short queries in flight"
_HERE = "`scripts/simulate --measure`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Of a development machine with 2 virtual cores (AMD EPYC, Zen 5), unless it says otherwise."""

    # an ingress
    ingress_ms: float = _measured(1.0, "CPU ms/request", _BY_PROCESS + ", calls left out")
    tokenize_us: float = _measured(2.8, "CPU us/token", _HERE)
    render_us: float = _measured(11.0, "CPU us/vector", _HERE)
    status_ms: float = _measured(
        25.0, "CPU ms/call of serve.status()", "an idle ingress: 2.5 % of a core, a call a second"
    )
    # a call of Ray Serve, a unit each
    hop_ms: float = _measured(2.0, "CPU ms/call and side", _BY_PROCESS)
    replica_ms: float = _measured(0.5, "CPU ms/call, event loop and poller", _BY_PROCESS)
    # the rest of the way
    haproxy_ms: float = _measured(0.13, "CPU ms/request", _BY_PROCESS)
    haproxy_threads: float = _assumed(8, "threads of a HAProxy", "one HAProxy a node, nbthread of the operator's")
    wire_ms: float = _assumed(0.1, "ms, one way", "two hosts of one data centre")
    settle_ms: float = _measured(0.8, "ms", "`scripts/bench books`: p50 of a lone request, Redis against no bills")
    spread: float = _assumed(0.3, "sigma of a burst's time", "lognormal; README: at 32 in flight p99 is 1.4 times p50")
    # a GPU
    gpu_tokens: float = _published(1.6e6, "tokens/s", "BERT-base on one H200: Snowflake's ArcticInference")
    launch_ms: float = _assumed(3.0, "ms/batch", "kernels of 12 layers, one after the other")
    # a CPU as the device, for the comparison with the measurement
    forward_ms: float = _derived(3.5, "CPU ms/forward", "README and CHANGELOG: the line through the two figures below")
    forward_us: float = _derived(
        90.0, "CPU us/token", "short texts/s in process: 1,231 in units of ten, 1,525 in full ones"
    )
    client_ms: float = _measured(0.3, "CPU ms/request", "the client of `scripts/bench`, on the same cores")
    idle_cores: float = _measured(0.2, "cores", "README: an idle service")
    # stores and books
    redis_pairs: float = _measured(7290, "begin + complete /s", "`scripts/bench books`")
    redis_reads: float = _published(100_000, "GET/s", "redis-benchmark, Redis's documentation")
    desk_calls: float = _measured(1705, "calls/s of one async actor", "32 in flight, 100 bytes a call")
    event_bytes: float = _measured(690, "bytes/event in Redis", "a stream of a million events")
    record_bytes: float = _assumed(500, "bytes/kept key in Redis, beside the reply", "a hash and three entries of sets")
    primary_gib: float = _assumed(256, "GiB of a Redis primary", "a large instance")
    usage_us: float = _measured(39.0, "CPU us/event", _HERE + ": the jsonl sink alone")
    # Ray
    controller_ms: float = _assumed(5.0, "CPU ms/serve.status()", "a fifth of what its caller pays")
    long_polls: float = _published(15_000, "calls at once at the controller", "Ray 2.60's source")
    actors: float = _published(40_000, "actors of a cluster", "Ray's release benchmarks")
    # bytes
    unit_bytes: float = _measured(410, "bytes of a call beside ids", _HERE)
    headers: float = _assumed(700, "bytes/request, both ways", "HTTP headers and JSON around texts and vectors")
    text_bytes: float = _measured(4.9, "bytes of text/token", _HERE + ": the passages of `scripts/bench`")
    dimensions: float = _published(768, "of a vector", "BERT-base")
    nic_gbit: float = _assumed(25, "Gbit/s of a node's NIC, each way", "a common instance")
    node_cores: float = _assumed(32, "cores of an ingress node", "a common instance")
    # money
    gpu_usd: float = _assumed(3.00, "USD/GPU-hour", "a rented H200")
    core_usd: float = _assumed(0.04, "USD/core-hour", "a common instance")
    primary_usd: float = _assumed(0.50, "USD/hour", "a Redis primary and its replica, fast disks")
    traffic_usd: float = _assumed(0.01, "USD/GB to clients", "clients in another zone of the same region")

    @property
    def redis_steps(self) -> float:
        """Scripts a second of one primary: a pair is two."""
        return 2 * self.redis_pairs

    def rows(self) -> Iterator[Row]:
        """With what was set to something else marked as given."""
        for it in fields(self):
            value, meta = getattr(self, it.name), it.metadata
            origin = meta["origin"] if value == it.default else Origin.GIVEN
            yield Row(it.name, value, meta["unit"], origin, meta["how"])

    def given(self, values: Mapping[str, float]) -> Constants:
        """Raises ValueError for a name that is none, or a value that is not positive."""
        if unknown := values.keys() - {it.name for it in fields(self)}:
            raise ValueError(f"no such constant: {', '.join(sorted(unknown))}")
        if wrong := [name for name, value in values.items() if not value >= 0]:
            raise ValueError(f"not a cost or a rate: {', '.join(wrong)}")
        return replace(self, **dict(values))

"""What is printed: constants, slices, the table of resources, what saturates first, the answer to it, and the costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from simulation.capacity import Cost, Fleet, demands, ingresses, limits
from simulation.constants import Constants
from simulation.load import Mix
from simulation.runs import Outcome, percentile
from simulation.sizing import MEASURED_IN_FLIGHT, MEASURED_PER_S, Sized

MOST_UNITS = 256  # `encoder.MAX_UNITS_AT_A_REPLICA`; what is more waits in the ingress, where nobody packs it again
HURTS = 2.0  # times the lowest


def constants(costs: Constants) -> Iterator[str]:
    for row in costs.rows():
        yield f"| {row.name} | {row.value:,g} | {row.unit} | {row.origin} | {row.how} |"


def sanity(outcome: Outcome) -> str:
    error = 100 * (outcome.per_s / MEASURED_PER_S - 1)
    waits = [1000 * percentile(outcome.latencies_s, percent) for percent in (50, 99)]
    return (
        f"Model against measurement: {MEASURED_IN_FLIGHT} short queries in flight on two cores: {outcome.per_s:.0f} "
        f"req/s (p50 {waits[0]:.0f} ms, p99 {waits[1]:.0f} ms, {outcome.texts:.0f} texts a call); "
        f"measured {MEASURED_PER_S:.0f}: {error:+.0f} %."
    )


def slices(rows: Sequence[Sized], mix: Mix, costs: Constants) -> Iterator[str]:
    yield "| replicas that an ingress counts with | ingresses | calls/request | texts/call | batch, of a full one | ingress CPU use | replica loop | GPU | units at a replica, most | wait p50 / p99 ms | latency p50 / p99 ms | settles |"  # noqa: E501
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        it = row.outcome
        waits, latencies = (
            " / ".join(f"{1000 * percentile(values, percent):.0f}" for percent in (50, 99))
            for values in (it.waits_s, it.latencies_s)
        )
        yield (
            f"| {row.counted:,} | {ingresses(row.fleet, mix, costs):,} | {it.calls:.2f} | {it.texts:.1f} | "
            f"{it.fill:.0%} | {max(it.ingress_use, it.tokenizer_use):.0%} | {it.replica_use:.0%} | "
            f"{it.device_use:.0%} | {it.most_units} | {waits} | {latencies} | "
            f"{'yes' if it.settles else 'no: it grows'} |"
        )


def hurts(rows: Sequence[Sized]) -> str:
    """From which size on what an ingress cannot see of the others' requests costs."""
    fewest = min(row.outcome.calls for row in rows)
    fastest = min(percentile(row.outcome.waits_s, 50) for row in rows)
    calls = next((row for row in rows if row.outcome.calls >= HURTS * fewest), None)
    slow = next((row for row in rows if percentile(row.outcome.waits_s, 50) >= HURTS * fastest), None)
    full = next((row for row in rows if row.outcome.most_units > MOST_UNITS), None)
    says = [
        f"calls a request double at {calls.counted:,} replicas" if calls else "calls a request do not double",
        f"the median wait doubles at {slow.counted:,}" if slow else "nor does the median wait",
    ]
    if full:
        says.append(
            f"from {full.counted:,} on more than {MOST_UNITS} units are at a replica, which Serve does not let in"
        )
    return f"An ingress packs its own requests only: {'; '.join(says)}."


def table(fleet: Fleet, mix: Mix, costs: Constants, resource: str) -> Iterator[str]:
    limit = limits(fleet, mix, costs)
    order = {name: place for place, name in enumerate(limit, start=1)}
    yield f"| {resource} | demand | capacity of one | needed | there are | serves, req/s | order of saturation |"
    yield "|---|---|---|---|---|---|---|"
    for it in demands(fleet, mix, costs):
        have, serves = ("as needed", "") if it.have is None else (f"{it.have:,.0f}", _number(limit[it.resource]))
        yield (
            f"| {it.resource} | {_number(it.demand)} {it.unit} | {_number(it.one)} | {it.needed:,} | {have} | "
            f"{serves} | {order.get(it.resource, '')} |"
        )


def verdict(fleet: Fleet, mix: Mix, costs: Constants) -> Iterator[str]:
    rows = {it.resource: it for it in demands(fleet, mix, costs)}
    short = [(name, per_s) for name, per_s in limits(fleet, mix, costs).items() if per_s < fleet.requests_per_s]
    if not short:
        yield "Nothing saturates at this load."
    for place, (name, per_s) in enumerate(short):
        first, it = "then" if place else "First", rows[name]
        yield f"{first}: {name}, at {_number(per_s)} req/s ({it.needed:,} are needed, there are {it.have:,.0f})."


def costs_of(named: Sequence[tuple[str, Cost]]) -> Iterator[str]:
    yield "| USD per million tokens | GPUs needed | GPU | ingress CPU | store | network | together |"
    yield "|---|---|---|---|---|---|---|"
    for name, it in named:
        parts = (it.gpu, it.ingress, it.store, it.network, it.total)
        yield f"| {name} | {it.gpus:,} | {' | '.join(f'{part:.6f}' for part in parts)} |"


def _number(value: float) -> str:
    """With three digits that count, and no more: 1,660,000."""
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    digits = 3 - math.ceil(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(0, digits)}f}"

"""The simulation keeps the laws that any queue keeps, and sends what the real dispatcher sends."""

from __future__ import annotations

import ast
import asyncio
import math
import random
from dataclasses import replace
from itertools import pairwise, takewhile
from pathlib import Path

import numpy as np
import pytest
from simulation.capacity import BATCH, Fleet, cells_for, cost, demands, ingress_loop_ms, limits
from simulation.constants import Constants, Origin
from simulation.load import Mix, arrivals
from simulation.machine import Clock, Machine, Process
from simulation.report import MOST_UNITS
from simulation.runs import Outcome, closed_loop, open_loop
from simulation.sizing import SHORT, TWO_CORES
from simulation.slice import Flight, Ingress, Replica, Shape

from serve_app.core.packing import Packed, Share
from serve_app.dispatch import Dispatcher, Unit, UnitReply

ROOT = Path(__file__).parents[1]
EVEN = Constants(spread=0.0)
CELL = Shape(ingresses=3, replicas=2, visible=2)
MIX = Mix()


def run(
    shape: Shape = CELL,
    mix: Mix = MIX,
    costs: Constants = EVEN,
    *,
    per_s: float = 400,
    seconds: float = 2.0,
    seed: int = 7,
) -> Outcome:
    return open_loop(shape, mix, costs, per_s=per_s, burst=2.0, seconds=seconds, seed=seed)


@pytest.mark.parametrize("per_s", [50, 400, 4000])  # idle, busy, far too much
def test_every_request_is_answered_exactly_once(per_s: float) -> None:
    outcome = open_loop(CELL, MIX, Constants(), per_s=per_s, burst=2.0, seconds=0.3, seed=7)
    assert len(outcome.answered) > 0.5 * per_s * 0.3
    assert set(outcome.answered) == {1}


def test_requests_in_flight_are_their_rate_times_their_time() -> None:
    outcome = run()
    mean_s = sum(outcome.latencies_s) / len(outcome.latencies_s)
    assert outcome.in_flight == pytest.approx(outcome.per_s * mean_s, rel=0.03)


def test_an_ingress_is_as_busy_as_its_requests_and_calls_make_it() -> None:
    outcome = run()
    offered = outcome.per_s / CELL.ingresses * ingress_loop_ms(MIX, EVEN, outcome.calls) / 1000
    assert outcome.ingress_use == pytest.approx(offered, rel=0.05)
    per_call_s = (EVEN.hop_ms + EVEN.replica_ms) / 1000
    assert outcome.replica_use == pytest.approx(outcome.per_s * outcome.calls / CELL.replicas * per_call_s, rel=0.05)


def test_the_same_seed_gives_the_same_figures_and_another_one_others() -> None:
    assert run(costs=Constants(), seconds=0.5) == run(costs=Constants(), seconds=0.5)
    assert run(costs=Constants(), seconds=0.5) != run(costs=Constants(), seconds=0.5, seed=8)


def test_twice_the_service_time_is_half_the_capacity() -> None:
    shape = Shape(ingresses=1, replicas=1, visible=1)
    bulk = Mix(short_part=0.0, text_tokens=500)
    slow = replace(EVEN, gpu_tokens=200_000, launch_ms=40)  # nothing else is as busy as the GPU

    def per_s(costs: Constants) -> float:
        return closed_loop(shape, bulk, costs, in_flight=16, seconds=10.0, seed=1).per_s

    assert per_s(slow) == pytest.approx(2 * per_s(replace(slow, gpu_tokens=100_000, launch_ms=80)), rel=0.05)


def test_a_batch_is_no_larger_than_a_unit_may_be_however_much_waits() -> None:
    costs = replace(EVEN, gpu_tokens=10_000)
    outcome = run(Shape(ingresses=3, replicas=1, visible=4, unit_tokens=4096), costs=costs, per_s=200, seconds=1)
    assert 0.3 < outcome.fill <= 1


def test_what_an_ingress_cannot_see_makes_its_units_small() -> None:
    shape = Shape(ingresses=4, replicas=2, visible=1)
    few, many = (run(replace(shape, visible=visible), per_s=1500, seconds=0.6) for visible in (1, 500))
    assert many.calls > 1.5 * few.calls
    assert many.texts < few.texts / 1.5
    assert many.calls == pytest.approx(1.0, abs=0.05)  # each request goes alone


def test_arrivals_have_their_rate_whatever_the_bursts_and_bursts_are_bursts() -> None:
    counts = {}
    for burst in (1.0, 4.0):
        moments = [*takewhile(lambda moment: moment < 300, arrivals(random.Random(1), 100, burst=burst))]
        assert all(one < other for one, other in pairwise(moments))
        assert len(moments) / 300 == pytest.approx(100, rel=0.05)
        tenths = np.bincount([int(10 * moment) for moment in moments])
        counts[burst] = tenths.var() / tenths.mean()
    assert counts[1.0] == pytest.approx(1.0, abs=0.15)  # as Poisson has it
    assert counts[4.0] > 2
    with pytest.raises(ValueError, match="a burst is 1 to 10 times"):
        next(arrivals(random.Random(1), 100, burst=11))


def test_processes_that_share_a_core_take_turns_and_lose_nothing() -> None:
    clock, machine, order = Clock(), Machine(1), list[tuple[str, float]]()
    for name in ("a", "b"):
        process = Process(clock, machine)
        for _ in range(2):
            process.do(1.0, lambda name=name: order.append((name, clock.now_s)))  # type: ignore[misc]
    clock.run()
    assert order == [("a", 1.0), ("b", 2.0), ("a", 3.0), ("b", 4.0)]


def test_bursts_vary_around_their_mean() -> None:
    clock = Clock(spread=0.5, seed=1)
    taken = [clock.varied(2.0) for _ in range(20_000)]
    assert sum(taken) / len(taken) == pytest.approx(2.0, rel=0.02)
    assert np.log(taken).std() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("tokens", [14, 2000])  # of a request: express, bulk
@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("requests", [1, 4, 60])
async def test_the_same_units_leave_as_from_the_real_dispatcher(
    tokens: int, at_once: int, replicas: int, requests: int
) -> None:
    assert sent_here(tokens, at_once, replicas, requests) == await really_sent(tokens, at_once, replicas, requests)


def sent_here(tokens: int, at_once: int, replicas: int, requests: int) -> list[int]:
    """Tokens of the units that leave before any is answered."""
    units: list[int] = []

    class Silent(Replica):
        def take(self, unit: object) -> None:
            units.append(unit.tokens)  # type: ignore[attr-defined]

    shape = Shape(
        ingresses=1, replicas=1, visible=replicas, crowded=False, express_at_once=at_once, bulk_at_once=at_once
    )
    clock = Clock()
    ingress = Ingress(clock, shape, EVEN, [Silent(clock, shape, EVEN, Process(clock), None)], 1, None)
    for _ in range(requests):
        ingress.take(Flight(lengths=[tokens], share=Share(), came_s=0.0, answered=lambda: None))
    clock.run()
    return units


async def really_sent(tokens: int, at_once: int, replicas: int, requests: int) -> list[int]:
    units: list[int] = []

    async def send(unit: Unit) -> UnitReply:
        units.append(unit.packed.tokens)
        await asyncio.Event().wait()
        raise AssertionError("nothing is answered here")

    dispatcher = Dispatcher(
        send,
        fingerprint="",
        dimensions=1,
        unit_tokens=16_384,
        unit_sequences=682,
        at_once=lambda express: at_once,
        max_pending_tokens=10**9,
    )
    dispatcher.replicas = replicas
    packed = Packed(ids=np.zeros(tokens, np.int32), lengths=np.array([tokens], np.int32))
    calls = [asyncio.ensure_future(dispatcher.encode(packed)) for _ in range(requests)]
    await asyncio.sleep(0.01)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    return units


def test_a_resource_saturates_where_the_demand_on_it_is_all_there_is() -> None:
    fleet = Fleet(requests_per_s=1e6, gpus=1000)
    for name, per_s in limits(fleet, MIX, EVEN).items():
        for factor, saturated in ((0.99, False), (1.01, True)):
            rows = demands(replace(fleet, requests_per_s=factor * per_s), MIX, EVEN)
            assert next(it.saturated for it in rows if it.resource == name) is saturated


def test_cells_are_enough_and_no_more_than_that() -> None:
    fleet = Fleet(requests_per_s=200_000, gpus=1000, keep_days=1 / 24, inline_bytes=0, calls=0.5)
    answer = cells_for(fleet, MIX, EVEN)
    assert 1 < answer.cells < fleet.gpus
    assert min(limits(answer, MIX, EVEN).values()) > fleet.requests_per_s
    one_less = demands(replace(answer, cells=answer.cells - 1), MIX, EVEN)
    assert any(it.have is not None and it.needed > it.have for it in one_less)


def test_small_units_cost_more_and_a_token_costs_what_its_parts_cost() -> None:
    fleet = Fleet(requests_per_s=1e6, gpus=1000, cells=100)
    dear, cheap = (cost(replace(fleet, calls=calls), MIX, EVEN) for calls in (1.0, 0.1))
    assert dear.gpus > cheap.gpus
    assert dear.ingress > cheap.ingress
    gpus = math.ceil(1e6 * MIX.tokens / EVEN.gpu_tokens / fleet.target)
    assert cheap.gpus == gpus
    assert cheap.gpu == pytest.approx(gpus * EVEN.gpu_usd / (1e6 * MIX.tokens * 3600 / 1e6))
    assert cheap.total == pytest.approx(cheap.gpu + cheap.ingress + cheap.store + cheap.network)


def test_what_is_set_is_marked_as_given_and_a_name_that_is_none_is_refused() -> None:
    rows = {row.name: row for row in Constants().given({"gpu_usd": 2.0}).rows()}
    assert (rows["gpu_usd"].value, rows["gpu_usd"].origin) == (2.0, Origin.GIVEN)
    assert rows["core_usd"].origin is Origin.ASSUMED
    with pytest.raises(ValueError, match="no such constant: gpus_usd"):
        Constants().given({"gpus_usd": 2.0})
    with pytest.raises(ValueError, match="not a cost or a rate"):
        Constants().given({"gpu_usd": -1.0})


@pytest.mark.parametrize(
    ("name", "value", "file"),
    [("BATCH", BATCH, "idempotency.py"), ("MAX_UNITS_AT_A_REPLICA", MOST_UNITS, "encoder.py")],
)
def test_numbers_of_modules_that_import_ray_are_still_theirs(name: str, value: int, file: str) -> None:
    tree = ast.parse((ROOT / "serve_app" / "deployments" / file).read_text(encoding="utf-8"))
    found = [it for it in tree.body if isinstance(it, ast.Assign) and ast.unparse(it.targets[0]) == name]
    assert [ast.literal_eval(it.value) for it in found] == [value]


def test_on_two_cores_more_in_flight_means_more_answers_and_larger_units() -> None:
    alone, many = (closed_loop(TWO_CORES, SHORT, EVEN, in_flight=n, seconds=2.0, seed=1) for n in (1, 32))
    assert alone.texts == pytest.approx(1.0)
    assert many.texts > 8
    assert many.per_s > 3 * alone.per_s

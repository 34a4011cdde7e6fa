"""When a process that falls behind refuses, and when it does not."""

from __future__ import annotations

import asyncio
import time

import httpx2 as httpx
import pytest

from serve_app.api import build_app
from serve_app.core.errors import AtCapacity
from serve_app.pulse import AGAIN_S, IN_A_ROW, LATE_S, Pulse
from tests.service.fakes import AUTHORIZATION, CARD, FakeModel, FakeModels, service_over

LATE, ON_TIME = LATE_S + 1.5, LATE_S / 2


class Seconds:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


@pytest.fixture
def pulse(clock: Seconds) -> Pulse:
    return Pulse(clock)


def refuses(pulse: Pulse) -> bool:
    try:
        pulse.check()
    except AtCapacity:
        return True
    return False


def test_one_that_never_beat_refuses_nothing(pulse: Pulse) -> None:
    assert not refuses(pulse)


def test_late_beats_count_only_in_a_row(pulse: Pulse) -> None:
    for _ in range(5):
        for _ in range(IN_A_ROW - 1):
            pulse.beat(LATE)
            assert not refuses(pulse)
        pulse.beat(ON_TIME)
    for _ in range(IN_A_ROW):
        pulse.beat(LATE)
    assert refuses(pulse)


def test_it_tells_how_far_it_is_behind(pulse: Pulse) -> None:
    for _ in range(IN_A_ROW):
        pulse.beat(LATE)
    with pytest.raises(AtCapacity, match=r"2\.5 s behind") as refused:
        pulse.check()
    assert refused.value.headers() == {"Retry-After": "3", "retry-after-ms": "2500"}


def test_a_beat_on_time_lets_in_again_and_then_one_late_beat_is_enough(pulse: Pulse, clock: Seconds) -> None:
    for _ in range(IN_A_ROW):
        pulse.beat(LATE)
    assert refuses(pulse)
    pulse.beat(ON_TIME)
    assert not refuses(pulse)
    clock.now_s += AGAIN_S - 1
    pulse.beat(LATE)
    assert refuses(pulse)
    pulse.beat(ON_TIME)
    clock.now_s += AGAIN_S
    pulse.beat(LATE)
    assert not refuses(pulse), "the overload is long past: one pause is a pause again"


async def test_a_loop_that_is_held_up_beats_late() -> None:
    pulse = Pulse()
    running = asyncio.create_task(pulse.run())
    await asyncio.sleep(0.2)
    for _ in range(IN_A_ROW):
        assert not refuses(pulse)
        time.sleep(LATE_S + 0.1)  # noqa: ASYNC251 # what it is about
        for _ in range(3):
            await asyncio.sleep(0)  # the beat that was due, and the start of the next
    assert refuses(pulse)
    await asyncio.sleep(0.2)
    assert not refuses(pulse)
    running.cancel()


async def test_what_is_refused_is_neither_computed_nor_looked_up(pulse: Pulse) -> None:
    model = FakeModel()
    app = build_app(service_over(FakeModels(model), pulse=pulse), max_body_bytes=100_000)
    for _ in range(IN_A_ROW):
        pulse.beat(LATE)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        refused = await client.post("/v1/embeddings", headers=AUTHORIZATION, json={"model": CARD.id, "input": "hello"})
        stranger = await client.post("/v1/embeddings", json={"model": CARD.id, "input": "hello"})
        assert [it.status_code for it in (refused, stranger)] == [503, 503]
        assert refused.json()["error"]["code"] == "at_capacity"
        assert refused.headers["retry-after"] == "3"
        assert (await client.get("/health")).status_code == 200
        pulse.beat(ON_TIME)
        again = await client.post("/v1/embeddings", headers=AUTHORIZATION, json={"model": CARD.id, "input": "hello"})
        assert again.status_code == 200
    assert len(model.units) == 1

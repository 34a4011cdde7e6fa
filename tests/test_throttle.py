"""When an ingress decides by itself, when it asks the store, and by how much several of them may exceed a limit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from serve_app.accounts import Caller
from serve_app.core.errors import RateLimitExceeded
from serve_app.core.keys import Plan
from serve_app.core.limits import Charge, Verdict
from serve_app.core.plans import Limits, PlanLimits
from serve_app.stores import StoreDown
from serve_app.throttle import KNOWN_US, Throttle
from tests.arrivals import NEVER_S, CountedStore, arrive, caller
from tests.stores.steps import Clock

PRO = caller()
TOKENS = caller(tokens_per_minute=10_000)
Make = Callable[[], Throttle]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def counted(clock: Clock) -> CountedStore:
    return CountedStore(clock)


@pytest.fixture
def make(counted: CountedStore, clock: Clock) -> Make:
    return lambda: over(counted, clock)


def over(store: object, clock: Clock, limits: Limits | None = None, hold_s: float = 0.0) -> Throttle:
    return Throttle(store, limits or Limits(), now_us=lambda: 1000.0 * clock(), report_s=NEVER_S, hold_s=hold_s)  # type: ignore[arg-type]


async def admitted(throttle: Throttle, who: Caller, times: int = 1) -> int:
    count = 0
    for _ in range(times):
        try:
            await throttle.admit(who)
            count += 1
        except RateLimitExceeded:
            pass
    return count


async def refusal(throttle: Throttle, who: Caller) -> RateLimitExceeded:
    with pytest.raises(RateLimitExceeded) as refused:
        await throttle.admit(who)
    return refused.value


async def test_far_from_the_limit_the_store_is_asked_about_once_and_told_the_rest(
    make: Make, counted: CountedStore
) -> None:
    throttle = make()
    assert await admitted(throttle, PRO, 4) == 4
    assert counted.questions == 1, "about a key that it has not seen"
    await throttle.report()
    assert counted.questions == 2
    assert make().standing(PRO)[0].remaining == 50, "another ingress has not heard of it"
    other = make()
    await other.look(PRO)
    assert other.standing(PRO)[0].remaining == 46
    await throttle.close()


async def test_no_more_than_a_sixteenth_of_the_burst_is_admitted_unreported(make: Make, counted: CountedStore) -> None:
    throttle = make()
    await throttle.look(PRO)
    assert await admitted(throttle, PRO, 3) == 3
    assert counted.questions == 1
    assert await admitted(throttle, PRO) == 1
    assert counted.questions == 2
    await throttle.close()


async def test_near_the_limit_every_request_is_the_stores_to_admit(make: Make, counted: CountedStore) -> None:
    one, other = make(), make()
    await admitted(one, PRO, 25)
    before = counted.questions
    assert await admitted(one, PRO, 3) == 3
    assert counted.questions == before + 3
    assert await admitted(other, PRO, 30) == 22
    await one.close()
    await other.close()


async def test_what_memory_refuses_the_store_is_not_asked_about(make: Make, counted: CountedStore) -> None:
    throttle = make()
    assert await admitted(throttle, PRO, 60) == 50
    before = counted.questions
    assert await admitted(throttle, PRO, 1000) == 0
    assert counted.questions == before
    await throttle.close()


async def test_fifty_at_once_are_admitted_and_not_one_more(make: Make) -> None:
    throttles = [make() for _ in range(3)]
    came = await asyncio.gather(*(admitted(throttles[i % 3], PRO) for i in range(60)))
    assert sum(came) == 50
    for throttle in throttles:
        await throttle.close()


async def test_at_worst_each_ingress_is_a_sixteenth_of_the_burst_beyond(make: Make, clock: Clock) -> None:
    others, last = [make() for _ in range(3)], make()
    for throttle in others:
        await throttle.look(PRO)
    assert await admitted(last, PRO, 60) == 50, "nothing was reported to it"
    assert [await admitted(throttle, PRO, 10) for throttle in others] == [3, 3, 3]
    clock.tick(120 * 9)
    assert await admitted(last, PRO) == 0, "what was admitted beyond the limit is paid for"
    clock.tick(120)
    assert await admitted(last, PRO, 2) == 1
    for throttle in (*others, last):
        await throttle.close()


async def test_an_old_word_of_the_store_is_not_gone_by(make: Make, counted: CountedStore, clock: Clock) -> None:
    throttle = make()
    await throttle.admit(PRO)
    clock.tick(KNOWN_US // 1000 + 1)
    await throttle.admit(PRO)
    assert counted.questions == 2
    await throttle.close()


async def test_waiting_as_told_is_enough(make: Make, clock: Clock) -> None:
    throttle = make()
    await admitted(throttle, PRO, 50)
    wait_s = (await refusal(throttle, PRO)).retry_after_s
    assert wait_s == pytest.approx(0.12)
    clock.tick(119)
    assert await admitted(throttle, PRO) == 0
    clock.tick(1)
    assert await admitted(throttle, PRO) == 1
    await throttle.close()


async def test_who_is_refused_together_is_told_to_come_back_one_after_the_other(make: Make) -> None:
    throttle = make()
    await admitted(throttle, PRO, 50)
    waits = [(await refusal(throttle, PRO)).retry_after_s for _ in range(200)]
    assert waits[:3] == pytest.approx([0.12, 0.24, 0.36])
    assert waits[-1] == pytest.approx(0.12 + 12), "nobody waits for calls that may never come"
    await throttle.close()


async def test_a_refused_requests_tokens_cost_nothing_and_the_request_is_given_back(make: Make) -> None:
    throttle = make()
    await throttle.admit(TOKENS)
    await throttle.spend(TOKENS, 900)
    await throttle.admit(TOKENS)
    with pytest.raises(RateLimitExceeded, match=r"10,000 tokens a minute, 1,000 of them at once") as refused:
        await throttle.spend(TOKENS, 300)
    assert refused.value.retry_after_s == pytest.approx(1.2)
    requests, tokens = throttle.standing(TOKENS)
    assert requests.remaining == 49
    assert tokens is not None
    assert (tokens.limit, tokens.remaining) == (10_000, 100)
    await throttle.close()


async def test_a_key_without_a_token_budget_spends_what_it_likes(make: Make, counted: CountedStore) -> None:
    throttle = make()
    await throttle.spend(PRO, 10**9)
    assert counted.questions == 0
    assert throttle.standing(PRO)[1] is None
    await throttle.close()


@pytest.mark.parametrize(
    ("who", "limit"),
    [
        (caller(Plan.PRO), 500),
        (caller(Plan.TEAM), 5_000),
        (caller(Plan.ENTERPRISE), 10_000),
        (caller(Plan.PRO, requests_per_minute=1_000), 1_000),
        (caller(Plan.PRO, requests_per_minute=9_999), 1_000),
        (caller(Plan.ENTERPRISE, requests_per_minute=10**6), 10**6),
    ],
)
async def test_the_plan_and_the_key_say_how_much(make: Make, who: Caller, limit: int) -> None:
    assert make().standing(who)[0].limit == limit


async def test_a_new_limit_holds_at_once(counted: CountedStore, clock: Clock) -> None:
    throttle = over(counted, clock)
    assert await admitted(throttle, PRO, 60) == 50
    clock.tick(12)
    assert await admitted(throttle, caller(Plan.TEAM), 2) == 1
    await throttle.close()


async def test_who_does_not_wait_as_told_is_answered_slowly(counted: CountedStore, clock: Clock) -> None:
    throttle = over(counted, clock, hold_s=NEVER_S)
    await admitted(throttle, PRO, 50)
    told = [asyncio.create_task(throttle.admit(PRO)) for _ in range(110)]
    await asyncio.sleep(0.01)
    assert [task.done() for task in told] == [True] * 99 + [False] * 11
    assert all(isinstance(task.exception(), RateLimitExceeded) for task in told[:99])
    for task in told[99:]:
        task.cancel()
    await asyncio.gather(*told[99:], return_exceptions=True)
    clock.tick(120)
    await throttle.admit(PRO)
    assert (throttle._held, throttle._meters["key"].held) == (0, 0)
    await throttle.close()


async def test_no_more_are_held_than_there_is_room_for(
    counted: CountedStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.throttle.MOST_HELD_OF_A_KEY", 5)
    throttle = over(counted, clock, hold_s=NEVER_S)
    await admitted(throttle, PRO, 50)
    told = [asyncio.create_task(throttle.admit(PRO)) for _ in range(120)]
    await asyncio.sleep(0.01)
    assert sum(not task.done() for task in told) == 5
    for task in told:
        task.cancel()
    await asyncio.gather(*told, return_exceptions=True)
    await throttle.close()


class Broken(CountedStore):
    down = False

    async def charge(self, charges: Sequence[Charge]) -> list[Verdict]:
        if self.down:
            raise StoreDown("down")
        return await super().charge(charges)


async def test_without_a_store_each_ingress_goes_by_its_own_count(clock: Clock) -> None:
    store = Broken(clock)
    throttle = over(store, clock)
    await admitted(throttle, PRO, 10)
    store.down = True
    assert await admitted(throttle, PRO, 60) == 40
    store.down = False
    await throttle.report()
    clock.tick(120)
    assert await admitted(over(store, clock), PRO, 2) == 1, "the store has heard of all of them since"
    await throttle.close()


class Slow(CountedStore):
    gate: asyncio.Event | None = None

    async def charge(self, charges: Sequence[Charge]) -> list[Verdict]:
        if self.gate:
            await self.gate.wait()
        return await super().charge(charges)


async def test_what_is_on_its_way_to_the_store_counts(clock: Clock) -> None:
    store = Slow(clock)
    throttle = over(store, clock)
    await throttle.look(PRO)
    await admitted(throttle, PRO, 3)
    store.gate = asyncio.Event()
    report = asyncio.create_task(throttle.report())
    await asyncio.sleep(0)
    waiting = asyncio.create_task(admitted(throttle, PRO))
    await asyncio.sleep(0.01)
    assert not waiting.done(), "three are held back already"
    assert throttle.standing(PRO)[0].remaining == 47
    store.gate.set()
    assert await waiting == 1
    await report
    assert throttle.standing(PRO)[0].remaining == 46
    await throttle.close()


async def test_a_caller_that_hangs_up_while_the_store_is_asked_loses_nothing_of_what_is_owed(clock: Clock) -> None:
    store = Slow(clock)
    throttle = over(store, clock)
    await throttle.look(PRO)
    await admitted(throttle, PRO, 3)
    store.gate = asyncio.Event()
    waiting = asyncio.create_task(throttle.admit(PRO))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    store.gate.set()
    await throttle.report()
    assert throttle.standing(PRO)[0].remaining <= 47
    await throttle.close()


async def test_it_reports_by_itself(counted: CountedStore) -> None:
    throttle = Throttle(counted, Limits(), report_s=0.01)  # type: ignore[arg-type]
    await throttle.look(PRO)
    counted.asked.clear()
    await throttle.admit(PRO)
    async with asyncio.timeout(30):
        await counted.asked.wait()
    await throttle.close()


async def test_it_reports_the_rest_when_it_ends(make: Make, counted: CountedStore) -> None:
    throttle = make()
    await throttle.look(PRO)
    await admitted(throttle, PRO, 2)
    await throttle.close()
    other = make()
    await other.look(PRO)
    assert other.standing(PRO)[0].remaining == 48


@pytest.mark.parametrize(("per_minute", "load"), [(500, 0.5), (500, 1), (500, 3), (5_000, 1)])
async def test_ten_minutes_at_three_ingresses_are_as_one_bucket_would_have_it(
    clock: Clock, per_minute: int, load: float
) -> None:
    figures = await arrive(
        clock, store=None, replicas=3, per_minute=per_minute, load=load, minutes=10 if per_minute == 500 else 1, seed=1
    )
    assert abs(figures.admitted - figures.ideal) <= 0.02 * figures.ideal
    assert figures.beyond <= figures.bound
    if load <= 0.5:
        assert figures.admitted == figures.offered


def test_limits_are_checked_where_they_are_written() -> None:
    with pytest.raises(ValueError, match="above ceiling"):
        PlanLimits(requests_per_minute=2_000, ceiling=1_000)

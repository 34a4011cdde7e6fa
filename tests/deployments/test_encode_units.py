from __future__ import annotations

import asyncio
import os
import threading
import time
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.core.catalog import ModelSpec
from serve_app.core.packing import Packed, TokenIds
from serve_app.core.vectors import Vectors
from serve_app.dispatch import Unit, UnitReply
from tests.service import fakes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own: it still declares pydantic fields the old way
    from serve_app.deployments.encoder import BULK_NICENESS, STUCK_S, EncoderReplica, encode_units

CARD = replace(fakes.CARD, unit_tokens=64, units_at_once=4)
ENTRY = {"id": "fake", "name": "tests/fake", "source": "/nowhere", "class": "small", "self_tests": None}


class FakeEncoder:
    """One row a sequence: its id. Runs out of memory beyond `most_tokens`, and fails on every id of `poison`."""

    def __init__(self, *, most_tokens: int = 10**6, poison: frozenset[int] = frozenset()) -> None:
        self.most_tokens = most_tokens
        self.poison = poison
        self.calls: list[list[int]] = []

    def computed_tokens(self, lengths: TokenIds) -> int:
        return -(-int(lengths.sum()) // 8) * 8

    def encode(self, packed: Packed) -> Vectors:
        firsts = packed.ids[np.cumsum(packed.lengths) - packed.lengths]
        self.calls.append(firsts.tolist())
        if packed.tokens > self.most_tokens:
            raise MemoryError(f"{packed.tokens} tokens")
        if found := self.poison & set(packed.ids.tolist()):
            raise RuntimeError(f"poisoned by {found}")
        vectors: Vectors = firsts[:, np.newaxis].astype(np.float32)
        return vectors


def unit(ids: list[int], *, tokens: int = 2) -> Unit:
    """A sequence of so many tokens for each id."""
    packed = Packed(ids=np.repeat(np.array(ids, np.int32), tokens), lengths=np.full(len(ids), tokens, np.int32))
    return Unit(packed=packed, express=False, fingerprint="0123")


def rows(reply: UnitReply | Exception) -> list[float] | Exception:
    return reply if isinstance(reply, Exception) else reply.vectors[:, 0].tolist()


def test_all_units_are_one_forward_and_each_gets_its_own_rows() -> None:
    encoder = FakeEncoder()
    replies = encode_units(encoder.encode, [unit([1, 2]), unit([3]), unit([4, 5, 6])])
    assert [rows(reply) for reply in replies] == [[1, 2], [3], [4, 5, 6]]
    assert encoder.calls == [[1, 2, 3, 4, 5, 6]]


def test_the_time_is_the_batchs() -> None:
    replies = encode_units(FakeEncoder().encode, [unit([1]), unit([2])])
    times = {reply.compute_s for reply in replies if isinstance(reply, UnitReply)}
    assert len(times) == 1
    assert times.pop() > 0


def test_a_batch_too_large_for_the_device_is_taken_apart() -> None:
    encoder = FakeEncoder(most_tokens=4)
    replies = encode_units(encoder.encode, [unit([1, 2]), unit([3]), unit([4, 5])])
    assert [rows(reply) for reply in replies] == [[1, 2], [3], [4, 5]]
    assert encoder.calls == [[1, 2, 3, 4, 5], [1, 2], [3], [4, 5]]


def test_a_unit_too_large_for_the_device_goes_in_halves() -> None:
    encoder = FakeEncoder(most_tokens=6)
    replies = encode_units(encoder.encode, [unit([1, 2, 3, 4, 5]), unit([6])])
    assert [rows(reply) for reply in replies] == [[1, 2, 3, 4, 5], [6]]
    assert encoder.calls == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5], [1, 2], [3, 4, 5], [6]]


def test_only_the_guilty_unit_fails() -> None:
    encoder = FakeEncoder(poison=frozenset({3}))
    first, guilty, last = encode_units(encoder.encode, [unit([1, 2]), unit([3, 4]), unit([5])])
    assert (rows(first), rows(last)) == ([1, 2], [5])
    assert isinstance(guilty, RuntimeError)


@pytest.mark.parametrize("poison", [1, 4])
def test_a_unit_with_one_bad_half_fails_whole(poison: int) -> None:
    (reply,) = encode_units(FakeEncoder(poison=frozenset({poison})).encode, [unit([1, 2, 3, 4])])
    assert isinstance(reply, RuntimeError)


def test_halves_are_not_halved_again() -> None:
    encoder = FakeEncoder(most_tokens=2)
    (reply,) = encode_units(encoder.encode, [unit([1, 2, 3, 4])])
    assert isinstance(reply, MemoryError)
    assert encoder.calls == [[1, 2, 3, 4], [1, 2]]


def test_one_sequence_that_fails_alone_is_not_tried_again() -> None:
    encoder = FakeEncoder(poison=frozenset({1}))
    (reply,) = encode_units(encoder.encode, [unit([1])])
    assert isinstance(reply, RuntimeError)
    assert encoder.calls == [[1]]


def test_a_failure_is_logged_by_type_alone(caplog: pytest.LogCaptureFixture) -> None:
    encode_units(FakeEncoder(poison=frozenset({1})).encode, [unit([1])])
    assert "RuntimeError" in caplog.text
    assert "poisoned" not in caplog.text


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.frozensets(st.integers(0, 29), max_size=3),
    st.integers(2, 40),
)
def test_every_unit_gets_its_own_rows_or_its_own_failure(
    sizes: list[int], poison: frozenset[int], most_tokens: int
) -> None:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    units = [unit(list(range(start, start + size))) for start, size in zip(starts, sizes, strict=True)]

    replies = encode_units(FakeEncoder(poison=poison, most_tokens=most_tokens).encode, units)
    for asked, reply in zip(units, replies, strict=True):
        ids = asked.packed.ids[::2].tolist()
        guilty = bool(poison & set(ids)) or (len(ids) + 1) // 2 * 2 > most_tokens
        assert isinstance(reply, Exception) == guilty
        assert guilty or rows(reply) == ids


async def test_a_short_request_is_computed_while_a_bulk_batch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    bulk_may_end = threading.Event()

    class Slow(FakeEncoder):
        card = CARD

        def encode(self, packed: Packed) -> Vectors:
            if packed.tokens > 2:
                assert bulk_may_end.wait(30)
            return super().encode(packed)

    monkeypatch.setattr("serve_app.deployments.encoder.open_encoder", lambda spec: Slow())
    replica = EncoderReplica(ModelSpec.model_validate(ENTRY))
    bulk = asyncio.create_task(replica._forward(False, [unit([1, 2, 3])]))
    (express,) = await replica._forward(True, [unit([4])])
    assert rows(express) == [4]
    assert not bulk.done()
    bulk_may_end.set()
    assert [rows(reply) for reply in await bulk] == [[1, 2, 3]]


async def test_a_batch_is_counted_with_what_a_padded_one_would_have_computed_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = FakeEncoder()
    encoder.card = CARD  # type: ignore[attr-defined]
    monkeypatch.setattr("serve_app.deployments.encoder.open_encoder", lambda spec: encoder)
    replica = EncoderReplica(ModelSpec.model_validate(ENTRY))
    await replica._forward(False, [unit([1, 2], tokens=3), unit([3], tokens=20)])
    found = {
        (series.name, labels): value for metric in replica._metrics.all() for series, labels, value in metric.take()
    }
    bulk = (CARD.name, "bulk")
    assert found["serve_app_computed_tokens", bulk] == 32, "26, and what the encoder pads to"
    assert found["serve_app_padding_saved_tokens", bulk] == 3 * 20 - 32
    assert found["serve_app_batch_texts_sum", bulk] == 3
    assert found["serve_app_batch_fill_ratio_sum", bulk] == 26 / CARD.unit_tokens
    assert found["serve_app_batch_seconds_count", bulk] == 1


def test_bulk_work_gives_way_to_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.deployments.encoder.open_encoder", lambda spec: SimpleNamespace(card=CARD))
    replica = EncoderReplica(ModelSpec.model_validate(ENTRY))
    express, bulk = (
        replica._threads[lane].submit(os.getpriority, os.PRIO_PROCESS, 0).result() for lane in (True, False)
    )
    assert express == os.getpriority(os.PRIO_PROCESS, 0)
    assert bulk == min(19, express + BULK_NICENESS)


def test_where_niceness_is_forbidden_bulk_work_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr("serve_app.deployments.encoder.open_encoder", lambda spec: SimpleNamespace(card=CARD))
    monkeypatch.setattr("serve_app.deployments.encoder.os.setpriority", forbidden)
    replica = EncoderReplica(ModelSpec.model_validate(ENTRY))
    assert replica._threads[False].submit(lambda: "done").result() == "done"


class Alive:
    """What `@serve.batch` makes, as far as a health check looks at it."""

    def __init__(self, is_alive: Callable[[], Awaitable[bool]]) -> None:
        self._is_batching_task_alive = is_alive


@pytest.mark.parametrize("express", [True, False])
async def test_a_lane_that_is_stuck_or_whose_loop_is_dead_makes_the_replica_unhealthy(
    monkeypatch: pytest.MonkeyPatch, express: bool
) -> None:
    alive = {True: True, False: True}

    def batched(lane: bool) -> Alive:
        async def is_alive() -> bool:
            return alive[lane]

        return Alive(is_alive)

    monkeypatch.setattr("serve_app.deployments.encoder.open_encoder", lambda spec: SimpleNamespace(card=CARD))
    replica = EncoderReplica(ModelSpec.model_validate(ENTRY))
    gate = replica._gates[express]
    await replica.check_health()

    since_s = time.monotonic() - STUCK_S
    monkeypatch.setattr(gate, "_since_s", {batched(express): since_s + 5, batched(express): since_s + 9})
    await replica.check_health()
    alive[express] = False
    with pytest.raises(RuntimeError, match="the batch loop is dead"):
        await replica.check_health()

    alive[express] = True
    monkeypatch.setattr(gate, "_since_s", {batched(express): since_s + 5, batched(express): since_s - 1})
    with pytest.raises(RuntimeError, match="a batch has been running for more than 600 s"):
        await replica.check_health()


def test_each_lane_computes_as_many_units_at_once_as_its_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.deployments.encoder.open_encoder", lambda spec: SimpleNamespace(card=CARD))
    replica = EncoderReplica(ModelSpec.model_validate(ENTRY))
    for lane in (True, False):
        free = replica._gates[lane]._free
        assert replica._threads[lane]._max_workers == len(free) == (2 if lane else 4)
        assert all(hasattr(run, "_is_batching_task_alive") for run in free)
        assert {run.__name__ for run in free} == {"express_batch" if lane else "bulk_batch"}

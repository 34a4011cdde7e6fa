from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from serve_app.core import scaling
from serve_app.core.scaling import BUSY, QUEUED_TOKENS, TOKENS_PER_S, ByTokens

POLICY = ByTokens(target_busy=0.8, target_queue_s=2.0)


@dataclass
class Seen:
    """replicas: of each (busy, queued tokens, tokens per second)."""

    replicas: list[tuple[float, float, float]]
    target_num_replicas: int = 1

    @property
    def current_num_replicas(self) -> int:
        return len(self.replicas)

    @property
    def aggregated_metrics(self) -> dict[str, dict[int, float]]:
        names = (BUSY, QUEUED_TOKENS, TOKENS_PER_S)
        return {name: {at: row[place] for at, row in enumerate(self.replicas)} for place, name in enumerate(names)}


def wanted(*replicas: tuple[float, float, float]) -> float:
    return POLICY(Seen([*replicas]))[0]


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        ([(0.0, 0, 0)], 0.0),  # idle, and it never computed anything
        ([(0.0, 0, 1000)], 0.0),
        ([(0.8, 0, 1000)], 1.0),  # as busy as it should be
        ([(1.0, 0, 1000)], 1.25),
        ([(1.0, 6000, 1000)], 1.25 + 3),  # six seconds of work for one, to be gone in two
        ([(0.4, 0, 1000), (0.4, 0, 1000)], 1.0),
        ([(1.0, 4000, 1000), (1.0, 8000, 3000)], 2.5 + 1.5),  # 6,000 wait, and 2,000 a second are computed each
        ([(1.0, 4000, 1000), (0.0, 4000, 0)], 1.25 + 2),  # the second has just started
    ],
)
def test_replicas_for_what_arrives_and_for_what_waits(
    replicas: list[tuple[float, float, float]], expected: float
) -> None:
    assert wanted(*replicas) == pytest.approx(expected)


def test_a_few_long_texts_count_as_many_short_ones_do_of_as_many_tokens() -> None:
    assert wanted((1.0, 512 * 10, 1000)) == wanted((1.0, 10 * 512, 1000)) > wanted((1.0, 10 * 10, 1000))


@pytest.mark.parametrize("metrics", [None, {}, {BUSY: {}}])
def test_without_a_measurement_nothing_changes(metrics: Any) -> None:
    blind: Any = SimpleNamespace(current_num_replicas=2, target_num_replicas=3, aggregated_metrics=metrics)
    assert POLICY(blind) == (3, {})


@given(
    st.floats(0, 1), st.floats(0, 1e9), st.floats(1, 1e7), st.integers(1, 50), st.floats(0.05, 1), st.floats(0.01, 100)
)
def test_more_work_never_wants_fewer_replicas(
    busy: float, queued: float, rate: float, replicas: int, target_busy: float, target_queue_s: float
) -> None:
    policy = ByTokens(target_busy=target_busy, target_queue_s=target_queue_s)
    now = policy(Seen([(busy, queued, rate)] * replicas))[0]
    assert policy(Seen([(busy, 2 * queued, rate)] * replicas))[0] >= now
    assert policy(Seen([(min(1.0, 1.1 * busy), queued, rate)] * replicas))[0] >= now
    assert now >= 0


def test_serve_takes_it_as_a_policy() -> None:
    name = f"{scaling.__name__}.ByTokens"
    policy = AutoscalingPolicy(policy_function=name, policy_kwargs={"target_busy": 0.8, "target_queue_s": 2.0})
    config = AutoscalingConfig(min_replicas=0, max_replicas=4, policy=policy)
    unpickled = config.policy.get_policy()
    assert unpickled(**policy.policy_kwargs)(Seen([(1.0, 6000, 1000)]))[0] == pytest.approx(4.25)

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.metrics import (
    SECONDS,
    Counter,
    EncoderMetrics,
    Gauge,
    Histogram,
    IngressMetrics,
    Labels,
    Metric,
    UsageMetrics,
)

EVERY = [metric for kind in (IngressMetrics, EncoderMetrics, UsageMetrics) for metric in kind().all()]
UNBOUNDED = {"workspace", "key", "api_key", "user", "request_id", "path", "text"}


def taken(metric: Metric) -> dict[tuple[str, Labels], float]:
    return {(series.name, labels): value for series, labels, value in metric.take()}


def test_a_counter_tells_what_came_since_it_was_asked_last() -> None:
    counter = Counter("c", "Things.", "kind")
    counter.add("one")
    counter.add("one", by=4)
    counter.add("other", by=0)
    assert taken(counter) == {("c", ("one",)): 5}
    assert taken(counter) == {}


def test_a_gauge_tells_all_that_there_is_and_0_for_what_went() -> None:
    gauge = Gauge("g", "Things.", "kind")
    gauge.show({("one",): 3, ("other",): 4})
    assert taken(gauge) == taken(gauge) == {("g", ("one",)): 3, ("g", ("other",)): 4}
    gauge.show({("one",): 5})
    assert taken(gauge) == {("g", ("one",)): 5, ("g", ("other",)): 0}


@given(st.lists(st.floats(0, 1000), max_size=50))
def test_a_bucket_holds_all_up_to_its_bound(values: list[float]) -> None:
    histogram = Histogram("h_seconds", "Things.", "kind")
    for value in values:
        histogram.observe(value, "one")
    found = taken(histogram)
    for bound in (*SECONDS, float("inf")):
        name = "+Inf" if bound == float("inf") else f"{bound:g}"
        assert found.get(("h_seconds_bucket", ("one", name)), 0) == sum(value <= bound for value in values)
    assert found.get(("h_seconds_count", ("one",)), 0) == len(values)
    assert found.get(("h_seconds_sum", ("one",)), 0) == pytest.approx(sum(values))
    assert taken(histogram) == {}


def test_names_are_one_of_a_kind_and_end_in_their_unit() -> None:
    names = [series.name for metric in EVERY for series in metric.series]
    assert len(set(names)) == len(names)
    for metric in EVERY:
        name = metric.series[0].name.removesuffix("_bucket")
        assert name.startswith("serve_app_")
        if not isinstance(metric, Counter):
            assert name.rpartition("_")[2] in ("seconds", "bytes", "tokens", "ratio", "events", "texts"), name


def test_no_label_has_as_many_values_as_there_are_callers() -> None:
    assert not UNBOUNDED & {label for metric in EVERY for series in metric.series for label in series.labels}

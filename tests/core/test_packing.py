from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve_app.core.packing import QUANTUM_TOKENS, TURN_TOKENS, Packed, PackingQueue, Share, Span, runs

quick = settings(max_examples=60, deadline=None)

LENGTHS = st.one_of(
    st.lists(st.one_of(st.integers(1, 40), st.integers(1, 700), st.sampled_from([255, 256, 257])), max_size=20),
    st.sampled_from([[20] * 100, [500], [500] * 3]),
)
REQUESTS = st.lists(LENGTHS, max_size=8)
MAX_TOKENS = st.one_of(st.just(500), st.integers(1, 1200), st.sampled_from([256, 512]))
MAX_SEQUENCES = st.integers(1, 12)


def queue_of(requests: list[list[int]]) -> PackingQueue:
    queue = PackingQueue()
    for request, lengths in enumerate(requests):
        queue.add(request, lengths)
    return queue


def drain(queue: PackingQueue, max_tokens: int, max_sequences: int) -> list[list[Span]]:
    units = []
    while unit := queue.next_unit(max_tokens, max_sequences):
        units.append(unit)
    return units


def tokens_of(span: Span, lengths: list[int]) -> int:
    return sum(lengths[span.first : span.first + span.count])


@quick
@given(REQUESTS, MAX_TOKENS, MAX_SEQUENCES)
def test_every_sequence_leaves_once_and_in_order(
    requests: list[list[int]], max_tokens: int, max_sequences: int
) -> None:
    units = drain(queue_of(requests), max_tokens, max_sequences)

    left: list[list[int]] = [[] for _ in requests]
    for span in (span for unit in units for span in unit):
        left[span.request] += range(span.first, span.first + span.count)
    assert left == [list(range(len(lengths))) for lengths in requests]


@quick
@given(REQUESTS, MAX_TOKENS, MAX_SEQUENCES)
def test_a_unit_keeps_both_limits_unless_it_is_one_long_sequence(
    requests: list[list[int]], max_tokens: int, max_sequences: int
) -> None:
    for unit in drain(queue_of(requests), max_tokens, max_sequences):
        sequences = sum(span.count for span in unit)
        assert sequences <= max_sequences
        assert sequences == 1 or sum(tokens_of(span, requests[span.request]) for span in unit) <= max_tokens


@quick
@given(REQUESTS, MAX_TOKENS, MAX_SEQUENCES)
def test_a_request_has_at_most_one_span_in_a_unit_and_no_span_is_empty(
    requests: list[list[int]], max_tokens: int, max_sequences: int
) -> None:
    for unit in drain(queue_of(requests), max_tokens, max_sequences):
        assert len({span.request for span in unit}) == len(unit)
        assert all(span.count > 0 for span in unit)


def test_requests_take_turns_within_a_unit() -> None:
    queue = queue_of([[100] * 100, [100], [100]])
    assert queue.next_unit(1000, 100) == [
        Span(request=0, first=0, count=8),
        Span(request=1, first=0, count=1),
        Span(request=2, first=0, count=1),
    ]


def test_a_sequence_as_long_as_a_unit_is_not_overtaken_for_ever() -> None:
    queue = queue_of([[10] * 500, [10] * 500, [1000]])
    units = []
    for arrival in range(3, 6):
        units.append(queue.next_unit(1000, 100))
        queue.add(arrival, [10] * 500)
    assert [Span(request=2, first=0, count=1)] in units  # two were before it: it is one of the next three


def test_a_request_cannot_wait_twice() -> None:
    queue = queue_of([[5]])
    with pytest.raises(ValueError, match="waits already"):
        queue.add(0, [5])
    assert (queue.sequences, queue.tokens) == (1, 5)


def test_a_request_without_sequences_takes_no_turn() -> None:
    queue = queue_of([[], [7]])
    assert queue.next_unit(100, 10) == [Span(request=1, first=0, count=1)]
    assert queue.next_unit(100, 10) == []


class Queueing(RuleBasedStateMachine):
    """The queue beside the plainest account of what waits, and of how many units may still leave without whom."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = PackingQueue()
        self.waiting: dict[int, list[int]] = {}
        self.gone: dict[int, int] = {}
        self.patience: dict[int, int] = {}
        self.arrivals = 0

    @rule(lengths=LENGTHS)
    def add(self, lengths: list[int]) -> None:
        request, self.arrivals = self.arrivals, self.arrivals + 1
        self.queue.add(request, lengths)
        if lengths:
            self.patience[request] = len(self.waiting)
            self.waiting[request], self.gone[request] = lengths, 0

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.waiting)))
        self.queue.cancel(request)
        del self.waiting[request], self.gone[request], self.patience[request]

    @rule(beyond=st.integers(0, 3))
    def cancel_one_that_does_not_wait(self, beyond: int) -> None:
        self.queue.cancel(self.arrivals + beyond)

    @rule(max_tokens=MAX_TOKENS, max_sequences=MAX_SEQUENCES)
    def next_unit(self, max_tokens: int, max_sequences: int) -> None:
        unit = self.queue.next_unit(max_tokens, max_sequences)
        assert bool(unit) == bool(self.waiting)

        sequences = sum(span.count for span in unit)
        tokens = sum(tokens_of(span, self.waiting[span.request]) for span in unit)
        assert sequences <= max_sequences
        assert tokens <= max_tokens or sequences == 1

        served = {span.request for span in unit}
        assert len(served) == len(unit)
        for request in self.waiting.keys() - served:
            assert self.patience[request] > 0, "more units left without it than requests were before it"
            self.patience[request] -= 1
        for span in unit:
            assert span.first == self.gone[span.request]
            self.gone[span.request] += span.count
            if self.gone[span.request] == len(self.waiting[span.request]):
                del self.waiting[span.request], self.gone[span.request], self.patience[span.request]
        for request in served & self.waiting.keys():
            self.patience[request] = len(self.waiting) - 1

    @invariant()
    def the_counters_are_true(self) -> None:
        left = [length for request, lengths in self.waiting.items() for length in lengths[self.gone[request] :]]
        assert (self.queue.sequences, self.queue.tokens) == (len(left), sum(left))


Queueing.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestQueueing = Queueing.TestCase


# Workspaces


def share(workspace: str, weight: int = 1) -> Share:
    return Share(workspace=workspace, weight=weight)


def served(
    queue: PackingQueue, owners: dict[int, tuple[str, list[int]]], units: int, max_tokens: int
) -> dict[str, int]:
    """Tokens by workspace in the next so many units."""
    tokens = {workspace: 0 for workspace, _ in owners.values()}
    for _ in range(units):
        for span in queue.next_unit(max_tokens, 10_000):
            workspace, lengths = owners[span.request]
            tokens[workspace] += tokens_of(span, lengths)
    return tokens


@quick
@given(
    weights=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    length=st.integers(1, 600),
    requests=st.lists(st.integers(1, 6), min_size=5, max_size=5),
    max_tokens=st.sampled_from([300, 512, 2048]),
)
def test_workspaces_that_wait_get_tokens_by_their_weights_however_many_requests_they_have(
    weights: list[int], length: int, requests: list[int], max_tokens: int
) -> None:
    queue, owners = PackingQueue(), dict[int, tuple[str, list[int]]]()
    for at, weight in enumerate(weights):
        for _ in range(requests[at]):
            mine, number = [length] * (30_000 // length), len(owners)
            owners[number] = (f"ws-{at}", mine)
            queue.add(number, mine, share(f"ws-{at}", weight))
    got = served(queue, owners, units=12, max_tokens=max_tokens)
    each = [got[f"ws-{at}"] / weight for at, weight in enumerate(weights)]
    assert max(each) - min(each) <= TURN_TOKENS + QUANTUM_TOKENS + length  # a turn, and what overdraws it


def test_a_thousand_requests_of_one_workspace_are_not_before_one_of_another() -> None:
    queue = PackingQueue()
    for number in range(1000):
        queue.add(number, [20] * 10, share("flood"))
    queue.next_unit(2048, 1000)
    queue.add(5000, [20], share("polite"))
    assert 5000 in {span.request for span in queue.next_unit(2048, 1000)}


def test_nine_polite_workspaces_and_a_flood_are_all_in_the_next_unit() -> None:
    queue = PackingQueue()
    for number in range(100):
        queue.add(number, [100] * 64, share("flood"))
    for number in range(9):
        queue.add(1000 + number, [20], share(f"polite-{number}"))
    assert {span.request for span in queue.next_unit(512, 1000)} >= set(range(1000, 1009))


def test_who_was_away_has_saved_nothing() -> None:
    queue, owners = PackingQueue(), {0: ("stayed", [100] * 500), 1: ("came", [100] * 500)}
    queue.add(0, owners[0][1], share("stayed"))
    for _ in range(20):
        queue.next_unit(1000, 100)
    queue.add(1, owners[1][1], share("came"))
    got = served(queue, owners, units=10, max_tokens=1000)
    assert abs(got["stayed"] - got["came"]) <= 2 * QUANTUM_TOKENS


def test_a_long_sequence_is_paid_for_with_turns() -> None:
    queue, owners = PackingQueue(), {0: ("long", [4096] * 50), 1: ("short", [64] * 5000)}
    for number, (workspace, lengths) in owners.items():
        queue.add(number, lengths, share(workspace))
    got = served(queue, owners, units=40, max_tokens=4096)
    assert abs(got["long"] - got["short"]) <= 4096 + QUANTUM_TOKENS


def test_a_workspace_that_leaves_takes_no_turn_and_may_come_back() -> None:
    queue = PackingQueue()
    queue.add(0, [10] * 5, share("a"))
    queue.add(1, [10] * 5, share("b"))
    queue.cancel(0)
    assert queue.weights() == {"b": 1}
    assert (queue.tokens_of("a"), queue.tokens_of("b")) == (0, 50)
    queue.add(2, [10], share("a", 3))
    assert queue.weights() == {"b": 1, "a": 3}
    assert {span.request for span in queue.next_unit(1000, 100)} == {1, 2}
    assert queue.weights() == {}


class Tenants(RuleBasedStateMachine):
    """Several workspaces: whatever comes and goes, each sequence leaves once, and the counts are true."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = PackingQueue()
        self.waiting: dict[int, tuple[str, list[int]]] = {}
        self.gone: dict[int, int] = {}
        self.arrivals = 0

    @rule(lengths=LENGTHS, workspace=st.sampled_from("abc"), weight=st.integers(1, 3))
    def add(self, lengths: list[int], workspace: str, weight: int) -> None:
        request, self.arrivals = self.arrivals, self.arrivals + 1
        self.queue.add(request, lengths, share(workspace, weight))
        if lengths:
            self.waiting[request], self.gone[request] = (workspace, lengths), 0

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.waiting)))
        self.queue.cancel(request)
        del self.waiting[request], self.gone[request]

    @rule(max_tokens=MAX_TOKENS, max_sequences=MAX_SEQUENCES)
    def next_unit(self, max_tokens: int, max_sequences: int) -> None:
        unit = self.queue.next_unit(max_tokens, max_sequences)
        assert bool(unit) == bool(self.waiting)
        sequences = sum(span.count for span in unit)
        assert sequences <= max_sequences
        assert sequences <= 1 or sum(tokens_of(it, self.waiting[it.request][1]) for it in unit) <= max_tokens
        for span in unit:
            assert span.first == self.gone[span.request]
            self.gone[span.request] += span.count
            if self.gone[span.request] == len(self.waiting[span.request][1]):
                del self.waiting[span.request], self.gone[span.request]

    @invariant()
    def the_counters_are_true(self) -> None:
        left = {request: lengths[self.gone[request] :] for request, (_, lengths) in self.waiting.items()}
        assert self.queue.sequences == sum(map(len, left.values()))
        assert self.queue.tokens == sum(map(sum, left.values()))
        assert self.queue.weights().keys() == {workspace for workspace, _ in self.waiting.values()}
        for workspace in "abc":
            mine = [sum(left[request]) for request, (owner, _) in self.waiting.items() if owner == workspace]
            assert self.queue.tokens_of(workspace) == sum(mine)


Tenants.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestTenants = Tenants.TestCase


def packed(lengths: list[int]) -> Packed:
    return Packed(ids=np.arange(sum(lengths), dtype=np.int32), lengths=np.array(lengths, np.int32))


def texts(packed: Packed) -> list[list[int]]:
    ends = np.cumsum(packed.lengths)
    return [ids.tolist() for ids in np.split(packed.ids, ends)][: len(ends)]


@quick
@given(st.lists(st.integers(1, 9), max_size=12), st.data())
def test_a_slice_holds_the_same_sequences(lengths: list[int], data: st.DataObject) -> None:
    whole = packed(lengths)
    first = data.draw(st.integers(0, len(lengths)))
    count = data.draw(st.integers(0, len(lengths) - first))

    piece = whole.slice(first, count)
    assert texts(piece) == texts(whole)[first : first + count]
    assert piece.tokens == sum(lengths[first : first + count])


@quick
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=5))
def test_join_puts_the_sequences_of_all_parts_end_to_end(parts: list[list[int]]) -> None:
    joined = Packed.join([packed(lengths) for lengths in parts])
    assert texts(joined) == [text for lengths in parts for text in texts(packed(lengths))]
    assert joined.ids.dtype == joined.lengths.dtype == np.int32


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_halves_are_the_whole_and_differ_by_one_sequence_at_most(lengths: list[int]) -> None:
    whole = packed(lengths)
    front, back = whole.halves()
    assert texts(Packed.join([front, back])) == texts(whole)
    assert 0 <= len(back.lengths) - len(front.lengths) <= 1


@quick
@given(st.lists(st.integers(1, 100), max_size=30).map(sorted), st.integers(1, 20))
def test_runs_are_the_longest_neighbourhoods_that_pad_to_the_same_multiple(lengths: list[int], step: int) -> None:
    found = list(runs(lengths, step))
    assert [index for first, count in found for index in range(first, first + count)] == list(range(len(lengths)))

    padded = [{-(-length // step) for length in lengths[first : first + count]} for first, count in found]
    assert all(len(multiples) == 1 for multiples in padded)
    assert all(one != other for one, other in itertools.pairwise(padded))


# Pairs


def test_of_pairs_the_second_text_is_told_from_the_first_in_any_piece() -> None:
    pairs = Packed(
        ids=np.arange(9, dtype=np.int32), lengths=np.array([4, 2, 3], np.int32), firsts=np.array([1, 2, 2], np.int32)
    )
    assert pairs.types().tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 1]
    assert [pairs.slice(at, 1).types().tolist() for at in range(3)] == [[0, 1, 1, 1], [0, 0], [0, 0, 1]]
    assert Packed.join([pairs.slice(2, 1), pairs.slice(0, 2)]).types().tolist() == [0, 0, 1, 0, 1, 1, 1, 0, 0]
    assert [half.types().tolist() for half in pairs.halves()] == [[0, 1, 1, 1], [0, 0, 0, 0, 1]]


def test_single_texts_have_one_type_and_never_travel_with_pairs() -> None:
    texts = Packed(ids=np.arange(3, dtype=np.int32), lengths=np.array([1, 2], np.int32))
    assert texts.types().tolist() == [0, 0, 0]
    assert Packed.join([texts, texts]).firsts is None
    pair = Packed(ids=texts.ids, lengths=np.array([3], np.int32), firsts=np.array([1], np.int32))
    with pytest.raises(ValueError, match="single texts beside pairs"):
        Packed.join([texts, pair])

"""A stateful model test of a store: random moves in `world.py`, and an end with every key answered and an audit.

There is one rule for all moves, for hypothesis switches rules off at random, and hardly a promise can be broken without
a begin, a complete and time that passes.
"""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from tests.stores.homes import Home
from tests.stores.promise import HOUR_MS
from tests.stores.world import BODIES, KEYLESS, KEYS, LEASE_MS, WORKSPACES, Sent, Turn, World

Move = tuple[str, dict[str, Any]]

LEAPS_MS = (1000, LEASE_MS // 2, LEASE_MS, HOUR_MS // 2, 24 * HOUR_MS - 1, 25 * HOUR_MS)

ingresses = st.integers(0, 1)
recent = st.integers(0, 3)
sent = st.sampled_from((Sent.ONCE, Sent.ONCE, Sent.TWICE, Sent.UNANSWERED))
bodies = st.sampled_from((*BODIES[:1] * 3, *BODIES[1:]))  # most are the same
leaps = st.sampled_from(LEAPS_MS)

# How often, and with what.
MOVES: dict[str, tuple[int, dict[str, st.SearchStrategy[Any]]]] = {
    "begin": (
        6,
        {
            "key": st.none() | st.sampled_from(KEYS),
            "bodies": st.lists(bodies, min_size=1, max_size=2),
            "small": st.booleans(),
            "at": ingresses,
            "sent": sent,
        },
    ),
    "go_on": (10, {"what": st.sampled_from(Turn), "which": recent, "at": ingresses, "sent": sent}),
    "sleep": (2, {"leap_ms": leaps}),
    "sleep_until_something_lapses": (3, {"which": recent, "early_ms": st.integers(0, 1)}),
    "emit": (1, {"workspace": st.sampled_from((*WORKSPACES, KEYLESS)), "again": st.none() | recent, "at": ingresses}),
    "purge": (1, {"limit": st.sampled_from((1, 100)), "at": ingresses}),
    "restart": (1, {"at": ingresses}),
}
by_name = {name: st.tuples(st.just(name), st.fixed_dictionaries(arguments)) for name, (_, arguments) in MOVES.items()}
moves = st.sampled_from([name for name, (often, _) in MOVES.items() for _ in range(often)]).flatmap(by_name.__getitem__)


class StoreMachine(RuleBasedStateMachine):
    """One example."""

    def __init__(self, home: Home, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.world = World(home.fresh(), loop)
        self.failed = False

    @rule(move=moves)
    def move(self, move: Move) -> None:
        name, arguments = move
        self.failed = True
        getattr(self.world, name)(**arguments)
        self.failed = False

    def teardown(self) -> None:
        try:
            if not self.failed:
                self.world.end()
        finally:
            self.world.close()


def explore(home: Home, *, examples: int, steps: int, seed: int, shrink: bool = False, quiet: bool = False) -> None:
    """So many examples, the same ones for the same seed. Raises BrokenPromise, and prints the moves that led there.

    shrink: look for the fewest, which may take minutes. quiet: print nothing.
    """
    loop = asyncio.new_event_loop()

    @seeded(seed)
    def machine() -> StoreMachine:
        return StoreMachine(home, loop)

    try:
        run_state_machine_as_test(
            machine,  # type: ignore[arg-type]
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
                verbosity=Verbosity.quiet if quiet else Verbosity.normal,
                report_multiple_bugs=False,
            ),
        )
    finally:
        loop.close()

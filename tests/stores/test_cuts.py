"""What a crash leaves of a store's log is whole, wherever it ends. `scripts/prove cuts` tries more places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.core.idempotency import Complete, Emit, Outcome, Step
from serve_app.stores import Clock, Store, open_store
from tests.stores.cuts import LOGS, survive
from tests.stores.ledger import BrokenPromise

OFFSETS = 12


@pytest.mark.parametrize("driver", LOGS)
def test_a_log_that_is_cut_is_the_beginning_of_what_was_asked(driver: str, tmp_path: Path) -> None:
    assert survive(LOGS[driver](tmp_path), offsets=OFFSETS, seed=1) > OFFSETS


@pytest.mark.parametrize("driver", LOGS)
def test_a_store_that_writes_reply_and_event_apart_is_seen(
    driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def open_apart(url: str, *, clock: Clock | None = None) -> Apart:
        return Apart(await open_store(url, clock=clock))

    monkeypatch.setattr("tests.stores.cuts.open_store", open_apart)

    with pytest.raises(BrokenPromise, match="no record is done without its event"):
        survive(LOGS[driver](tmp_path), offsets=4 * OFFSETS, seed=1)


class Apart:
    """A store whose `complete` is two writes."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def run(self, steps: Sequence[Step]) -> list[Outcome]:
        outcomes = []
        for step in steps:
            if isinstance(step, Complete) and step.event is not None:
                outcomes += await self._store.run([replace(step, event=None)])
                await self._store.run([Emit(event=step.event)])
            else:
                outcomes += await self._store.run([step])
        return outcomes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

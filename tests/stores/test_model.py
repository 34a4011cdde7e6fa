"""The store's promise under random moves. `scripts/prove model` makes more of them."""

from __future__ import annotations

import pytest

from tests.stores.homes import HOMES
from tests.stores.model import explore

EXAMPLES, STEPS = 40, 25


@pytest.mark.parametrize("driver", HOMES)
def test_a_store_keeps_its_promise_whatever_happens(driver: str) -> None:
    with HOMES[driver]() as home:
        explore(home, examples=EXAMPLES, steps=STEPS, seed=1)

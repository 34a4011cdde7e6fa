"""The model test sees planted bugs, in either driver. `scripts/prove mutants` tries more seeds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.stores.homes import HOMES, Home
from tests.stores.mutants import MUTANTS, Mutant, caught

SEED = 5


@pytest.fixture(scope="module", params=HOMES)
def home(request: pytest.FixtureRequest) -> Iterator[Home]:
    with HOMES[request.param]() as home:
        yield home


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_caught(mutant: Mutant, home: Home) -> None:
    assert caught(mutant, home, seed=SEED)

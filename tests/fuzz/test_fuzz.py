"""A short part of `scripts/prove fuzz`, the same at every run."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from serve_app.core.truncation import Tokenized
from tests.fuzz.drive import ROUND, Fuzz
from tests.service.fakes import FakeModel, bundled_tokenizer


def test_whatever_is_sent_the_service_answers_in_its_own_words() -> None:
    with Fuzz() as fuzz:
        fuzz.explore(ROUND, seed=1)
    seen = fuzz.figures.statuses
    assert fuzz.figures.inputs >= ROUND
    assert {200, 400, 401, 404, 405, 415} <= seen.keys(), "else it explored less than it should"


def test_it_finds_a_text_that_breaks_the_tokenizer() -> None:
    async def fragile(texts: Sequence[str]) -> Tokenized:
        if not all(text.isascii() for text in texts):
            raise ValueError("broken")
        return bundled_tokenizer()(texts)

    with Fuzz(FakeModel(tokenize=fragile)) as fuzz, pytest.raises(AssertionError, match="status=500"):
        fuzz.explore(8 * ROUND, seed=1)  # as a rule the first round does

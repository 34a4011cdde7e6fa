from __future__ import annotations

import logging

import pytest
from pydantic import ValidationError

from serve_app.core.settings import Terms
from serve_app.deployments.terms import LiveTerms

WRONG = {"limits": {"plans": {"pro": {"requests_per_minute": 0}}}}


def test_what_changes_is_told_and_what_is_taken_out_is_the_default_again() -> None:
    told: list[str] = []
    terms = LiveTerms()
    terms.read({"rates": {"version": "1"}})
    terms.follow(lambda it: told.append(it.rates.version))
    terms.read({"rates": {"version": "2"}})
    terms.read({})
    assert told == ["2", Terms().rates.version]


def test_nobody_starts_on_terms_that_cannot_be_read() -> None:
    with pytest.raises(ValidationError):
        LiveTerms().read(WRONG)


def test_one_that_runs_keeps_its_own(caplog: pytest.LogCaptureFixture) -> None:
    terms = LiveTerms()
    terms.read({"rates": {"version": "1"}})
    terms.follow(lambda it: pytest.fail("nothing has changed"))
    with caplog.at_level(logging.ERROR):
        terms.read(WRONG)
    assert terms.now.rates.version == "1"
    assert "limits.plans.pro.requests_per_minute" in caplog.text

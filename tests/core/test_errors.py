from __future__ import annotations

import math
import re
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.core import errors
from serve_app.core.errors import (
    AtCapacity,
    IdempotencyConflict,
    IdempotencyInProgress,
    InvalidAPIKey,
    InvalidIdempotencyKey,
    InvalidInput,
    RateLimitExceeded,
    ServiceError,
    StoreUnavailable,
    did_you_mean,
    every_error,
    shown,
)

quick = settings(max_examples=100, deadline=None)

CONTRACT = {
    "invalid_json": (400, "invalid_request_error"),
    "missing_required_field": (400, "invalid_request_error"),
    "unknown_parameter": (400, "invalid_request_error"),
    "unsupported_parameter": (400, "invalid_request_error"),
    "invalid_input": (400, "invalid_request_error"),
    "too_many_inputs": (400, "invalid_request_error"),
    "too_many_tokens": (400, "invalid_request_error"),
    "invalid_idempotency_key": (400, "invalid_request_error"),
    "invalid_api_key": (401, "authentication_error"),
    "endpoint_not_allowed": (403, "permission_error"),  # beside the contract: a key's scope names endpoints, too
    "model_not_allowed": (403, "permission_error"),
    "plan_limit_exceeded": (403, "permission_error"),
    "model_not_found": (404, "not_found_error"),
    "route_not_found": (404, "not_found_error"),
    "method_not_allowed": (405, None),  # the contract names no type for it
    "idempotency_conflict": (409, "invalid_request_error"),
    "idempotency_in_progress": (409, "invalid_request_error"),
    "request_too_large": (413, "invalid_request_error"),
    "unsupported_media_type": (415, "invalid_request_error"),
    "rate_limit_exceeded": (429, "rate_limit_error"),
    "internal_error": (500, "api_error"),
    "model_loading": (503, "service_unavailable"),
    "at_capacity": (503, "service_unavailable"),
    "store_unavailable": (503, "service_unavailable"),
    "timeout": (504, "api_error"),
}
ERRORS = [pytest.param(error, id=error.__name__) for error in every_error()]


@pytest.mark.parametrize("error", ERRORS)
def test_each_error_has_the_contracts_status_and_type(error: type[ServiceError]) -> None:
    status, type_ = CONTRACT[error.code]
    assert error.status == status
    assert error.type == (type_ or error.type)


def test_no_two_errors_share_a_code() -> None:
    assert set(Counter(error.code for error in every_error()).values()) == {1}


@pytest.mark.parametrize("error", ERRORS)
def test_each_error_says_what_the_caller_can_do_and_whether_to_try_again(error: type[ServiceError]) -> None:
    assert error.advice.endswith(".")
    assert error.retryable == (error.status >= 500 or error in (RateLimitExceeded, IdempotencyInProgress))


@pytest.mark.parametrize("error", ERRORS)
def test_the_openai_sdk_retries_what_may_be_retried_and_nothing_else(error: type[ServiceError]) -> None:
    by_itself = error.status in (408, 409, 429) or error.status >= 500
    told = {"true": True, "false": False, None: by_itself}[error("No.").headers().get("x-should-retry")]
    assert told == error.retryable
    assert error.should_retry is None or told != by_itself  # only where it would do the wrong thing


@pytest.mark.parametrize("error", ERRORS)
def test_each_error_stands_in_the_tree_of_the_docstring(error: type[ServiceError]) -> None:
    assert errors.__doc__
    assert re.search(rf"\b{error.__name__}\b", errors.__doc__)
    assert f"({error.status})" in errors.__doc__


def test_every_code_of_the_contract_has_an_error() -> None:
    assert CONTRACT.keys() == {error.code for error in every_error()}


@pytest.mark.parametrize("error", ERRORS)
def test_the_body_has_all_four_fields_and_nothing_else(error: type[ServiceError]) -> None:
    body = {"message": "What was wrong.", "type": error.type, "param": None, "code": error.code}
    assert error("What was wrong.").body() == {"error": body}
    assert error("What was wrong.", param="input[3]").body() == {"error": body | {"param": "input[3]"}}


def test_waiting_is_only_advised_where_it_helps() -> None:
    assert InvalidInput("No.").headers() == {}
    assert InvalidAPIKey("No.").headers() == {}
    assert InvalidIdempotencyKey("No.").headers() == {}


def test_a_key_of_another_request_is_not_retried_and_one_that_still_runs_is() -> None:
    assert IdempotencyConflict("Another request's.").headers() == {"x-should-retry": "false"}
    assert IdempotencyInProgress("Still runs.", retry_after_s=0.2).headers() == {
        "Retry-After": "1",
        "retry-after-ms": "200",
    }


def test_both_headers_may_be_sent() -> None:
    both = IdempotencyConflict("Another request's.", retry_after_s=3).headers()
    assert both == {"x-should-retry": "false", "Retry-After": "3"}


@pytest.mark.parametrize("error", [RateLimitExceeded, StoreUnavailable, IdempotencyInProgress])
def test_who_must_wait_is_told_how_long(error: type[ServiceError]) -> None:
    assert "`Retry-After`" in error.advice
    assert error("Later.", retry_after_s=7.5).headers() == {"Retry-After": "8", "retry-after-ms": "7500"}


@pytest.mark.parametrize(
    ("seconds", "header"),
    [
        (-5, "1"),
        (0, "1"),
        (0.01, "1"),
        (1, "1"),
        (1.01, "2"),
        (59.5, "60"),
        (119.01, "120"),
        (120, "120"),
        (1e9, "120"),
    ],
)
def test_retry_after_is_rounded_up_to_whole_seconds_between_1_and_120(seconds: float, header: str) -> None:
    assert AtCapacity("Full.", retry_after_s=seconds).headers()["Retry-After"] == header


@pytest.mark.parametrize(
    ("seconds", "header"),
    [
        (-5, None),  # nothing better is known than not at once
        (0, None),
        (0.00001, "1"),
        (0.12, "120"),
        (0.9999, None),  # as much as Retry-After says
        (1, None),
        (1.01, "1010"),
        (119.01, "119010"),
        (120, None),
        (1e9, None),
    ],
)
def test_retry_after_ms_says_what_whole_seconds_cannot(seconds: float, header: str | None) -> None:
    assert AtCapacity("Full.", retry_after_s=seconds).headers().get("retry-after-ms") == header


@quick
@given(st.floats(allow_nan=False))
@example(math.inf)
def test_retry_after_is_a_number_that_clients_obey_whatever_was_measured(seconds: float) -> None:
    headers = AtCapacity("Full.", retry_after_s=seconds).headers()
    assert headers["Retry-After"].isdecimal()
    assert 1 <= int(headers["Retry-After"]) <= 120
    milliseconds = headers.get("retry-after-ms", "1")
    assert milliseconds.isdecimal()
    assert 1 <= int(milliseconds) <= 1000 * int(headers["Retry-After"])


@pytest.mark.parametrize("name", ["bge-m3", "BAAI/bge-m3", "all-MiniLM-L6-v2", "encodingformat", "_x", "0", "a" * 64])
def test_a_name_is_shown_in_quotes(name: str) -> None:
    assert shown(name) == f"'{name}'"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "two words",
        "a/b/c",
        "/a",
        "a/",
        "-rf",
        "a\n",
        "a\0",
        "über",
        "a'b",
        "<b>",
        "a" * 65,
        "{x}",
        "a\u202eb",
        "\ud800",
    ],
)
def test_what_is_no_name_is_not_repeated(text: str) -> None:
    assert shown(text) == "of that name"


@quick
@given(st.text(st.characters(exclude_categories=()), max_size=200) | st.text("aZ9_.-/ '\n", max_size=140))
def test_whatever_is_shown_is_made_of_a_names_characters(text: str) -> None:
    assert shown(text) == "of that name" or re.fullmatch(r"'[A-Za-z0-9_.\-/]{1,129}'", shown(text))


def test_a_guess_is_made_only_where_something_is_near() -> None:
    assert did_you_mean("dimensions") == " Did you mean 'dimensions'?"
    assert did_you_mean(None) == ""

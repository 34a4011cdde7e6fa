"""What `/openapi.json` promises holds, whatever schemathesis makes up: answers, types, refusals, methods."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.config import SchemathesisConfig

from serve_app.api import build_app
from serve_app.core.prompts import Prompts
from tests.service.fakes import AUTHORIZATION, CARD, KEY, RERANKER, FakeModel, FakeModels, card, service_over

SERVED = card(prompts=Prompts(query="search for this: "))
APP = build_app(service_over(FakeModels(FakeModel(SERVED), FakeModel(RERANKER))), max_body_bytes=1_000_000)
DAYS = {"from": "2026-01-01", "to": "2026-12-31"}
some_examples = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def page_with(config: dict[str, Any]) -> Any:
    config |= {"auth": {"openapi": {"key": {"bearer": KEY}}}}
    return schemathesis.openapi.from_asgi(
        "/openapi.json", APP, config=SchemathesisConfig.from_dict(config), headers=AUTHORIZATION
    )


def model_for(body: dict[str, Any]) -> str:
    return RERANKER.name if "query" in body else CARD.name


# How many dimensions a model has, no schema tells: some of what it allows is refused.
ANYTHING = page_with({"checks": {"positive_data_acceptance": {"enabled": False}}})


@ANYTHING.hook("map_body")
def about_a_model_that_is_served(context: Any, body: Any) -> Any:
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        return body
    return body | {"model": model_for(body)}


# What it allows is accepted once the request is about a model that is served. NUL: JSON Schema's patterns could say
# it, but clients that check them would pay for it with a regular expression over every text.
ALLOWED = page_with({"generation": {"mode": "positive", "allow-x00": False}})


@ALLOWED.hook("map_body")
def about_what_that_model_has(context: Any, body: dict[str, Any]) -> dict[str, Any]:
    served = {"model": model_for(body), "dimensions": CARD.other_dimensions[0]}
    return body | {field: served[field] for field in served if body.get(field) is not None}


@ALLOWED.hook("map_path_parameters")
def on_the_path_too(context: Any, path_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    return path_parameters and {"id": CARD.id}


@ALLOWED.hook("map_headers")
def without_a_key_that_may_be_used(context: Any, headers: dict[str, Any] | None) -> dict[str, Any] | None:
    """A key that was used for another body is refused, and no schema tells which those are."""
    return headers and {name: value for name, value in headers.items() if name != "Idempotency-Key"}


@ALLOWED.hook("map_query")
def over_days_that_there_are(context: Any, query: dict[str, Any] | None) -> dict[str, Any] | None:
    return query and {name: DAYS.get(name, value) for name, value in query.items()}


@ANYTHING.parametrize()
@some_examples
def test_every_answer_is_one_that_the_page_shows(case: Case[Any]) -> None:
    response = case.call_and_validate()
    assert len(response.headers["x-request-id"]) == 1
    assert len(response.headers["server-timing"]) == 1


@ALLOWED.parametrize()
@some_examples
def test_what_the_page_allows_is_answered(case: Case[Any]) -> None:
    response = case.call_and_validate()
    if case.meta and case.meta.phase.name.value == "fuzzing":  # the other phases pass by the hooks above
        assert response.status_code == 200

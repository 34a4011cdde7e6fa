"""Serve's own middleware around the service, as a replica or the proxy puts it: who names a request, and how often."""

from __future__ import annotations

import httpx2 as httpx
import pytest
from ray.serve._private.http_util import RequestIdMiddleware

from serve_app.api import build_app
from serve_app.deployments.ingress import _without_request_id
from tests.service.fakes import FakeModel, FakeModels, service_over


async def ids(headers: dict[str, str]) -> list[str]:
    app = RequestIdMiddleware(
        _without_request_id(build_app(service_over(FakeModels(FakeModel())), max_body_bytes=1000))
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        answers = [await http.get(path, headers=headers) for path in ("/health", "/nothing")]
    assert [answer.status_code for answer in answers] == [200, 401]
    first, second = (answer.headers.get_list("x-request-id") for answer in answers)
    assert len(first) == len(second)
    return first


async def test_a_callers_request_id_comes_back_once() -> None:
    assert await ids({"X-Request-Id": "mine-8"}) == ["mine-8"]


async def test_a_request_without_one_gets_one() -> None:
    (ours,) = await ids({})
    assert ours


@pytest.mark.parametrize("odd", ["two words", "x" * 200, "{}"])
async def test_what_is_no_request_id_is_answered_under_ours_first(odd: str) -> None:
    ours, given = await ids({"X-Request-Id": odd})
    assert given == odd
    assert len(ours) == 32

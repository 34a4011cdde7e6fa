from __future__ import annotations

import pytest
from pydantic import ValidationError

from serve_app.core.settings import IngressSettings


def test_no_origin_is_allowed_unless_it_is_named() -> None:
    assert IngressSettings().cors_origins == ()


@pytest.mark.parametrize(
    "origin",
    [
        "https://app.example.com",
        "http://localhost:3000",
        "https://a",
        "http://127.0.0.1:8080",
        "http://[::1]:8080",
        "https://xn--bcher-kva.example",
    ],
)
def test_an_origin_is_taken_as_a_browser_sends_it(origin: str) -> None:
    assert IngressSettings.model_validate({"cors_origins": [origin]}).cors_origins == (origin,)


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "null",
        "",
        "app.example.com",
        "https://*.example.com",
        "https://app.example.com/",
        "https://app.example.com/app",
        "https://App.example.com",
        "https://app.example.com:443",
        "http://app.example.com:80",
        "https://app.example.com:0",
        "https://user@app.example.com",
        "https://app.example.com\n",
        "https://a, https://b",
        "https://-",
        "ftp://app.example.com",
    ],
)
def test_what_no_browser_sends_and_what_is_no_single_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError, match="is no origin"):
        IngressSettings.model_validate({"cors_origins": [origin]})

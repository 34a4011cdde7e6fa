"""Planted secrets and texts: in no log, error, exception or printed object, and not in what the command says.

`test_errors.py` looks at the answer and the log of every kind of error; `tests/deployments` at a whole server's logs,
metrics and process list.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from pydantic import BaseModel, ValidationError
from typer.testing import CliRunner

from serve_app.api import build_app
from serve_app.cli import app as command
from serve_app.core import keys
from serve_app.core.idempotency import claim_id
from serve_app.core.settings import IdempotencySettings, IngressSettings
from serve_app.core.truncation import Tokenized
from serve_app.dispatch import Unit, UnitReply
from serve_app.sinks import SinkSettings
from serve_app.stores import StoreDown, StoreUnfit, open_store
from tests.redis_server import RedisServer
from tests.service.fakes import AUTHORIZATION, CARD, KEY, FakeModel, FakeModels, service_over

TEXT = "zephyrine text"
USER = "zephyrine user"
ORDER = "zephyrine-order"
WRONG_KEY = keys.mint(bytes([77] * keys.SECRET_BYTES))
PASSWORD = "swordfish-4711"
PLANTED = ("zephyrine", KEY[12:], WRONG_KEY[12:], PASSWORD)

BROKEN_URLS = [
    f"redis://:{PASSWORD}@127.0.0.1:1/0",
    f"redis://user:{PASSWORD}@127.0.0.1:1/0",
    f"redis://:{PASSWORD}@127.0.0.1:nonsense/0",
    f"redis://:{PASSWORD}@[::1/0",
    f"redis://:{PASSWORD}@127.0.0.1:99999999/0",
    f"redis://:{PASSWORD}@127.0.0.1:1/nonsense?socket_timeout={PASSWORD}",
    f"rediss://:{PASSWORD}@127.0.0.1:1/0",
    f"postgres://user:{PASSWORD}@db.example.com/books",
    PASSWORD,
]


def planted_in(told: str) -> list[str]:
    return [secret for secret in PLANTED if secret.lower() in told.lower()]


def in_full(error: BaseException) -> str:
    """All that anybody could print of it, and of what led to it."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    return "\n".join(f"{it} {it!r} {it.args} {''.join(traceback.format_exception(it))}" for it in chain)


async def never_answers(unit: Unit) -> UnitReply:
    await asyncio.Event().wait()
    raise AssertionError("somebody set an event that nobody holds")


def objects_of_the_service() -> Iterator[Any]:
    """Every one that lives now, whoever holds it."""
    for it in gc.get_objects():
        module = type(it).__module__
        if isinstance(module, str) and module.partition(".")[0] in ("serve_app", "redis"):
            yield it


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What asyncio was told of exceptions that nobody took."""
    caplog.set_level(logging.DEBUG)
    unraisable: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda it: unraisable.append(repr(it)))
    return unraisable


async def test_no_object_that_lives_during_a_request_prints_what_the_caller_sent() -> None:
    """Neither to a debugger nor to a log line that somebody adds one day."""
    model = FakeModel(send=never_answers)
    app = build_app(service_over(FakeModels(model)), max_body_bytes=10_000)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        body = {"model": CARD.id, "input": [TEXT, f"another {TEXT}"], "user": USER}
        headers = AUTHORIZATION | {"Idempotency-Key": ORDER}
        call = asyncio.create_task(http.post("/v1/embeddings", json=body, headers=headers))
        for _ in range(3000):
            if model.units:
                break
            await asyncio.sleep(0.01)
        assert model.units
        printed = {type(it).__qualname__: repr(it) for it in objects_of_the_service() if not planted_in(repr(it))}
        leaks = {type(it).__qualname__ for it in objects_of_the_service() if planted_in(repr(it))}
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    assert {"Call", "Job", "EmbeddingsRequest", "Caller", "Claim", "Packed", "ApiKey"} <= printed.keys() | leaks
    assert leaks == set()


async def test_a_request_that_nobody_waits_for_any_more_fails_in_silence(
    heard: list[str], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """The client hung up; then the encoder raises an error that quotes the text."""
    may_fail = asyncio.Event()

    async def fails(unit: Unit) -> UnitReply:
        await may_fail.wait()
        raise RuntimeError(f"cannot encode {TEXT}")

    model = FakeModel(send=fails)
    app = build_app(service_over(FakeModels(model)), max_body_bytes=10_000)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        headers = AUTHORIZATION | {"Idempotency-Key": f"{ORDER}-2"}
        call = asyncio.create_task(http.post("/v1/embeddings", json={"model": CARD.id, "input": TEXT}, headers=headers))
        for _ in range(3000):
            if model.units:
                break
            await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        may_fail.set()
        for _ in range(3000):
            if "RuntimeError" in caplog.text:
                break
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        gc.collect()
    assert "RuntimeError" in caplog.text, "by its type"
    told = caplog.text + str([vars(record) for record in caplog.records]) + str(heard) + str(capfd.readouterr())
    assert not planted_in(told)


async def test_a_requests_line_in_the_log_holds_nothing_that_it_sent() -> None:
    """However it ends: answered, replayed, refused for each part of it, or broken."""
    lines: list[Mapping[str, Any]] = []

    async def breaks(texts: Sequence[str]) -> Tokenized:
        if any("broken" in text for text in texts):
            raise RuntimeError(f"cannot tokenize {texts}")
        return await FakeModel().tokenize(texts)

    models = FakeModels(FakeModel(tokenize=breaks))
    app = build_app(service_over(models), max_body_bytes=10_000, log=lines.append)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=AUTHORIZATION) as http:
        good = {"model": CARD.id, "input": TEXT, "user": USER}
        for more, headers in (
            ({}, {"Idempotency-Key": f"{ORDER}-3"}),
            ({}, {"Idempotency-Key": f"{ORDER}-3"}),
            ({"input": f"another {TEXT}"}, {"Idempotency-Key": f"{ORDER}-3"}),
            ({"model": TEXT}, {}),
            ({"input": [TEXT, 7]}, {}),
            ({TEXT: TEXT}, {}),
            ({"input": f"broken {TEXT}"}, {}),
            ({}, {"Idempotency-Key": ORDER * 100}),
            ({}, {"Authorization": f"Bearer {WRONG_KEY}"}),
            ({}, {"X-Request-Id": TEXT}),
        ):
            await http.post("/v1/embeddings", json=good | more, headers=headers)
        await http.get("/v1/usage", params={"from": TEXT})
        await http.get(f"/v1/models/{ORDER}")
        await http.get(f"/{ORDER}")
    assert {line["status"] for line in lines} == {200, 400, 401, 404, 409, 500}
    assert len(lines) == 13
    assert not planted_in(str(lines))


def test_what_is_kept_of_an_idempotency_key_does_not_tell_it() -> None:
    assert not planted_in(claim_id("ws", "/v1/embeddings", ORDER))


# The store's password


@pytest.mark.parametrize("url", BROKEN_URLS)
async def test_a_store_that_cannot_be_opened_does_not_tell_its_password(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises((StoreUnfit, StoreDown)) as refused:
        await open_store(url)
    assert not planted_in(f"{refused.value} {refused.value!r} {caplog.text}")
    assert not planted_in("".join(traceback.format_exception(refused.value)))


@pytest.mark.parametrize("url", BROKEN_URLS)
@pytest.mark.parametrize("by_environment", [True, False], ids=["environment", "option"])
def test_the_command_does_not_tell_it_either(url: str, by_environment: bool) -> None:
    for words in (["workspace", "list"], ["key", "list", "ws"], ["ledger", "usage"], ["workspace", "--help"]):
        more = [] if by_environment or "--help" in words else ["--store", url]
        environment = {"SERVE_APP_STORE": url if by_environment else None, "COLUMNS": "300"}
        result = CliRunner().invoke(command, [*words, *more], env=environment)
        assert result.exit_code == (0 if "--help" in words else 2)
        assert not planted_in(result.output)
        assert result.stderr.count("\n") <= 1


async def test_a_redis_that_wants_another_password_hears_it_and_nobody_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = RedisServer(tmp_path / "redis", requirepass=PASSWORD)
    server.start()
    try:
        store = await open_store(server.url)
        assert await store.workspaces() == []
        leaks = {type(it).__qualname__ for it in objects_of_the_service() if _shows_password(it)}
        await store.close()
        with pytest.raises(StoreDown) as refused:
            await open_store(server.url.replace(PASSWORD, f"not-{PASSWORD}"))
        server.restart(maxmemory_policy="allkeys-lru")
        with pytest.raises(StoreUnfit) as unfit:
            await open_store(server.url)
    finally:
        server.stop()
    assert "maxmemory-policy" in str(unfit.value)
    assert leaks == set()
    for error in (refused.value, unfit.value):
        assert not planted_in(f"{error} {error!r} {''.join(traceback.format_exception(error))}")
    assert not planted_in(caplog.text)


def _shows_password(it: Any) -> bool:
    return bool(planted_in(repr(it)))


@pytest.mark.parametrize("settings", [IngressSettings, IdempotencySettings])
def test_settings_show_no_store_and_their_errors_repeat_none(settings: type[BaseModel]) -> None:
    url = f"redis://:{PASSWORD}@db/0"
    good = settings.model_validate({"store": url})
    assert good.store == url  # type: ignore[attr-defined]
    assert not planted_in(f"{good!r} {good}")
    for bad in ({"store": url, "num_cpus": "many"}, {"stroe": url}, {"store": [url]}, {"store": url, "num_cpus": -1}):
        with pytest.raises(ValidationError) as refused:
            settings.model_validate(bad)
        assert not planted_in(in_full(refused.value))


def test_a_sinks_secret_and_url_are_not_shown() -> None:
    sink = SinkSettings.model_validate(
        {"name": "hook", "url": f"https://user:{PASSWORD}@example.com/?token={PASSWORD}", "secret": f"whsec_{PASSWORD}"}
    )
    assert not planted_in(f"{sink!r} {sink}")


# Keys


def test_a_keys_text_is_printed_once_where_it_is_made(sqlite_url: str) -> None:
    def run(*words: str) -> Any:
        return CliRunner().invoke(command, [*words, "--store", sqlite_url])

    workspace = run("workspace", "create", "test").stdout.strip()
    made = run("key", "create", workspace)
    text = made.stdout.strip()
    assert keys.well_formed(text)
    assert text[12:] not in made.stderr
    later = [run("key", "list", workspace), run("key", "list", workspace, "--json"), run("workspace", "list", "--json")]
    for result in later:
        assert result.exit_code == 0
        assert text[12:] not in result.output
        assert keys.digest(text) not in result.output
    store = Path(sqlite_url.removeprefix("sqlite:"))
    for file in store.parent.iterdir():
        assert text[12:].encode() not in file.read_bytes()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:{tmp_path / 'store.db'}"


def test_the_search_would_find_something() -> None:
    error = ValueError(TEXT)
    error.__context__ = KeyError(PASSWORD)
    assert planted_in(in_full(error)) == ["zephyrine", PASSWORD]
    assert planted_in(f"Bearer {KEY}") == [KEY[12:]]

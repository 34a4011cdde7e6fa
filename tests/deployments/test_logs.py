from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from logging.handlers import MemoryHandler, RotatingFileHandler
from pathlib import Path

import pytest

from serve_app.deployments.logs import RequestLog, join_serve


@pytest.fixture
def serve_log(tmp_path: Path) -> Iterator[Path]:
    """As Serve has it in a replica: records wait in memory, until they are many."""
    serve, ours = logging.getLogger("ray.serve"), logging.getLogger("serve_app")
    before = [*serve.handlers], serve.level, [*ours.handlers], ours.level
    target = RotatingFileHandler(tmp_path / "replica_ingress_abc.log", maxBytes=2000, backupCount=2)
    serve.handlers, serve.level = [MemoryHandler(1000, target=target)], logging.INFO
    yield tmp_path / "replica_ingress_abc.log"
    target.close()
    serve.handlers, serve.level, ours.handlers, ours.level = before


async def ended(log: RequestLog) -> None:
    task = asyncio.create_task(log.run())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_our_warnings_are_in_serves_log_at_once_and_once(serve_log: Path) -> None:
    join_serve()
    join_serve()
    logging.getLogger("serve_app.books").info("what is known")
    assert serve_log.read_text() == ""
    logging.getLogger("serve_app.books").warning("what is wrong")
    logging.getLogger("serve_app.books").debug("what is not asked for")
    assert serve_log.read_text() == "what is known\nwhat is wrong\n"


async def test_requests_are_lines_of_json_beside_it(serve_log: Path) -> None:
    log = RequestLog()
    log({"status": 200, "model": "müßig"})
    log({"status": 500, "model": "a%sb"})
    await ended(log)
    lines = serve_log.with_name("requests_replica_ingress_abc.log").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"status": 200, "model": "müßig"}, {"status": 500, "model": "a%sb"}]


async def test_they_rotate_as_serves_log_does(serve_log: Path) -> None:
    log = RequestLog()
    for number in range(100):
        log({"number": number, "padding": "x" * 100})
        log._write(log._take())
    await ended(log)
    files = sorted(serve_log.parent.glob("requests_*"))
    assert len(files) == 3
    assert all(file.stat().st_size <= 2000 for file in files)
    assert json.loads(files[0].read_text().splitlines()[-1])["number"] == 99


def test_where_serve_writes_none_it_says_so(
    serve_log: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "handlers", [])
    log = RequestLog()
    log({"status": 200})
    log._write(log._take())
    assert "no requests are logged" in caplog.text

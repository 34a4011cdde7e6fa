"""Logs, in Serve's own folder and as its `logging_config` says: what our modules tell, and a line of JSON a request.

A request's line goes into a file of its own, written once a second: by way of a logger it cost fifteen times as much.
Nothing that a caller sent is in it but the request id, which may hold no text.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import orjson

WRITE_S = 1.0

_serve = logging.getLogger("ray.serve")
logger = logging.getLogger(__name__)


class _ToServe(logging.Handler):
    """A record of ours becomes one of Serve's, with its request id and replica."""

    def emit(self, record: logging.LogRecord) -> None:
        _serve.handle(record)
        if record.levelno >= logging.WARNING:  # Serve may hold back a thousand records
            for handler in _serve.handlers:
                handler.flush()


def join_serve() -> None:
    """Once in each process: else what our modules log is on stderr alone, and only its warnings."""
    ours = logging.getLogger("serve_app")
    if not any(isinstance(handler, _ToServe) for handler in ours.handlers):
        ours.addHandler(_ToServe())
        ours.setLevel(_serve.level)


class RequestLog:
    """Beside this replica's log, under the same rules of rotation."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._file = _beside_serves()
        if self._file is None:
            logger.warning("Serve writes no log here, so no requests are logged")

    def __call__(self, line: Mapping[str, Any]) -> None:
        self._lines.append(orjson.dumps(line))

    async def run(self) -> None:
        """Until it is cancelled; then once more."""
        try:
            while True:
                await asyncio.sleep(WRITE_S)
                await asyncio.to_thread(self._write, self._take())
        finally:
            self._write(self._take())
            if self._file is not None:
                self._file.close()

    def _take(self) -> list[bytes]:
        """What came since the last time."""
        lines, self._lines = self._lines, []
        return lines

    def _write(self, lines: list[bytes]) -> None:
        """A disk that is full costs lines, not requests."""
        if lines and self._file is not None:
            self._file.handle(logging.makeLogRecord({"msg": b"\n".join(lines).decode()}))


def _beside_serves() -> RotatingFileHandler | None:
    for handler in _serve.handlers:
        target = getattr(handler, "target", None)
        if isinstance(target, RotatingFileHandler):
            path = Path(target.baseFilename)
            name = path.with_name(f"requests_{path.name}")
            return RotatingFileHandler(
                name, maxBytes=target.maxBytes, backupCount=target.backupCount, encoding="utf-8", delay=True
            )
    return None

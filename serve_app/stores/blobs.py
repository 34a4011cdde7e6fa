"""Replies too large for a record, as files: written and synced before the record that names them.

A name is never written twice with other contents, a file lives longer than the record that names it, and one that is
missing means that its reply is computed again, without a bill. On several machines the folder must be a shared one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from serve_app.core.idempotency import GRACE_MS, REPLAY_MS, RUNNING_MS

# A record expires 24 h and 5 min after it is written, and that is at most an hour after its file.
KEEP_MS = REPLAY_MS + GRACE_MS + RUNNING_MS
_NAME = re.compile(r"[0-9a-f]{32}-[0-9a-f]{32}")


class Blobs:
    """A folder of files named by operation and attempt. Blocking: call it in a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, name: str, content: bytes) -> None:
        """On disk, whole, under its name, when this returns. Raises OSError."""
        path = self._path(name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_suffix(".part")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.rename(path)
        except OSError:
            draft.unlink(missing_ok=True)  # a full disk needs the room
            raise
        _sync_folder(path.parent)
        _sync_folder(self._folder)  # which may have got a new folder for it

    def read(self, name: str) -> bytes | None:
        """None: it is not there (any more)."""
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def collect(self, now_ms: int) -> int:
        """Remove what no record can name any more, and drafts that nobody finished. How many files went."""
        gone = 0
        for path in self._folder.glob("*/*"):
            try:
                if path.stat().st_mtime * 1000 < now_ms - KEEP_MS:
                    path.unlink()
                    gone += 1
            except FileNotFoundError:  # another collector was faster
                continue
        return gone

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError("not the name of a blob")
        return self._folder / name[:2] / name


def _sync_folder(folder: Path) -> None:
    """Else the file's name may be lost with the power, though its bytes are not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.core.idempotency import GRACE_MS, REPLAY_MS
from serve_app.stores.blobs import KEEP_MS, Blobs

NAME = "ab" * 16 + "-" + "12" * 16
OTHER = "ac" * 16 + "-" + "12" * 16
NOW_MS = 1_795_600_800_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


@pytest.fixture
def blobs(folder: Path) -> Blobs:
    return Blobs(folder)


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def age(folder: Path, name: str, written_ms: int) -> None:
    (path,) = folder.glob(f"*/{name}")
    os.utime(path, ns=(written_ms * 1_000_000, written_ms * 1_000_000))


def fail_to_sync(_: int) -> None:
    raise OSError(errno.EIO, "the disk is gone")


@pytest.mark.parametrize("content", [b"", b"\0\n" * 3, bytes(range(256)) * 4096], ids=["empty", "short", "a megabyte"])
def test_what_was_written_is_read(blobs: Blobs, content: bytes) -> None:
    blobs.write(NAME, content)
    assert blobs.read(NAME) == content


def test_what_was_never_written_is_none(blobs: Blobs) -> None:
    assert blobs.read(NAME) is None
    blobs.write(OTHER, b"another")
    assert blobs.read(NAME) is None


def test_what_was_removed_is_none_and_may_be_removed_again(blobs: Blobs) -> None:
    blobs.write(NAME, b"reply")
    blobs.remove(NAME)
    assert blobs.read(NAME) is None
    blobs.remove(NAME)


def test_another_process_reads_what_this_one_wrote(folder: Path) -> None:
    Blobs(folder).write(NAME, b"reply")
    assert Blobs(folder).read(NAME) == b"reply"


def test_only_the_service_may_read_a_blob(folder: Path, blobs: Blobs, open_umask: None) -> None:
    blobs.write(NAME, b"reply")
    (path,) = files(folder)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_nothing_but_the_blob_is_left_behind(folder: Path, blobs: Blobs) -> None:
    blobs.write(NAME, b"reply")
    assert [path.name for path in files(folder)] == [NAME]


def test_a_write_that_fails_in_the_middle_leaves_no_half_file_under_the_name(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail_to_sync)
        with pytest.raises(OSError, match="the disk is gone"):
            blobs.write(NAME, b"half of a reply")
    assert blobs.read(NAME) is None

    blobs.write(NAME, b"reply")
    assert blobs.read(NAME) == b"reply"


def test_the_name_appears_after_the_bytes_are_synced_and_is_synced_itself(
    folder: Path, blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []

    def sync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append(("folder" if is_folder else "file", blobs.read(NAME) == b"reply"))

    monkeypatch.setattr(os, "fsync", sync)
    blobs.write(NAME, b"reply")
    assert synced == [("file", False), ("folder", True), ("folder", True)]  # the blob's folder, and the one of that


def test_a_reader_sees_the_whole_blob_or_none(blobs: Blobs) -> None:
    content = os.urandom(1 << 20)
    seen: list[bytes | None] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(blobs.read(NAME))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(20):
            blobs.remove(NAME)
            blobs.write(NAME, content)
    finally:
        done.set()
        reader.join()
    assert all(found is None or found == content for found in seen)


def test_a_blob_outlives_the_record_that_names_it() -> None:
    assert KEEP_MS > REPLAY_MS + GRACE_MS


def test_only_what_no_record_can_name_any_more_is_collected(folder: Path, blobs: Blobs) -> None:
    for name, written_ms in ((NAME, NOW_MS - KEEP_MS - 1), (OTHER, NOW_MS - KEEP_MS)):
        blobs.write(name, b"reply")
        age(folder, name, written_ms)

    assert blobs.collect(NOW_MS) == 1
    assert blobs.read(NAME) is None
    assert blobs.read(OTHER) == b"reply"
    assert blobs.collect(NOW_MS) == 0


def test_a_draft_that_nobody_finished_is_collected_when_it_is_old(
    folder: Path, blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail_to_sync)
        with pytest.raises(OSError, match="the disk is gone"):
            blobs.write(NAME, b"half of a reply")
    for draft in files(folder):
        os.utime(draft, (0, 0))
    blobs.collect(NOW_MS)
    assert files(folder) == []


def test_there_may_be_nothing_to_collect(blobs: Blobs) -> None:
    assert blobs.collect(NOW_MS) == 0


def test_two_collectors_do_not_disturb_each_other(folder: Path, blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs.write(NAME, b"reply")
    age(folder, NAME, 0)
    unlink = Path.unlink

    def unlink_after_another_did(path: Path) -> None:
        unlink(path)
        unlink(path)

    monkeypatch.setattr(Path, "unlink", unlink_after_another_did)
    assert blobs.collect(NOW_MS) == 0
    assert files(folder) == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../" + NAME,
        NAME + "/..",
        "../../../../etc/passwd",
        "/etc/passwd",
        NAME + "\n",
        NAME + ".part",
        NAME + "\0",
        NAME.upper(),
        NAME[:-1],
        NAME + "0",
        NAME.replace("-", "/"),
        NAME.replace("-", ""),
        "ab/" + "ab" * 15 + "a" + "-" + "12" * 16,
        "\u0660" * 32 + "-" + "\u0660" * 32,
    ],
)
def test_a_name_that_could_lead_elsewhere_is_refused(folder: Path, blobs: Blobs, name: str) -> None:
    for touch in (blobs.read, blobs.remove, lambda name: blobs.write(name, b"reply")):
        with pytest.raises(ValueError, match="not the name of a blob"):
            touch(name)
    assert not folder.exists()

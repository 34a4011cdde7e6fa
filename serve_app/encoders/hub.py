"""From the hub to a folder that needs no hub: weights, tokenizer and configuration at one commit, each file checked.

A file grows in a draft of the folder and goes on where it stopped; the folder gets its name when all is in it and every
hash is what the hub said. Pickles are never fetched: they run code when they are read. `manifest.py` is what stays.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils._headers import build_hf_headers

from serve_app.encoders import manifest
from serve_app.encoders.manifest import Kept, Manifest

SUFFIXES = (".safetensors", ".json", ".txt", ".model")
PICKLES = (".bin", ".pt", ".pkl", ".pth", ".ckpt")
OTHER_RUNTIMES = ("onnx", "openvino")
_COMMIT = ".commit"  # in a draft: which one it is of

Progress = Callable[[int], object]  # told how many bytes are there, of all files together


class CannotPull(Exception):
    """One line for a person, with what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file at the hub. digest: its sha256, or git's name for it where the hub keeps no sha256."""

    path: str
    bytes: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What a model is at one commit."""

    repository: str
    revision: str
    files: tuple[File, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def listing(repository: str, revision: str | None) -> Listing:
    """What is to be fetched. revision: a commit, branch or tag; None for the newest. Raises CannotPull."""
    with _told(repository):
        info = HfApi(endpoint=_endpoint()).model_info(repository, revision=revision, files_metadata=True)
    siblings = [it for it in info.siblings or [] if _is_wanted(it.rfilename)]
    names = [it.rfilename for it in siblings]
    pickled = [it.rfilename for it in info.siblings or [] if _is_pickle_alone(it.rfilename, names)]
    if pickled:
        raise CannotPull(
            f"{repository} has {pickled[0]}, a pickle, and no safetensors in its place: it is not fetched."
        )
    if not any(name.endswith(".safetensors") and "/" not in name for name in names):
        raise CannotPull(f"{repository} has no *.safetensors; other kinds of weights are not read.")
    files = tuple(
        File(path=it.rfilename, bytes=it.size or 0, digest=it.lfs.sha256 if it.lfs else it.blob_id or "")
        for it in siblings
    )
    if info.sha is None or not all(file.digest for file in files):
        raise CannotPull(f"{_endpoint()} does not say which commit and hashes {repository} has: it is no hub.")
    return Listing(repository=repository, revision=info.sha, files=files)


def pull(wanted: Listing, folder: Path, progress: Progress) -> Manifest:
    """The folder, with all files and their manifest. A folder that is there must be it. Raises CannotPull, OSError."""
    if folder.exists():
        return _is_there(wanted, folder)
    draft = folder.with_name(f".{folder.name}.part")
    draft.mkdir(parents=True, exist_ok=True)
    _drop_others(draft, wanted)
    missing = wanted.bytes - sum(path.stat().st_size for path in draft.rglob("*") if path.is_file())
    if missing > (free := shutil.disk_usage(draft).free):
        raise CannotPull(f"{draft} has {free:,} bytes free, and {missing:,} are needed.")
    done, kept = 0, {}
    for file in wanted.files:
        with _told(wanted.repository):
            kept[file.path] = _file(wanted, file, draft, functools.partial(_report, progress, done))
        done += file.bytes
    found = Manifest(model=wanted.repository, revision=wanted.revision, files=kept)
    manifest.write(draft, found)
    (draft / _COMMIT).unlink()
    for path in [*(path for path in draft.rglob("*") if path.is_file()), draft]:
        _sync(path)
    draft.rename(folder)
    _sync(folder.parent)
    return found


def _is_there(wanted: Listing, folder: Path) -> Manifest:
    try:
        found = manifest.read(folder)
    except ValueError:
        found = None
    if found is None or (found.model, found.revision) != (wanted.repository, wanted.revision):
        raise CannotPull(f"{folder} is there, and is not {wanted.repository}@{wanted.revision}: move it away first.")
    return found


def _file(wanted: Listing, file: File, draft: Path, progress: Progress) -> Kept:
    path = draft / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    there = path.stat().st_size if path.is_file() else 0
    if there > file.bytes:
        path.unlink()
        there = 0
    progress(there)
    with path.open("ab") as out:
        if there < file.bytes:
            http_get(
                hf_hub_url(wanted.repository, file.path, revision=wanted.revision, endpoint=_endpoint()),
                out,
                resume_size=there,
                headers=build_hf_headers(),
                expected_size=file.bytes,
                tqdm_class=_bar(progress),
            )
    sha256, git = manifest.digests(path)
    if file.digest not in (sha256, git):
        path.unlink()
        raise CannotPull(
            f"{file.path} is not what the hub says it is ({sha256[:12]}..., not {file.digest[:12]}...): "
            "it was thrown away; run this again to fetch it anew."
        )
    return Kept(sha256=sha256, bytes=file.bytes)


def _report(progress: Progress, done: int, there: int) -> None:
    progress(done + there)


class _Bar:
    """What the hub's client takes for a tqdm."""

    def __init__(self, progress: Progress, *, initial: int = 0, **_: Any) -> None:
        self._progress, self._there = progress, initial

    def update(self, more: float | None = 1) -> None:
        self._there += int(more or 0)
        self._progress(self._there)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None: ...


def _bar(progress: Progress) -> Any:
    return functools.partial(_Bar, progress)


def _is_wanted(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return (
        name.endswith(SUFFIXES)
        and len(parts) <= 2  # a sentence-transformers module has a folder, and no folder in it
        and parts[0] not in OTHER_RUNTIMES
        and not any(part.startswith((".", "/")) for part in parts)
        and name != manifest.NAME
    )


def _is_pickle_alone(name: str, wanted: list[str]) -> bool:
    """pytorch_model.bin of the model or a module, with nothing that could be loaded instead."""
    path = PurePosixPath(name)
    if path.suffix not in PICKLES or not path.stem.startswith("pytorch_model") or len(path.parts) > 2:
        return False
    if path.parts[0] in OTHER_RUNTIMES:
        return False
    return not any(it.endswith(".safetensors") and PurePosixPath(it).parent == path.parent for it in wanted)


def _drop_others(draft: Path, wanted: Listing) -> None:
    """What an earlier pull of another commit left: files of the same name are told apart by their hash alone."""
    state = draft / _COMMIT
    if not state.is_file() or state.read_text() != wanted.revision:
        shutil.rmtree(draft)
        draft.mkdir()
        state.write_text(wanted.revision)


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


@contextmanager
def _told(repository: str) -> Iterator[None]:
    """The hub's errors, in a line that says what to do. Its client's own warnings are kept off the terminal."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except OfflineModeIsEnabled:
        raise CannotPull("HF_HUB_OFFLINE is set, so the hub is not asked: unset it, or pull on another host.") from None
    except GatedRepoError:
        raise CannotPull(f"{repository} is gated: accept its terms at {_endpoint()}, and set HF_TOKEN.") from None
    except RevisionNotFoundError:
        raise CannotPull(f"{repository} has no such revision at {_endpoint()}.") from None
    except RepositoryNotFoundError:
        raise CannotPull(f"There is no {repository} at {_endpoint()}; if it is private, set HF_TOKEN.") from None
    except HFValidationError:
        raise CannotPull(f"{repository!r} is no name of a model: OWNER/NAME, or OWNER/NAME@COMMIT.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise CannotPull(f"{_endpoint()} answers {status} for {repository}: run this again later.") from None
    except httpx2.HTTPError as error:
        raise CannotPull(
            f"The hub at {_endpoint()} cannot be reached ({type(error).__name__}): check the network, a proxy, or "
            "HF_ENDPOINT, and run this again: it goes on where it stopped. Or pull on another host and copy the folder."
        ) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise CannotPull(f"A file of {repository} was cut off: run this again, it goes on where it stopped.") from None
    finally:
        logger.setLevel(before)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

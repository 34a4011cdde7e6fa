"""From what a model entry names to a folder of files on this machine: a package, a directory, or the hub.

Only safetensors weights are accepted: a pickle runs code when it is read.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from serve_app.core.catalog import ModelSpec, Source

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*/config.json", "*/*.safetensors"]


def fetch(spec: ModelSpec) -> Path:
    """The folder. Raises FileNotFoundError with what is missing and where it was looked for."""
    folder = _folder(spec, download=True)
    check(spec, folder)
    return folder


def locate(spec: ModelSpec) -> Path:
    """The folder, if it is on this machine and fit to be loaded. Raises FileNotFoundError that says what is not."""
    try:
        folder = _folder(spec, download=False)
    except (LocalEntryNotFoundError, HfHubHTTPError):
        raise FileNotFoundError(
            f"model {spec.id}: {spec.source} has not been downloaded; its first replica will, if the hub is reached"
        ) from None
    check(spec, folder)
    return folder


def check(spec: ModelSpec, folder: Path) -> None:
    """Raises FileNotFoundError if the folder holds no weights that may be read."""
    if not folder.is_dir():
        raise FileNotFoundError(f"model {spec.id}: {spec.source} is {folder}, which is no folder")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"model {spec.id}: no *.safetensors in {folder}; other kinds of weights are not read")
    for pickled in folder.rglob("pytorch_model*.bin"):
        if not any(pickled.parent.glob("*.safetensors")):
            raise FileNotFoundError(f"model {spec.id}: {pickled} is a pickle, and there are no safetensors beside it")


def _folder(spec: ModelSpec, *, download: bool) -> Path:
    source = Source.parse(spec.source)
    match source.kind:
        case "package":
            return _in_package(source.location)
        case "hub":
            patterns = [*_FILES, "*.py"] if spec.trust_remote_code else _FILES
            return Path(
                snapshot_download(
                    source.location, revision=source.revision, allow_patterns=patterns, local_files_only=not download
                )
            )
        case "directory":
            return Path(source.location).expanduser().resolve()


def _in_package(location: str) -> Path:
    package, _, inside = location.partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"there is no installed package {package!r}: pip install it, or name another source")
    return Path(next(iter(found.submodule_search_locations))) / inside

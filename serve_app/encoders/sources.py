"""From what a model entry names to a folder of files on this machine: a package, a directory, or the hub.

Only safetensors weights are accepted: a pickle runs code when it is read.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from huggingface_hub import snapshot_download

from serve_app.core.catalog import ModelSpec, Source

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*/config.json", "*/*.safetensors"]


def fetch(spec: ModelSpec) -> Path:
    """The folder. Raises FileNotFoundError with what is missing and where it was looked for."""
    source = Source.parse(spec.source)
    match source.kind:
        case "package":
            folder = _in_package(source.location)
        case "hub":
            code = ["*.py"] if spec.trust_remote_code else []
            folder = Path(snapshot_download(source.location, revision=source.revision, allow_patterns=_FILES + code))
        case "directory":
            folder = Path(source.location).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"model {spec.id}: {spec.source} is {folder}, which is no folder")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"model {spec.id}: no *.safetensors in {folder}; other kinds of weights are not read")
    for pickled in folder.rglob("pytorch_model*.bin"):
        if not any(pickled.parent.glob("*.safetensors")):
            raise FileNotFoundError(f"model {spec.id}: {pickled} is a pickle, and there are no safetensors beside it")
    return folder


def _in_package(location: str) -> Path:
    package, _, inside = location.partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"there is no installed package {package!r}: pip install it, or name another source")
    return Path(next(iter(found.submodule_search_locations))) / inside

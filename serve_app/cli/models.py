"""`serve-app models`: which models a config names, whether their files are here and right, and how they get here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from serve_app.cli import config as configs
from serve_app.cli.config import ConfigPath
from serve_app.cli.terminal import Failed, Json, say, show_json, show_table
from serve_app.core.catalog import ModelSpec, Source
from serve_app.core.known import Task

app = typer.Typer(help="Models and their files.", no_args_is_help=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One entry. dimensions: the native one, and those a request may ask for; None where no file says, or it ranks."""

    id: str
    name: str
    task: str
    dimensions: list[int] | None
    source: str
    folder: str | None
    bytes: int | None
    present: bool
    missing: str | None  # why it is not present


@app.command("list")
def list_(config: ConfigPath = configs.DEFAULT, json: Json = False) -> None:
    """The models of a config, and whether their files are on this machine."""
    rows = [_row(spec) for spec in configs.models(config)]
    if json:
        show_json(rows)
        return
    columns = ("id", "name", "task", "dimensions", "source", "folder", "MiB", "present")
    cells = [
        (
            it.id,
            it.name,
            it.task,
            "a score" if it.task == Task.RERANK else ", ".join(map(str, it.dimensions or ())) or "?",
            it.source,
            it.folder,
            None if it.bytes is None else f"{it.bytes / 2**20:.0f}",
            "yes" if it.present else "no",
        )
        for it in rows
    ]
    show_table(columns, cells)


@app.command()
def verify(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help="Ids of the config; else all.")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Write a manifest for folders without one: trust what is there now.")
    ] = False,
    config: ConfigPath = configs.DEFAULT,
    json: Json = False,
) -> None:
    """Hash the models' files. Exit code 0: all are what they should be; 1: some are not, or nobody knows; 2: no config.

    What they should be, a folder's manifest says (`models pull` writes it), the hub's cache, and for the bundled model
    this program.
    """
    from serve_app.encoders import manifest
    from serve_app.encoders.manifest import Checked, Verdict

    specs = _chosen(configs.models(config), ids or [])
    found: list[tuple[ModelSpec, Checked]] = []
    wrong: list[str] = []
    with _progress(json) as bar:
        for spec in specs:
            task = bar.add_task(spec.id, total=None)
            try:
                folder = _folder(spec)
                bar.update(task, total=sum((folder / name).stat().st_size for name in manifest.weights(folder)))
                if record and manifest.read(folder) is None:
                    _record(spec, folder)
                found += [(spec, it) for it in manifest.verify(spec, folder, partial(bar.advance, task))]
            except FileNotFoundError as error:
                wrong.append(str(error))
            except ValueError:
                wrong.append(f"model {spec.id}: its {manifest.NAME} is damaged")
    if json:
        show_json({"files": [{"model": spec.id, **asdict(it)} for spec, it in found], "errors": wrong})
    else:
        columns = ("model", "file", "verdict", "bytes", "sha256")
        show_table(columns, [(spec.id, it.file, it.verdict.value, it.bytes, it.sha256) for spec, it in found])
    for line in wrong:
        say(line)
    raise typer.Exit(1 if wrong or any(it.verdict is not Verdict.OK for _, it in found) else 0)


@app.command()
def pull(
    wanted: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="OWNER/NAME, OWNER/NAME@COMMIT, or an id of the config.")
    ],
    to: Annotated[Path, typer.Option("--to", help="Folder that gets OWNER/NAME.")],
    config: ConfigPath = configs.DEFAULT,
    json: Json = False,
) -> None:
    """Fetch models into a folder that needs no network: copy it to the host, and name it as the source.

    Only safetensors, tokenizer and configuration, never pickles. Each file's hash is checked and kept in manifest.json.
    What is interrupted goes on where it stopped. HF_ENDPOINT and HF_TOKEN are obeyed.
    """
    from serve_app.encoders import hub

    done: list[dict[str, Any]] = []
    with _progress(json) as bar:
        for text in wanted:
            repository, revision = _repository(text, config)
            task = bar.add_task(repository, total=None)
            try:
                listing = hub.listing(repository, revision)
                bar.update(task, total=listing.bytes)
                folder = (to.expanduser() / repository).absolute()
                hub.pull(listing, folder, partial(_completed, bar, task))
            except hub.CannotPull as error:
                raise Failed(str(error)) from None
            bar.update(task, completed=listing.bytes)
            sizes = {"files": len(listing.files), "bytes": listing.bytes}
            done.append({"model": repository, "revision": listing.revision, **sizes, "source": str(folder)})
    if json:
        show_json(done)
        return
    for it in done:
        typer.echo(f"{it['model']} at {it['revision']}: {it['files']} files, {it['bytes']:,} bytes. In its entry:")
        typer.echo(f"  source: {orjson.dumps(it['source']).decode()}")


def _row(spec: ModelSpec) -> Row:
    folder, why = None, None
    try:
        folder = _folder(spec)
    except FileNotFoundError as error:
        why = str(error)
    return Row(
        id=spec.id,
        name=spec.name,
        task=spec.task.value,
        dimensions=dimensions(spec, folder) if folder else None,
        source=spec.source,
        folder=str(folder) if folder else None,
        bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder else None,
        present=folder is not None,
        missing=why,
    )


def dimensions(spec: ModelSpec, folder: Path) -> list[int] | None:
    """As its files say: the last module that projects, the pooling, or the transformer itself. None: a reranker."""
    if spec.task is Task.RERANK:
        return None
    for name, key in (
        ("3_Dense/config.json", "out_features"),
        ("2_Dense/config.json", "out_features"),
        ("1_Pooling/config.json", "word_embedding_dimension"),
        ("config.json", "hidden_size"),
        ("config.json", "dim"),
    ):
        found = _json(folder / name).get(key)
        if isinstance(found, int):
            return [found, *sorted(set(spec.dimensions) - {found}, reverse=True)]
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _folder(spec: ModelSpec) -> Path:
    from serve_app.encoders import sources  # the hub's client takes a moment

    return sources.locate(spec)


def _chosen(specs: list[ModelSpec], ids: list[str]) -> list[ModelSpec]:
    if unknown := set(ids) - {spec.id for spec in specs}:
        raise Failed(f"The config has no model {', '.join(sorted(unknown))}: see serve-app models list.")
    return [spec for spec in specs if not ids or spec.id in ids]


def _record(spec: ModelSpec, folder: Path) -> None:
    """Of a directory: the hub's cache and installed packages are not ours to write to."""
    from serve_app.encoders import manifest
    from serve_app.encoders.manifest import Kept, Manifest

    if Source.parse(spec.source).kind != "directory":
        return
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    files = {
        name: Kept(sha256=manifest.digests(folder / name)[0], bytes=(folder / name).stat().st_size) for name in names
    }
    manifest.write(folder, Manifest(model=spec.name, files=files))


def _repository(text: str, config: Path) -> tuple[str, str | None]:
    """(OWNER/NAME, revision)."""
    if "/" not in text:
        (spec,) = _chosen(configs.models(config), [text])
        text = spec.source
        if Source.parse(text).kind != "hub":
            raise Failed(f"Model {spec.id} comes from {text}, not from the hub.")
    repository, _, revision = text.removeprefix("hub:").partition("@")
    return repository, revision or None


def _completed(bar: Progress, task: TaskID, there: int) -> None:
    bar.update(task, completed=there)


@contextmanager
def _progress(json: bool) -> Iterator[Progress]:
    """A bar on stderr, if that is a terminal and somebody reads."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=json or not console.is_terminal
    ) as bar:
        yield bar

"""`serve-app embed`: a file of texts through a running service into a file of vectors."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from serve_app.bulk import BulkError, Job, run
from serve_app.bulk.client import Client
from serve_app.bulk.run import Progress, Summary
from serve_app.cli.terminal import Failed, Json, say, show_json
from serve_app.core.catalog import MOST_STRINGS

KEY_VARIABLE = "SERVE_APP_API_KEY"
INTERRUPTED = 130


def embed(
    file: Annotated[Path, typer.Argument(help="JSON Lines (.jsonl), .parquet, or .txt, a text a line.")],
    out: Annotated[Path, typer.Option(help="What to write: .jsonl or .parquet.")],
    model: Annotated[str, typer.Option(help="Id or name, as GET /v1/models lists it.")],
    url: Annotated[str, typer.Option(help="Of the service.")] = "http://127.0.0.1:8000",
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"File that holds the API key. Default: the variable {KEY_VARIABLE}.")
    ] = None,
    field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    id_field: Annotated[str | None, typer.Option(help="One to repeat in the output, else the row's number.")] = None,
    chunk: Annotated[int, typer.Option(min=1, max=MOST_STRINGS, help="Texts in one request, at most.")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Requests at once.")] = 4,
    dimensions: Annotated[int | None, typer.Option(min=1, help="Of the vectors; else the model's own.")] = None,
    base64: Annotated[
        bool, typer.Option("--base64", help="In JSON Lines, float32 as base64: a third as long.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Write rows that cannot be embedded to OUT.rejected.jsonl, and go on.")
    ] = False,
    patience: Annotated[float, typer.Option(min=0, help="Seconds without any success before it gives up.")] = 600.0,
    restart: Annotated[bool, typer.Option("--restart", help="Forget an unfinished run, and replace OUT.")] = False,
    json: Json = False,
) -> None:
    """Embed a file through a running service. Interrupted in whatever way, the same command goes on.

    OUT appears when it is complete, in the order of the input; until then OUT.part and OUT.journal hold what is done.
    Within 24 hours of an interrupt nothing is billed twice. Exit code 0: done; 1: done, but rows were rejected; 2: it
    could not be done; 130: interrupted.
    """
    key = _api_key(api_key_file)
    job = Job(
        source=file,
        out=out,
        model=model,
        field=field,
        id_field=id_field,
        chunk=chunk,
        dimensions=dimensions,
        base64=base64,
        skip_bad=skip_bad,
        concurrency=concurrency,
        restart=restart,
    )
    try:
        with _bar() as tell:
            done = asyncio.run(run.embed(job, lambda id: Client(job, url, key, id, patience_s=patience), tell))
    except BulkError as error:
        raise Failed(str(error)) from None
    except KeyboardInterrupt:
        words = [word for word in sys.argv[1:] if word != "--restart"]
        say(f"Interrupted; what is done is kept. To go on: {shlex.join(['serve-app', *words])}")
        raise typer.Exit(INTERRUPTED) from None
    if json:
        show_json(_told(done))
    else:
        typer.echo(_line(job, done))
    raise typer.Exit(1 if done.totals.bad else 0)


def _told(done: Summary) -> dict[str, object]:
    """rows to replayed: of the whole file; what this run did is in `this_run`."""
    per_s = done.now.rows / done.seconds if done.seconds else 0.0
    now = {"chunks": done.now.chunks, "rows": done.now.rows, "seconds": round(done.seconds, 3)}
    return {
        **asdict(done.totals),
        "resumed_chunks": done.resumed,
        "model_fingerprint": done.fingerprint,
        "this_run": now | {"texts_per_s": round(per_s, 1)},
    }


def _line(job: Job, done: Summary) -> str:
    totals, now = done.totals, done.now
    replayed = f", {totals.replayed} of {totals.requests} requests replayed" if totals.replayed else ""
    rejected = f", {totals.bad:,} rejected to {job.rejected}" if totals.bad else ""
    pace = f"{now.rows:,} of them now, {now.rows / done.seconds if done.seconds else 0:,.0f} texts/s"
    return f"{job.out}: {totals.rows:,} rows, {totals.tokens:,} tokens{replayed}{rejected} ({pace})"


def _api_key(path: Path | None) -> str:
    """Raises Failed without a word of what was found."""
    try:
        key = os.environ.get(KEY_VARIABLE, "") if path is None else path.read_text().strip()
    except UnicodeDecodeError:
        key = ""
    if not key:
        raise Failed(f"There is no API key: put it into a file for --api-key-file, or into {KEY_VARIABLE}.")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise Failed("What is given as API key is none: it is one word.")
    return key


@contextmanager
def _bar() -> Iterator[run.Tell]:
    """On stderr, where that is a terminal."""
    console = Console(stderr=True)
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rows]:,} rows"))
    with Bar(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("embed", total=None, rows=0)

        def tell(it: Progress) -> None:
            bar.update(task, completed=it.position, total=it.total, rows=it.rows)

        yield tell

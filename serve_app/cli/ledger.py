"""`serve-app ledger`: what was used, whether the books agree, and what a sink's receiver refused."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ValidationError

from serve_app.cli import audit as auditing
from serve_app.cli import events
from serve_app.cli.terminal import Failed, First, Json, Last, StoreUrl, day_text, on_store, show_json, show_table
from serve_app.core import ledger
from serve_app.core.audit.report import Report
from serve_app.relay import Relay
from serve_app.sinks import SinkSettings, open_sink
from serve_app.stores import DEFAULT_URL, Store
from serve_app.stores.blobs import Blobs

SOURCE = "/serve-app"  # the usage application's default

SourceName = Annotated[str, typer.Option(help="CloudEvents source, as the usage application has it.")]
WorkspaceId = Annotated[str | None, typer.Option(help="Only this workspace.")]

app = typer.Typer(help="Usage events, their sums, and where they went.", no_args_is_help=True)


@app.command()
def audit(
    sink: Annotated[
        list[str] | None,
        typer.Option(help="NAME=jsonl:FOLDER compares its files, NAME alone only what it acknowledged. Repeatable."),
    ] = None,
    blobs: Annotated[Path | None, typer.Option(help="Folder of the large replies, to read what they say.")] = None,
    store: StoreUrl = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Compare replies, events and sinks. Exit code 0: they agree; 1: they do not; 2: it could not be done.

    Each kept reply has exactly one event, of the same workspace and as many tokens; each event of a key that is younger
    than 24 hours has its reply; no event is there twice or missing; usage sums and the sinks' counts and files are
    those of the events. The service may run meanwhile.
    """

    async def compare(books: Store) -> Report:
        sinks = dict(map(_audited, sink or []))
        kept = Blobs(_folder(blobs)) if blobs else None
        try:
            return await auditing.audit(books, sinks=sinks, blobs=kept, now_ms=_now_ms())
        except auditing.Unsettled as unsettled:
            raise Failed(str(unsettled)) from None

    report = on_store(store, compare)
    if json:
        show_json({"clean": report.clean, "report": report})
    else:
        _show(report)
    raise typer.Exit(0 if report.clean else 1)


@app.command()
def tail(
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")] = False,
    workspace: WorkspaceId = None,
    source: SourceName = SOURCE,
    store: StoreUrl = DEFAULT_URL,
    json: Json = False,
) -> None:
    """The newest events, oldest first. --json: a CloudEvent a line."""
    write = events.as_json(source) if json else events.as_text

    async def show(books: Store) -> None:
        async for recorded in events.newest(books, workspace, lines, follow=follow):
            typer.echo(write(recorded))

    try:
        on_store(store, show)
    except KeyboardInterrupt:
        return


@app.command()
def export(
    first: First = None,
    last: Last = None,
    workspace: WorkspaceId = None,
    format: Annotated[Literal["jsonl", "csv"], typer.Option(help="jsonl: a CloudEvent a line.")] = "jsonl",
    out: Annotated[Path | None, typer.Option(help="Appears when it is complete; else stdout.")] = None,
    source: SourceName = SOURCE,
    store: StoreUrl = DEFAULT_URL,
) -> None:
    """All events that are still in the ledger, shard by shard, in order; amounts are exact decimals."""
    days = (day_text(first, ledger.FIRST_DAY), day_text(last, ledger.LAST_DAY))

    async def write(books: Store) -> int:
        rows = events.between(books, workspace, *days)
        await events.export(rows, events.as_json(source) if format == "jsonl" else events.as_csv, format, out)
        return await events.trimmed(books, workspace)

    if trimmed := on_store(store, write):
        typer.echo(f"The {trimmed} oldest events are no more in the ledger; its usage sums count them.", err=True)


@app.command()
def usage(
    by: Annotated[str, typer.Option(help="Any of workspace, day, model, api_key.")] = "day,model,api_key",
    first: First = None,
    last: Last = None,
    workspace: WorkspaceId = None,
    store: StoreUrl = DEFAULT_URL,
    json: Json = False,
) -> None:
    """What was used, and what it costs: each row is rounded once, to a micro-dollar."""
    names = [name.strip() for name in by.split(",") if name.strip()]
    days = (day_text(first, ledger.FIRST_DAY), day_text(last, ledger.LAST_DAY))

    async def sums(books: Store) -> list[ledger.UsageLine]:
        if unknown := set(names) - {"workspace", "day", "model", "api_key"}:
            raise Failed(f"Usage is not kept by {', '.join(sorted(unknown))}.")
        return await books.usage(workspace, *days)

    lines = on_store(store, sums)
    rows, total = ledger.report(lines, names), ledger.total_micros(lines)
    if json:
        show_json({"rows": rows, "total_micros": total})
        return
    columns = [*names, "kind", "requests", "input_tokens", "reserved_gpu_hours", "amount_micros"]
    table = [
        [row.get(column, 0 if column in ("requests", "input_tokens") else "") for column in columns] for row in rows
    ]
    show_table(columns, table)
    typer.echo(f"total: {total} micro-dollars")


@app.command()
def dead(sink: str, store: StoreUrl = DEFAULT_URL, json: Json = False) -> None:
    """Events that a sink's receiver refused for good."""
    letters = on_store(store, lambda books: books.dead_letters(sink))
    if json:
        show_json(letters)
        return
    columns = ("shard", "sequence", "event", "workspace", "quantity", "reason")
    rows = [(it.shard, it.recorded.sequence, it.recorded.event) for it in letters]
    show_table(
        columns,
        [
            (shard, sequence, event.id, event.workspace, event.quantity, letter.reason)
            for (shard, sequence, event), letter in zip(rows, letters, strict=True)
        ],
    )


@app.command()
def retry(
    sink: str,
    url: Annotated[str, typer.Option(help="The sink's url, as the usage application has it.")],
    secret: Annotated[str | None, typer.Option(help="env:NAME of the variable that signs webhooks.")] = None,
    mode: Annotated[Literal["batch", "structured"], typer.Option(help="As the usage application has it.")] = "batch",
    allow_private: Annotated[bool, typer.Option("--allow-private", help="Allow a private address.")] = False,
    source: SourceName = SOURCE,
    store: StoreUrl = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Send a sink's dead letters again. Exit code 0: all were taken; 1: some were refused again."""

    async def send(books: Store) -> tuple[int, int]:
        if secret is not None and not (secret.startswith("env:") and os.environ.get(secret[4:])):
            raise Failed("--secret is env:NAME, and NAME is set: a secret in a command line can be seen by others.")
        fields = {"name": sink, "url": url, "secret": secret, "mode": mode, "allow_private": allow_private}
        try:
            settings = SinkSettings.model_validate(fields)
        except ValidationError as error:
            wrong = error.errors()[0]
            raise Failed(f"The sink's {'.'.join(map(str, wrong['loc']))} is not valid: {wrong['msg']}") from None
        receiver = open_sink(settings, source=source)
        try:
            taken = await Relay(books, {sink: receiver}, now_ms=_now_ms, sleep=asyncio.sleep).retry_dead(sink)
        finally:
            await receiver.close()
        return taken, len(await books.dead_letters(sink))

    taken, left = on_store(store, send)
    if json:
        show_json({"taken": taken, "left": left})
    else:
        typer.echo(f"{taken} taken, {left} left")
    raise typer.Exit(1 if left else 0)


def _audited(sink: str) -> tuple[str, Path | None]:
    name, _, url = sink.partition("=")
    if url.startswith("jsonl:"):
        return name, _folder(Path(url.removeprefix("jsonl:")))
    if name and (not url or url.startswith(("http://", "https://"))):
        return name, None
    raise Failed("A sink to audit is NAME, or NAME=jsonl:FOLDER.")


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise Failed(f"There is no folder {path}.")
    return path


def _show(report: Report) -> None:
    counts = {"replies": report.replies, "of them read": report.checked, "events": report.events}
    counts |= {"of them trimmed": report.trimmed, "quantity": report.quantity}
    counts |= report.faults
    show_table(("count", ""), list(counts.items()))
    if report.sinks:
        typer.echo()
        columns = ("sink", "acknowledged", "pending", "dead", "redelivered", "never offered")
        show_table(
            columns,
            [(it.name, it.acknowledged, it.pending, it.dead, it.redelivered, it.never_offered) for it in report.sinks],
        )
    typer.echo()
    for difference in report.differences:
        typer.echo(f"{difference.fault.value}: {difference.what}")
    total = sum(report.faults.values())
    if total > len(report.differences):
        typer.echo(f"... of {total} in all")
    typer.echo("verdict: no difference" if report.clean else f"verdict: {total} differences")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

"""What every command shares: its options, the store it works on, and how it says what it found or why it failed.

What a command raises is told in one place, `Commands.main`: one line on stderr and exit code 2, never a traceback.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import orjson
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from serve_app import stores
from serve_app.sinks import SinkDown, SinkUnfit
from serve_app.stores import Store, StoreDown, StoreUnfit

PIPED_COLUMNS = 200  # where there is no terminal to ask

StoreUrl = Annotated[
    str, typer.Option("--store", envvar="SERVE_APP_STORE", help="sqlite:PATH or redis://HOST:PORT/DB.")
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
First = Annotated[dt.datetime | None, typer.Option("--from", formats=["%Y-%m-%d"], help="UTC day, inclusive.")]
Last = Annotated[dt.datetime | None, typer.Option("--to", formats=["%Y-%m-%d"], help="UTC day, inclusive.")]

T = TypeVar("T")


class Failed(Exception):
    """It cannot be done. The message is one line, for a person."""


class Commands(TyperGroup):
    """All of `serve-app`."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Ends the process with the command's exit code, or with 2 and one line on stderr."""
        if not options.get("standalone_mode", True):
            return super().main(*args, **options)
        try:
            code = super().main(*args, **options | {"standalone_mode": False})
        except Exception as error:
            _tell(error)
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)


def _tell(error: Exception) -> None:
    """What typer raises is known by its looks: its classes have no public name in every version."""
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(str(error), err=True)
    elif hasattr(error, "format_message"):
        message, at = error.format_message(), getattr(error, "ctx", None)
        where = f" See {at.command_path} --help." if at is not None else ""
        say(f"{message if message.endswith(('.', '?')) else message + '.'}{where}")
    elif isinstance(error, typer.Abort):
        say("Nothing was done.")
    elif isinstance(error, Failed | StoreDown | StoreUnfit | SinkDown | SinkUnfit):
        say(str(error))
    elif isinstance(error, OSError):
        say(f"{error.filename or 'input or output'}: {error.strerror or type(error).__name__}")
    else:  # 1 would say that it was done; its message may hold what no terminal should
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} in {Path(at.filename).name}, line {at.lineno}"
        say(f"{where}: a mistake of this program, or the store holds what it did not write.")


def on_store(url: str, work: Callable[[Store], Awaitable[T]], *, create: bool = False) -> T:
    """Do it. create: make an embedded store that is not there. What it raises, `Commands.main` tells."""
    return asyncio.run(_on_store(url, work, create=create))


async def _on_store(url: str, work: Callable[[Store], Awaitable[T]], *, create: bool) -> T:
    if stores.is_local(url) and not create:
        from serve_app.stores import sqlite

        if not sqlite.path_of(url).is_file():
            raise Failed(f"There is no store at {sqlite.path_of(url)}. Name it with --store or SERVE_APP_STORE.")
    store = await stores.open_store(url)
    try:
        return await work(store)
    finally:
        await store.close()


def fail(message: str) -> NoReturn:
    say(message)
    raise typer.Exit(2)


def say(message: str) -> None:
    """An error, in one line on stderr."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)


def show_json(value: Any) -> None:
    typer.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Numbers to the right. Cells are taken as they are: a name is no markup."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPED_COLUMNS
    rows = list(rows)
    table = Table(box=None, pad_edge=False)
    for at, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[at], int) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    console.print(table)


def utc(time_ms: int | None) -> str | None:
    """2026-11-25 13:45:00Z."""
    if time_ms is None:
        return None
    return f"{dt.datetime.fromtimestamp(time_ms // 1000, tz=dt.UTC):%Y-%m-%d %H:%M:%SZ}"


def day_text(day: dt.datetime | None, default: str) -> str:
    return default if day is None else day.date().isoformat()

"""What every command shares: its options, the store it works on, and how it says what it found or why it failed."""

from __future__ import annotations

import asyncio
import datetime as dt
import traceback
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import orjson
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

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


def on_store(url: str, work: Callable[[Store], Awaitable[T]], *, create: bool = False) -> T:
    """Do it, or exit with 2 and one line on stderr. create: make an embedded store that is not there."""
    try:
        return asyncio.run(_on_store(url, work, create=create))
    except (Failed, StoreDown, StoreUnfit, SinkDown, SinkUnfit) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'input or output'}: {error.strerror or type(error).__name__}")
    except Exception as error:  # 1 would say that it was done; its message may hold what no terminal should
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} in {Path(at.filename).name}, line {at.lineno}"
        fail(f"{where}: a mistake of this program, or the store holds what it did not write.")


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
    typer.echo(" ".join(message.split()), err=True)
    raise typer.Exit(2)


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

"""`serve-app usage`: what was used and what it costs, for a person, a spreadsheet or a picture.

From the ledger's sums, which outlive the events. Amounts are exact decimals, so rows add up to the total to the last
digit; only GPU hours are rounded, to a millionth. `chart.py` draws; `ledger usage` rounds as an invoice does.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from serve_app.cli import chart as charts
from serve_app.cli.terminal import Failed, First, Json, Last, StoreUrl, day_text, on_store, show_json, show_table
from serve_app.cli.workspaces import find
from serve_app.core import ledger, pricing
from serve_app.core.ledger import Kind, UsageLine
from serve_app.stores import DEFAULT_URL, Store

FIELDS = {"workspace": "workspace", "day": "day", "model": "model", "key": "api_key"}  # what a line calls it
SUMS = ("requests", "input_tokens", "reserved_gpu_hours", "amount_usd")

app = typer.Typer(help="What was used, and what it costs.", no_args_is_help=True)


class Format(StrEnum):
    TABLE = "table"
    CSV = "csv"
    JSON = "json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Of some lines. amount_usd: exact."""

    requests: int
    input_tokens: int
    reserved_gpu_hours: Decimal
    amount_usd: Decimal

    def public(self) -> dict[str, Any]:
        """Decimals as text: a float would not have all of their digits."""
        amounts = {name: pricing.plain(getattr(self, name)) for name in SUMS[2:]}
        return {"requests": self.requests, "input_tokens": self.input_tokens, **amounts}


@app.callback()
def usage() -> None:
    """Keeps `report` a word of its own, though it is the only one."""


@app.command()
def report(
    workspace: Annotated[str | None, typer.Option(help="Only this one; else all, a row each.")] = None,
    first: First = None,
    last: Last = None,
    group_by: Annotated[str, typer.Option(help="Any of workspace, day, model, key; in this order.")] = "day,model,key",
    format: Annotated[Format, typer.Option(help="What goes to stdout.")] = Format.TABLE,
    chart: Annotated[
        Path | None, typer.Option(help="Picture of tokens and cost, a bar a day: .png, .svg, .pdf.")
    ] = None,
    store: StoreUrl = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Tokens, reserved GPU hours and US dollars, added up, and a row for the total. --json is --format json."""
    by, days = _names(group_by, all_workspaces=workspace is None), _days(first, last)
    if chart is not None:
        charts.check(chart)

    async def sums(books: Store) -> list[UsageLine]:
        lines = await books.usage(workspace, *days)
        if workspace is not None and not lines:
            await find(books, workspace)  # a misspelt one is no workspace that used nothing
        return lines

    lines = on_store(store, sums)
    rows = [
        dict(zip(by, group, strict=True)) | added(found).public()
        for group, found in ledger.grouped(lines, [FIELDS[name] for name in by]).items()
    ]
    total = added(lines).public()
    if json or format is Format.JSON:
        asked = {"workspace": workspace, "from": first and days[0], "to": last and days[1], "group_by": by}
        show_json({**asked, "rows": rows, "total": total})
    else:
        last_row = [{by[0]: "total"} | total] if by else []  # ungrouped, the one row is the total
        _show([*by, *SUMS], [*rows, *last_row], as_csv=format is Format.CSV)
    if chart is not None:
        charts.draw(lines, chart, title=workspace or "all workspaces")


def added(lines: Sequence[UsageLine]) -> Sums:
    """All of them."""
    tokens = [line for line in lines if line.kind is Kind.TOKENS]
    gpu_time = sum(line.quantity for line in lines if line.kind is Kind.GPU_TIME)
    return Sums(
        requests=sum(line.events for line in tokens),
        input_tokens=sum(line.quantity for line in tokens),
        reserved_gpu_hours=(Decimal(gpu_time) / Kind.GPU_TIME.per_price).quantize(Decimal("1e-6")),
        amount_usd=sum((line.amount for line in lines), Decimal(0)),
    )


def _names(text: str, *, all_workspaces: bool) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if unknown := [name for name in names if name not in FIELDS]:
        raise Failed(f"Usage is not kept by {', '.join(unknown)}, but by {', '.join(FIELDS)}.")
    return ["workspace", *names] if all_workspaces and "workspace" not in names else names


def _days(first: Any, last: Any) -> tuple[str, str]:
    days = day_text(first, ledger.FIRST_DAY), day_text(last, ledger.LAST_DAY)
    if days[0] > days[1]:
        raise Failed(f"--from {days[0]} is after --to {days[1]}.")
    return days


def _show(columns: Sequence[str], rows: Sequence[dict[str, Any]], *, as_csv: bool) -> None:
    cells = [[row.get(column, "") for column in columns] for row in rows]
    if not as_csv:
        show_table(columns, cells)
        return
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *cells])
    typer.echo(text.getvalue(), nl=False)

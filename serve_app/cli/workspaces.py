"""`serve-app workspace`: who pays."""

from __future__ import annotations

import secrets
import time
from dataclasses import asdict, replace
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

import typer

from serve_app.cli.terminal import Failed, Json, StoreUrl, on_store, show_json, show_table, utc
from serve_app.core.caps import PICOS_PER_MICRO
from serve_app.core.keys import Plan, Workspace
from serve_app.core.ledger import day_of, month_of
from serve_app.core.plans import Limits
from serve_app.stores import DEFAULT_URL, Store

MAX_NAME = 200
MOST_CAP_MICROS = 9 * 10**12  # a store counts in 64 bits

app = typer.Typer(help="Who pays: every key, reply and bill belongs to a workspace.", no_args_is_help=True)


@app.command()
def create(
    name: str,
    plan: Annotated[Plan, typer.Option(help="Decides its prices; Starter has no API keys.")] = Plan.PRO,
    monthly_cap_usd: Annotated[str | None, typer.Option(help="What it may spend in a calendar month, UTC.")] = None,
    store: StoreUrl = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Add a workspace, and print its id. Makes the store if it is not there."""
    cap_micros = None if monthly_cap_usd is None else _micros(monthly_cap_usd)

    async def add(books: Store) -> Workspace:
        workspace = Workspace(
            id=f"ws_{secrets.token_hex(8)}",
            name=checked(name),
            plan=plan,
            created_ms=_now_ms(),
            monthly_cap_micros=cap_micros,
        )
        await books.add_workspace(workspace)
        return workspace

    made = on_store(store, add, create=True)
    if json:
        show_json(made)
    else:
        typer.echo(made.id)


@app.command("list")
def list_(store: StoreUrl = DEFAULT_URL, json: Json = False) -> None:
    """All workspaces, oldest first."""
    found = on_store(store, lambda books: books.workspaces())
    if json:
        show_json(found)
    else:
        show_table(
            ("id", "plan", "created", "name"), [(it.id, it.plan.value, utc(it.created_ms), it.name) for it in found]
        )


@app.command()
def cap(
    workspace: str,
    usd: Annotated[str, typer.Argument(metavar="USD", help="US dollars a calendar month (UTC), or `none`.")],
    store: StoreUrl = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Set what a workspace may spend in a month, everywhere within five seconds; what reaches it is the last."""
    cap_micros = None if usd.lower() == "none" else _micros(usd)

    async def change(books: Store) -> Workspace:
        changed = replace(await find(books, workspace), monthly_cap_micros=cap_micros)
        await books.put_workspace(changed)
        return changed

    changed = on_store(store, change)
    if json:
        show_json(changed)
    else:
        typer.echo(f"{workspace} may spend {_dollars(cap_micros)} a month.", err=True)


@app.command()
def show(workspace: str, store: StoreUrl = DEFAULT_URL, json: Json = False) -> None:
    """One workspace: its plan, its keys, what it spent this month, and what it keeps for replays."""
    month = month_of(day_of(_now_ms()))

    async def look(books: Store) -> dict[str, Any]:
        found, now_ms = await find(books, workspace), _now_ms()
        keys, held = await books.keys(workspace), await books.holdings(workspace)
        limits = Limits().plans.get(found.plan)
        return asdict(found) | {
            "keys": len(keys),
            "valid_keys": sum(key.valid_at(now_ms) for key in keys),
            "requests_per_minute": limits and limits.requests_per_minute,
            "month": month,
            "spent_micros": await books.spent(workspace, month) // PICOS_PER_MICRO,
            "replays": held.records,
            "replay_bytes": held.bytes,
        }

    it = on_store(store, look)
    if json:
        show_json(it)
        return
    rate = it["requests_per_minute"]
    show_table(
        ("", ""),
        [
            ("id", it["id"]),
            ("name", it["name"]),
            ("created", utc(it["created_ms"])),
            ("plan", it["plan"]),
            ("rate", f"{rate:,} requests a minute for each key, by default" if rate else "no keys"),
            ("keys", f"{it['keys']}, of which {it['valid_keys']} valid"),
            ("cap", f"{_dollars(it['monthly_cap_micros'])} a month"),
            (f"spent in {month}", _dollars(it["spent_micros"])),
            ("kept for replays", f"{it['replays']:,} replies, {it['replay_bytes']:,} bytes"),
        ],
    )


def _micros(text: str) -> int:
    """US dollars, as whole micro-dollars."""
    try:
        micros = Decimal(text) * 1_000_000
    except InvalidOperation:
        raise Failed(f"{text!r} is no amount of US dollars.") from None
    if not micros.is_finite() or micros < 0 or micros != int(micros) or micros > MOST_CAP_MICROS:
        raise Failed(f"A cap is 0 to {MOST_CAP_MICROS // 1_000_000:,} US dollars, to the millionth.")
    return int(micros)


def _dollars(micros: int | None) -> str:
    return "anything" if micros is None else f"{Decimal(micros) / 1_000_000:,} US dollars"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


async def find(books: Store, workspace_id: str) -> Workspace:
    for workspace in await books.workspaces():
        if workspace.id == workspace_id:
            return workspace
    raise Failed(f"There is no workspace {workspace_id}: see serve-app workspace list.")


def checked(name: str) -> str:
    """A name that a line can show."""
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise Failed(f"A name is 1 to {MAX_NAME} printable characters.")
    return name

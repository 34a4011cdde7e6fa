"""`serve-app workspace`: who pays."""

from __future__ import annotations

import secrets
import time
from typing import Annotated

import typer

from serve_app.cli.terminal import Failed, Json, StoreUrl, on_store, show_json, show_table, utc
from serve_app.core.keys import Plan, Workspace
from serve_app.stores import DEFAULT_URL, Store

MAX_NAME = 200

app = typer.Typer(help="Who pays: every key, reply and bill belongs to a workspace.", no_args_is_help=True)


@app.command()
def create(
    name: str,
    plan: Annotated[Plan, typer.Option(help="Decides its prices; Starter has no API keys.")] = Plan.PRO,
    store: StoreUrl = DEFAULT_URL,
) -> None:
    """Add a workspace, and print its id. Makes the store if it is not there."""

    async def add(books: Store) -> Workspace:
        workspace = Workspace(
            id=f"ws_{secrets.token_hex(8)}", name=checked(name), plan=plan, created_ms=time.time_ns() // 1_000_000
        )
        await books.add_workspace(workspace)
        return workspace

    typer.echo(on_store(store, add, create=True).id)


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

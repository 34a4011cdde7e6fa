"""`serve-app key`: a key's text is shown once, where it is made; the store has only its digest."""

from __future__ import annotations

import secrets
import time
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from serve_app.cli.terminal import Failed, Json, StoreUrl, on_store, show_json, show_table, utc
from serve_app.cli.workspaces import checked, find
from serve_app.core import keys
from serve_app.core.keys import ApiKey
from serve_app.stores import DEFAULT_URL, Store

DAY_MS = 24 * 3600 * 1000

app = typer.Typer(help="API keys of a workspace.", no_args_is_help=True)


@app.command()
def create(
    workspace: str,
    name: Annotated[str, typer.Option(help="For people: what it is used for.")] = "default",
    expires_days: Annotated[float | None, typer.Option(min=0, help="Stops working after so many days.")] = None,
    store: StoreUrl = DEFAULT_URL,
) -> None:
    """Make a key and print its text, this once, alone on stdout; its id goes to stderr."""
    text, now_ms = keys.mint(secrets.token_bytes(keys.SECRET_BYTES)), _now_ms()
    key = ApiKey(
        id=f"key_{secrets.token_hex(8)}",
        workspace=workspace,
        name=name,
        digest=keys.digest(text),
        created_ms=now_ms,
        expires_ms=None if expires_days is None else now_ms + int(expires_days * DAY_MS),
    )

    async def add(books: Store) -> None:
        checked(name)
        plan = (await find(books, workspace)).plan
        if not plan.has_keys:
            raise Failed(f"Workspace {workspace} is on the {plan.value} plan, which has no API keys.")
        await books.put_key(key)

    on_store(store, add)
    typer.echo(f"{key.id}: keep the key now, it is not shown again.", err=True)
    typer.echo(text)


@app.command("list")
def list_(workspace: str, store: StoreUrl = DEFAULT_URL, json: Json = False) -> None:
    """A workspace's keys, oldest first, without their texts."""

    async def found(books: Store) -> list[ApiKey]:
        return await books.keys((await find(books, workspace)).id)

    rows, now_ms = on_store(store, found), _now_ms()
    if json:
        show_json([_public(key, now_ms) for key in rows])
    else:
        show_table(
            ("id", "state", "created", "expires", "revoked", "name"),
            [
                (it.id, state_of(it, now_ms), utc(it.created_ms), utc(it.expires_ms), utc(it.revoked_ms), it.name)
                for it in rows
            ],
        )


@app.command()
def revoke(key_id: str, store: StoreUrl = DEFAULT_URL) -> None:
    """Let a key work no more: everywhere within five seconds, and for good."""

    async def stop(books: Store) -> None:
        for workspace in await books.workspaces():
            for key in await books.keys(workspace.id):
                if key.id == key_id:
                    if key.revoked_ms is None:
                        await books.put_key(replace(key, revoked_ms=_now_ms()))
                    return
        raise Failed("There is no key with that id: see serve-app key list.")

    on_store(store, stop)
    typer.echo(f"{key_id} is revoked.", err=True)


def state_of(key: ApiKey, now_ms: int) -> str:
    if key.valid_at(now_ms):
        return "valid"
    return "expired" if key.revoked_ms is None else "revoked"


def _public(key: ApiKey, now_ms: int) -> dict[str, Any]:
    fields = asdict(key)
    del fields["digest"]
    return fields | {"state": state_of(key, now_ms)}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

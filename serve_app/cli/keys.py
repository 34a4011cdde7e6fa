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
from serve_app.core.errors import is_name
from serve_app.core.keys import ApiKey, Plan
from serve_app.core.plans import Limits
from serve_app.stores import DEFAULT_URL, Store

HOUR_MS = 3600 * 1000
DAY_MS = 24 * HOUR_MS

app = typer.Typer(help="API keys of a workspace.", no_args_is_help=True)


Name = Annotated[str, typer.Option(help="For people: what it is used for.")]
ExpiresDays = Annotated[float | None, typer.Option(min=0, help="Stops working after so many days.")]
Models = Annotated[
    list[str] | None, typer.Option("--model", help="The only model it may use; again for more. Default: all.")
]
Endpoints = Annotated[
    list[str] | None,
    typer.Option("--endpoint", help=f"The only endpoint it may call; again for more: {', '.join(keys.ENDPOINTS)}."),
]
PerMinute = Annotated[int | None, typer.Option(min=1, max=100_000_000, help="Of its own, instead of the plan's.")]


@app.command()
def create(
    workspace: str,
    name: Name = "default",
    model: Models = None,
    endpoint: Endpoints = None,
    requests_per_minute: PerMinute = None,
    tokens_per_minute: PerMinute = None,
    expires_days: ExpiresDays = None,
    store: StoreUrl = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Make a key and print its text, this once, alone on stdout; its id goes to stderr."""
    text, now_ms = _new_text(), _now_ms()
    key = ApiKey(
        id=_new_id(),
        workspace=workspace,
        name=checked(name),
        digest=keys.digest(text),
        created_ms=now_ms,
        expires_ms=None if expires_days is None else now_ms + int(expires_days * DAY_MS),
        models=_models(model),
        endpoints=_endpoints(endpoint),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
    )

    async def add(books: Store) -> Plan:
        plan = (await find(books, workspace)).plan
        if not plan.has_keys:
            raise Failed(f"Workspace {workspace} is on the {plan.value} plan, which has no API keys.")
        await books.put_key(key)
        return plan

    plan = on_store(store, add)
    ceiling = Limits().plans[plan].ceiling
    if requests_per_minute and ceiling and requests_per_minute > ceiling:
        note = (
            f"The {plan.value} plan's ceiling is {ceiling:,} requests a minute, unless your deployments.yaml says more."
        )
        typer.echo(note, err=True)
    _show_new(key, text, json=json)


@app.command("list")
def list_(workspace: str, store: StoreUrl = DEFAULT_URL, json: Json = False) -> None:
    """A workspace's keys, oldest first, without their texts."""

    async def found(books: Store) -> list[dict[str, Any]]:
        rows = await books.keys((await find(books, workspace)).id)
        used, now_ms = await books.last_used([key.id for key in rows]), _now_ms()
        return [_public(key, now_ms) | {"last_used_ms": used.get(key.id)} for key in rows]

    rows = on_store(store, found)
    if json:
        show_json(rows)
    else:
        times = ("created", "expires", "last_used", "revoked")
        show_table(
            ("id", "state", *times, "for", "name"),
            [
                (it["id"], it["state"], *(utc(it[f"{time}_ms"]) for time in times), _scope(it), it["name"])
                for it in rows
            ],
        )


@app.command()
def rotate(
    key_id: str,
    grace_hours: Annotated[float, typer.Option(min=0, help="How long the old key goes on working.")] = 24.0,
    store: StoreUrl = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Make a key that may do what this one may, and print its text; both work until the grace is over."""
    text, now_ms = _new_text(), _now_ms()

    async def replaced(books: Store) -> ApiKey:
        old = await _find_key(books, key_id)
        if not old.valid_at(now_ms):
            raise Failed(f"{key_id} is {state_of(old, now_ms)}: make a new key instead.")
        lifetime_ms = None if old.expires_ms is None else old.expires_ms - old.created_ms
        new = replace(
            old,
            id=_new_id(),
            digest=keys.digest(text),
            created_ms=now_ms,
            expires_ms=None if lifetime_ms is None else now_ms + lifetime_ms,
        )
        ends_ms = now_ms + int(grace_hours * HOUR_MS)
        await books.put_key(new)  # first: never is there a moment without a key that works
        await books.put_key(
            replace(old, expires_ms=ends_ms if old.expires_ms is None else min(old.expires_ms, ends_ms))
        )
        return new

    new = on_store(store, replaced)
    typer.echo(f"{key_id} works for {grace_hours:g} hours more.", err=True)
    _show_new(new, text, json=json)


@app.command()
def revoke(key_id: str, store: StoreUrl = DEFAULT_URL, json: Json = False) -> None:
    """Let a key work no more: everywhere within five seconds, and for good."""

    async def stop(books: Store) -> ApiKey:
        key = await _find_key(books, key_id)
        if key.revoked_ms is None:
            key = replace(key, revoked_ms=_now_ms())
            await books.put_key(key)
        return key

    key = on_store(store, stop)
    if json:
        show_json(_public(key, _now_ms()))
    else:
        typer.echo(f"{key_id} is revoked.", err=True)


async def _find_key(books: Store, key_id: str) -> ApiKey:
    for workspace in await books.workspaces():
        for key in await books.keys(workspace.id):
            if key.id == key_id:
                return key
    raise Failed("There is no key with that id: see serve-app key list.")


def _models(names: list[str] | None) -> tuple[str, ...] | None:
    if wrong := [name for name in names or () if not is_name(name)]:
        raise Failed(f"{wrong[0]!r} is no name of a model: give its id (bge-m3) or its canonical name (BAAI/bge-m3).")
    return tuple(names) if names else None


def _endpoints(paths: list[str] | None) -> tuple[str, ...] | None:
    if wrong := [path for path in paths or () if path not in keys.ENDPOINTS]:
        raise Failed(f"There is no endpoint {wrong[0]}. There are: {', '.join(keys.ENDPOINTS)}.")
    return tuple(paths) if paths else None


def _show_new(key: ApiKey, text: str, *, json: bool) -> None:
    if json:
        show_json(_public(key, key.created_ms) | {"key": text})
    else:
        typer.echo(f"{key.id}: keep the key now, it is not shown again.", err=True)
        typer.echo(text)


def _scope(row: dict[str, Any]) -> str:
    rates = [
        f"{row[f'{what}_per_minute']:,} {what}/min" for what in ("requests", "tokens") if row[f"{what}_per_minute"]
    ]
    return ", ".join((*(row["endpoints"] or ()), *(row["models"] or ()), *rates)) or "everything"


def _new_text() -> str:
    return keys.mint(secrets.token_bytes(keys.SECRET_BYTES))


def _new_id() -> str:
    return f"key_{secrets.token_hex(8)}"


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

"""The tables of the SQLite store. What a workspace holds is counted by triggers, so that no statement can forget to.

`SCHEMA` is the way from an empty file to the newest version, a step each: a file knows how many steps it has taken.
What was released is never changed; what is new is a step more.
"""

_FIRST = (
    """create table records (
        claim text primary key, workspace text not null, fingerprint text not null, op text not null,
        attempt text not null, attempts int not null, lease_ms int not null, expires_ms int not null,
        bytes int not null, tokens int not null, done int not null, body blob, blob text
    )""",
    "create index records_by_workspace on records (workspace, expires_ms)",
    "create index records_by_expiry on records (expires_ms)",
    "create table holdings (workspace text primary key, records int not null, bytes int not null) without rowid",
    """create trigger record_added after insert on records begin
        insert into holdings values (new.workspace, 1, new.bytes)
        on conflict do update set records = records + 1, bytes = bytes + excluded.bytes;
    end""",
    """create trigger record_changed after update of bytes on records begin
        update holdings set bytes = bytes + new.bytes - old.bytes where workspace = new.workspace;
    end""",
    """create trigger record_gone after delete on records begin
        update holdings set records = records - 1, bytes = bytes - old.bytes where workspace = old.workspace;
    end""",
    """create table events (
        shard int not null, sequence int not null, id text not null unique, body blob not null,
        primary key (shard, sequence)
    )""",
    """create table shards (
        shard int primary key, last int not null,
        trimmed int not null default 0, trimmed_events int not null default 0, trimmed_quantity int not null default 0
    ) without rowid""",
    """create table usage_days (
        workspace text, day text, kind text, model text, api_key text, tier text, unit_price text,
        events int not null, quantity int not null,
        primary key (workspace, day, kind, model, api_key, tier, unit_price)
    ) without rowid""",
    "create table workspaces (id text primary key, created_ms int not null, body blob not null) without rowid",
    """create table keys (
        digest text primary key, workspace text not null, created_ms int not null, body blob not null
    ) without rowid""",
    "create index keys_by_workspace on keys (workspace)",
    """create table cursors (
        sink text, shard int, sequence int not null, events int not null, quantity int not null,
        primary key (sink, shard)
    ) without rowid""",
    """create table dead_letters (
        sink text, shard int, sequence int, body blob not null, reason text not null,
        primary key (sink, shard, sequence)
    ) without rowid""",
    "create table reservations (id text primary key, settled int not null, body blob not null) without rowid",
)

_LIMITS = (
    # When a key's buckets are full again, in Unix microseconds. No row: they are full.
    "create table buckets (key text primary key, requests_us real not null, tokens_us real not null) without rowid",
    "create table key_uses (key text primary key, used_ms int not null) without rowid",
    # Pico-dollars as text: they may have more digits than an integer of SQLite.
    """create table spent (
        workspace text, month text, picos text not null, primary key (workspace, month)
    ) without rowid""",
    """create table notices (
        workspace text, month text, cap_micros int, at_picos int,
        primary key (workspace, month, cap_micros, at_picos)
    ) without rowid""",
    # A token's price is for a million of them, a GPU's for 3.6 million milliseconds: in floats, good to 1e-15 of it.
    """insert into spent
        select workspace, substr(day, 1, 7), printf('%.0f', sum(
            quantity * cast(unit_price as real) * case kind when 'gpu_time' then 1e6 / 3.6 else 1e6 end
        )) from usage_days group by 1, 2""",
)

SCHEMA: tuple[tuple[str, ...], ...] = (_FIRST, _LIMITS)

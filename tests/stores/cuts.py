"""A store's log, cut anywhere, as a crash or a full disk leaves it: what is there must be whole, and go on.

A short story is told to a store; then, for each cut, what it finds again is a beginning of that story, no shorter than
what was acknowledged before the cut, and a retry of everything ends with each bill once.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from serve_app.core.idempotency import Begin, Complete, Emit, Emitted, Proceed, Replay, Settled, State, Step
from serve_app.stores import Store, open_store
from tests.redis_server import RedisServer
from tests.stores import steps
from tests.stores.ledger import BrokenPromise, read_ledger, require

KEYED = 24
START_MS = 4_102_444_800_000  # the year 2100: nothing that a server dates by its own clock lapses during a test
WORKSPACES = ("ws-1", "ws-10", "ws-2")  # two of one shard, and one of another


class Log(Protocol):
    """A store, and the file that its writes are appended to."""

    name: str
    url: str

    def size(self) -> int: ...

    def set_aside(self) -> None:
        """As it is now, before the store is closed."""
        ...

    def cut(self, at: int) -> AbstractContextManager[str]:
        """The URL of a store that has no more of the log than that."""
        ...


@dataclass(slots=True)
class Story:
    """bills: in the order in which they were asked for, with the log's size once they were acknowledged."""

    begins: list[Begin] = field(default_factory=list)
    completes: list[Complete] = field(default_factory=list)
    emits: list[Emit] = field(default_factory=list)
    bills: list[tuple[str, int]] = field(default_factory=list)


def survive(log: Log, *, offsets: int, seed: int) -> int:
    """The log's size. Raises BrokenPromise, with the cut that shows it."""
    story = asyncio.run(_tell(log))
    size = story.bills[-1][1]
    for at in sorted(random.Random(seed).sample(range(size + 1), min(offsets, size + 1))):
        try:
            with log.cut(at) as url:
                asyncio.run(_look(url, story, at))
        except BrokenPromise as broken:
            raise BrokenPromise(f"{log.name}, cut at {at} of {size}: {broken}") from broken
    return size


async def _tell(log: Log) -> Story:
    story, store = Story(), await open_store(log.url, clock=lambda: START_MS)

    async def ask(*asked: Step) -> None:
        outcomes = await store.run(asked)
        assert not [it for it in outcomes if not isinstance(it, Proceed | Settled | Emitted)]
        bills = [it.event for it in asked if isinstance(it, Complete | Emit)]
        story.bills += [(event.id, log.size()) for event in bills if event is not None]

    for number in range(KEYED):
        workspace = WORKSPACES[number % len(WORKSPACES)]
        begin = steps.begin(f"claim-{number}", f"attempt-{number}", workspace)
        complete = steps.complete(begin.claim, begin.op, workspace, tokens=number + 1)
        emits = [steps.emit(f"request-{number}-{each}", workspace, number) for each in range(number % 3)]
        if number % 4:
            await ask(begin)
            await ask(complete, *emits)
        else:
            await ask(begin, complete, *emits)
        story.begins.append(begin)
        story.completes.append(complete)
        story.emits += emits
    log.set_aside()
    await store.close()
    return story


async def _look(url: str, story: Story, cut: int) -> None:
    store = await open_store(url, clock=lambda: START_MS + steps.LEASE_MS)
    try:
        await _is_a_beginning(store, story, cut)
        await _goes_on(store, story)
    finally:
        await store.close()


async def _is_a_beginning(store: Store, story: Story, cut: int) -> None:
    found = {event.id for event in await read_ledger(store)}
    acknowledged = sum(size <= cut for _, size in story.bills)
    require(len(found) >= acknowledged, "what was acknowledged before the cut is there")
    require(found == {id for id, _ in story.bills[: len(found)]}, "what is there is a beginning")
    keyed = {complete.op for complete in story.completes}
    done = {record.op async for record in store.records() if record.state is State.DONE}
    require(not done - found, "no record is done without its event")
    require(not found & keyed - done, "no keyed event is there without its record")


async def _goes_on(store: Store, story: Story) -> None:
    """Everybody tries again."""
    kept = {complete.op: complete.reply for complete in story.completes}
    billed = {event.id for event in await read_ledger(store)}
    again = [replace(begin, attempt=f"{begin.attempt}-again", op=f"{begin.op}-again") for begin in story.begins]
    late: list[Step] = []
    for begin, complete, outcome in zip(again, story.completes, await store.run(again), strict=True):
        if complete.op in billed:
            require(outcome == Replay(op=complete.op, reply=kept[complete.op]), "what is billed is replayed")
        else:
            assert complete.event is not None
            require(isinstance(outcome, Proceed), "what was lost is run again")
            assert isinstance(outcome, Proceed)
            event = replace(complete.event, id=outcome.op)
            late.append(replace(complete, claim=begin.claim, op=outcome.op, event=event))
    require(all(it == Settled() for it in await store.run(late)), "and settled")
    for emit, outcome in zip(story.emits, await store.run(story.emits), strict=True):
        require(outcome == Emitted(new=emit.event.id not in billed), "an event is written once")
    require(len(await read_ledger(store)) == len(story.bills), "in the end, all is billed once")


class SqliteLog:
    name = "SQLite"

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / "told" / "store.db"
        self.url = f"sqlite:{self._file}"

    def size(self) -> int:
        return _wal_of(self._file).stat().st_size

    def set_aside(self) -> None:
        """To close the store moves the log into the file."""
        assert self._file.stat().st_size <= 4096, "a checkpoint came between: tell a shorter story"
        self._kept = self._file.read_bytes(), _wal_of(self._file).read_bytes()

    @contextmanager
    def cut(self, at: int) -> Iterator[str]:
        file = self._folder / "cut" / "store.db"
        file.parent.mkdir()
        database, log = self._kept
        file.write_bytes(database)
        _wal_of(file).write_bytes(log[:at])
        yield f"sqlite:{file}"
        shutil.rmtree(file.parent)


class RedisLog:
    name = "Redis"

    def __init__(self, folder: Path) -> None:
        self._folder, self._server = folder, RedisServer(folder / "told")
        self._server.start()
        self.url = self._server.url

    def size(self) -> int:
        return _aof_in(self._folder / "told").stat().st_size

    def set_aside(self) -> None:
        self._server.kill()

    @contextmanager
    def cut(self, at: int) -> Iterator[str]:
        folder = self._folder / "cut"
        shutil.copytree(self._folder / "told", folder)
        with _aof_in(folder).open("r+b") as log:
            log.truncate(at)
        server = RedisServer(folder)
        try:
            server.start()
            yield server.url
        finally:
            server.kill()
        shutil.rmtree(folder)


def _wal_of(file: Path) -> Path:
    return file.with_name(f"{file.name}-wal")


def _aof_in(folder: Path) -> Path:
    (log,) = (folder / "appendonlydir").glob("*.incr.aof")
    return log


LOGS: dict[str, Callable[[Path], Log]] = {"sqlite": SqliteLog, "redis": RedisLog}

"""Bulk runs against the real HTTP side over real books: cut off at many points, and what is out and billed then.

Only the vectors are made up.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import orjson
import pyarrow as pa
import pytest
import uvicorn
from pyarrow import parquet

from serve_app.api import build_app
from serve_app.bulk import BulkError, Job, rows, run
from serve_app.bulk.client import Client
from serve_app.bulk.output import Output
from serve_app.bulk.run import Summary
from serve_app.core.catalog import SizeClass
from serve_app.core.ledger import SHARDS
from serve_app.dispatch import Unit, UnitReply
from serve_app.stores import open_store
from tests.cli.conftest import Run
from tests.service.fakes import (
    CARD,
    KEY,
    WORKSPACE,
    FakeModel,
    FakeModels,
    add_workspace,
    answers,
    bundled_tokenizer,
    card,
    made_up,
    service_over,
)

ROOT = Path(__file__).parents[2]
LONG_S = 45.0
Handler = Callable[[httpx2.Request], Awaitable[httpx2.Response]]


class World:
    """A service over books of its own, and what they say. Its app is called in-process, or served on a port."""

    def __init__(self, folder: Path, model: FakeModel | None = None) -> None:
        self.store_url = f"sqlite:{folder / 'store.db'}"
        self.folder = folder
        self.model = model or FakeModel()
        self.asked: list[tuple[str, int]] = []  # Idempotency-Key and number of texts of every request
        self.now = self.most = 0  # requests at once
        asyncio.run(self._account())

    async def _account(self) -> None:
        store = await open_store(self.store_url)
        await add_workspace(store, WORKSPACE, KEY)
        await store.close()

    async def embed(self, job: Job, before: Handler | None = None, **options: Any) -> Summary:
        """before: answers, or raises, instead of the service, unless it returns 299."""
        store = await open_store(self.store_url)
        service = service_over(FakeModels(self.model), store=store, blobs=self.folder / "blobs")
        app = httpx2.ASGITransport(build_app(service, max_body_bytes=4_000_000))

        async def handle(request: httpx2.Request) -> httpx2.Response:
            texts = orjson.loads(request.content)["input"]
            self.asked.append((request.headers["idempotency-key"], len(texts)))
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                if before is not None and (answer := await before(request)).status_code != 299:
                    return answer
                return await app.handle_async_request(request)
            finally:
                self.now -= 1

        def connect(id: str) -> Client:
            return Client(job, "http://test", KEY, id, transport=httpx2.MockTransport(handle), **usual | options)

        usual: dict[str, Any] = {"patience_s": 60.0}
        try:
            return await run.embed(job, connect)
        finally:
            await service.close()
            await store.close()

    def do(self, job: Job, before: Handler | None = None, **options: Any) -> Summary:
        return asyncio.run(self.embed(job, before, **options))

    def billed(self) -> list[tuple[int, int]]:
        """Texts and tokens of each event."""

        async def read() -> list[tuple[int, int]]:
            store = await open_store(self.store_url)
            found = [it.event for shard in range(SHARDS) for it in await store.events(shard, 0, 10_000)]
            await store.close()
            return [(int(event.details["inputs"]), event.quantity) for event in found]

        return asyncio.run(read())

    def check_bill(self, texts: list[str]) -> None:
        """Each text once."""
        billed = self.billed()
        assert sum(count for count, _ in billed) == len(texts)
        assert sum(tokens for _, tokens in billed) == tokens_of(texts)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def tokens_of(texts: list[str]) -> int:
    return int(sum(bundled_tokenizer()(texts).packed.lengths))


def texts_of(count: int, seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    return [f"text {n} says {' '.join(rng.choices(['red', 'green', 'blue'], k=3))}" for n in range(count)]


def jsonl(path: Path, texts: list[Any]) -> Path:
    path.write_bytes(b"".join(orjson.dumps({"id": f"row-{n}", "text": it}) + b"\n" for n, it in enumerate(texts)))
    return path


def job_of(tmp_path: Path, texts: list[Any], **options: Any) -> Job:
    usual: dict[str, Any] = {"out": tmp_path / "out.jsonl", "model": CARD.id, "id_field": "id", "chunk": 5}
    return Job(source=jsonl(tmp_path / "in.jsonl", texts), **usual | options)


def check_output(path: Path, texts: list[str]) -> None:
    """Each row once, in order, with its own text's vector."""
    found = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    assert [row["id"] for row in found] == [f"row-{n}" for n in range(len(texts))]
    vectors = np.array([row["embedding"] for row in found], np.float32)
    np.testing.assert_array_equal(vectors, made_up(bundled_tokenizer()(texts).packed))


async def through(_: httpx2.Request) -> httpx2.Response:
    return httpx2.Response(299)


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith("out")}


def test_a_file_of_texts_becomes_a_file_of_vectors(world: World, tmp_path: Path) -> None:
    texts = texts_of(23)
    done = world.do(job_of(tmp_path, texts))
    assert (done.totals.rows, done.totals.chunks, done.totals.replayed) == (23, 5, 0)
    assert (done.totals.tokens, done.fingerprint) == (tokens_of(texts), CARD.fingerprint)
    assert left_in(tmp_path) == {"out.jsonl"}
    check_output(tmp_path / "out.jsonl", texts)
    world.check_bill(texts)


def test_base64_and_fewer_dimensions(world: World, tmp_path: Path) -> None:
    world.do(job_of(tmp_path, ["a", "b"], base64=True, dimensions=128, id_field=None))
    found = [orjson.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert [row["index"] for row in found] == [0, 1]
    assert [len(base64.b64decode(row["embedding"])) for row in found] == [4 * 128] * 2


def test_parquet_in_and_out(world: World, tmp_path: Path) -> None:
    texts = texts_of(23)
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    parquet.write_table(pa.table({"n": pa.array(range(100, 123)), "body": texts}), source, row_group_size=7)
    job = Job(source=source, out=out, model=CARD.id, field="body", id_field="n", chunk=4)
    world.do(job)
    table = parquet.read_table(out)
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 384)
    assert table["id"].to_pylist() == list(range(100, 123))
    vectors = np.array(table["embedding"].to_pylist(), np.float32)
    np.testing.assert_array_equal(vectors, made_up(bundled_tokenizer()(texts).packed))
    assert left_in(tmp_path) == {"out.parquet"}
    world.check_bill(texts)


def test_lines_of_text(world: World, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("one\ntwo\r\nthree")
    world.do(Job(source=source, out=tmp_path / "out.jsonl", model=CARD.id))
    found = [orjson.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    expected = made_up(bundled_tokenizer()(["one", "two", "three"]).packed)
    np.testing.assert_array_equal(np.array([row["embedding"] for row in found], np.float32), expected)


class Cut(BaseException):
    """The end of the process, without any of its last words."""


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_after_a_cut_at_any_byte_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """What a kill may leave: any prefix of the journal, with the part file at least as long as it says, and rubbish."""
    world, texts, rng = World(tmp_path), texts_of(17), random.Random(7)
    job = job_of(tmp_path, texts, out=tmp_path / f"out.{suffix}", chunk=3)

    def cut(_: Output) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(Output, "publish", cut)
        with pytest.raises(Cut):
            world.do(job)
    part, journal = job.part.read_bytes(), job.journal.read_bytes()
    ends = [at + 1 for at, byte in enumerate(journal) if byte == ord("\n")]
    cuts = [*ends, *(end - 1 for end in ends), *rng.sample(range(ends[0], len(journal)), 6)]
    first = None
    for at in cuts:
        for path in (job.out, job.part, job.journal):
            path.unlink(missing_ok=True)
        whole = [orjson.loads(line) for line in journal[:at].split(b"\n")[:-1]]
        if not whole:
            continue  # nothing was sent yet
        end = max([line.get("end", 0) for line in whole])
        job.journal.write_bytes(journal[:at])
        job.part.write_bytes(part[: rng.randint(end, len(part))] + rng.randbytes(rng.randint(0, 99)))
        done = world.do(job)
        assert done.totals.rows == len(texts)
        assert done.resumed == sum("chunk" in line for line in whole)
        assert done.now.replayed == done.now.chunks  # nothing is computed again
        first = first or job.out.read_bytes()
        assert job.out.read_bytes() == first
        assert left_in(tmp_path) == {job.out.name}
    world.check_bill(texts)
    if suffix == "jsonl":
        check_output(job.out, texts)


def test_a_line_cut_short_does_not_spoil_the_next(world: World, tmp_path: Path) -> None:
    job = job_of(tmp_path, texts_of(20), concurrency=1)
    stop_after(world, job, 2)
    job.journal.write_bytes(job.journal.read_bytes()[:-9])
    stop_after(world, job, 2)
    assert world.do(job).resumed == 3
    check_output(job.out, texts_of(20))
    world.check_bill(texts_of(20))


def test_a_cut_between_the_name_and_the_end(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, texts = job_of(tmp_path, texts_of(8)), texts_of(8)
    publish = Output.publish

    def cut(output: Output) -> None:
        publish(output)
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(Output, "publish", cut)
        with pytest.raises(Cut):
            world.do(job)
    done = world.do(job)
    assert (done.totals.rows, done.now.rows) == (8, 0)
    assert left_in(tmp_path) == {"out.jsonl"}
    check_output(job.out, texts)
    world.check_bill(texts)


def test_replies_that_were_lost_are_billed_once(world: World, tmp_path: Path) -> None:
    """Each first answer is computed and billed, and then the process ends before it is written."""
    texts, kills = texts_of(20), 0
    job = job_of(tmp_path, texts, concurrency=1)
    for kills in range(1, 9):
        seen = 0

        async def lose(_: httpx2.Request, at: int = kills) -> httpx2.Response:
            nonlocal seen
            seen += 1
            if seen > 1 + at % 2:
                raise Cut
            return httpx2.Response(299)

        try:
            world.do(job, lose)
        except Cut:
            continue
        break
    assert kills > 2
    check_output(job.out, texts)
    world.check_bill(texts)


def test_a_run_is_bound_to_its_input_and_options(world: World, tmp_path: Path) -> None:
    texts = texts_of(20)
    job = job_of(tmp_path, texts, concurrency=1)
    stop_after(world, job, 2)
    with pytest.raises(BulkError, match=r"another --chunk \(5, now 6\).*--restart"):
        world.do(replace(job, chunk=6))
    with pytest.raises(BulkError, match="another --model"):
        world.do(replace(job, model="another"))
    original = job.source.read_bytes()
    job.source.write_bytes(original.replace(b"text 0", b"tExt 0"))
    with pytest.raises(BulkError, match="not what it was"):
        world.do(job)
    job.source.write_bytes(original + b"\n")
    with pytest.raises(BulkError, match="another input size"):
        world.do(job)
    assert world.do(replace(job, restart=True)).totals.rows == 20
    check_output(job.out, texts)
    with pytest.raises(BulkError, match="is there already"):
        world.do(job)


def stop_after(world: World, job: Job, requests: int) -> None:
    """The key is refused from then on."""
    seen = 0

    async def refuse(_: httpx2.Request) -> httpx2.Response:
        nonlocal seen
        seen += 1
        error = {"message": "No.", "code": "invalid_api_key"}
        return httpx2.Response(401, json={"error": error}) if seen > requests else httpx2.Response(299)

    with pytest.raises(BulkError, match=r"answered 401: No\."):
        world.do(job, refuse)


def test_a_first_try_that_did_nothing_binds_nobody(world: World, tmp_path: Path) -> None:
    job = job_of(tmp_path, texts_of(3))
    stop_after(world, job, 0)
    assert world.do(replace(job, chunk=2)).totals.chunks == 2


def test_vectors_of_two_models_are_not_mixed(world: World, tmp_path: Path) -> None:
    job = job_of(tmp_path, texts_of(20), concurrency=1)
    stop_after(world, job, 2)
    world.model = FakeModel(card(fingerprint="ba9876543210"))
    with pytest.raises(BulkError, match=r"has changed since this run began.*0123456789ab, now ba9876543210"):
        world.do(job)
    assert not job.out.exists()


def test_two_at_once_do_not_share_an_output(world: World, tmp_path: Path) -> None:
    job = job_of(tmp_path, texts_of(3))

    async def meanwhile(_: httpx2.Request) -> httpx2.Response:
        with pytest.raises(BulkError, match="Another process is writing"):
            await world.embed(job)
        return httpx2.Response(299)

    assert world.do(job, meanwhile).totals.rows == 3


def test_a_chunk_over_the_models_limit_goes_in_halves(tmp_path: Path) -> None:
    world = World(tmp_path, FakeModel(card(size_class=SizeClass.XL)))
    texts = ["word " * 3 for _ in range(600)]
    done = world.do(job_of(tmp_path, texts, chunk=600))
    assert [count for _, count in world.asked] == [600, 300, 150, 150, 300, 150, 150]
    assert len({key for key, _ in world.asked}) == 7
    assert (done.totals.chunks, done.totals.requests) == (1, 4)
    check_output(tmp_path / "out.jsonl", texts)
    world.check_bill(texts)


def test_halves_that_were_answered_are_replayed(tmp_path: Path) -> None:
    world = World(tmp_path, FakeModel(card(size_class=SizeClass.XL)))
    texts = texts_of(400)
    job = job_of(tmp_path, texts, chunk=400)
    stop_after(world, job, 2)
    done = world.do(job)
    assert (done.totals.requests, done.totals.replayed) == (2, 1)
    world.check_bill(texts)


def test_what_is_read_and_not_written_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer comes last of all that can come without it."""
    world, texts = World(tmp_path), texts_of(400)
    job = job_of(tmp_path, texts, concurrency=3)
    read = most = 0
    chunks = rows.Source.chunks

    def counted(source: rows.Source) -> Iterator[rows.Chunk]:
        nonlocal read
        for chunk in chunks(source):
            read += 1
            yield chunk

    async def slow_first(request: httpx2.Request) -> httpx2.Response:
        nonlocal most
        if b'"text 0 ' in request.content:
            others = len(world.asked)
            for _ in range(100_000):  # until all that can come without it has come
                others = len(world.asked)
                await asyncio.sleep(0.0001)
                if others == len(world.asked) == job.window and world.now == 1:
                    break
            most = read
        return httpx2.Response(299)

    monkeypatch.setattr(rows.Source, "chunks", counted)
    world.do(job, slow_first)
    assert most == job.window
    assert (read, world.most) == (80, 3)


def test_what_passes_is_tried_again_when_the_service_says(world: World, tmp_path: Path) -> None:
    waits: list[float] = []
    trouble: list[httpx2.Response | Exception] = [
        httpx2.Response(429, headers={"Retry-After": "7"}),
        httpx2.Response(503, headers={"Retry-After": "2", "retry-after-ms": "1500"}),
        httpx2.Response(409, json={"error": {"code": "idempotency_in_progress"}}, headers={"Retry-After": "3"}),
        httpx2.Response(500),
        httpx2.ConnectError("refused"),
    ]

    async def fail_first(_: httpx2.Request) -> httpx2.Response:
        if not trouble:
            return httpx2.Response(299)
        it = trouble.pop(0)
        if isinstance(it, Exception):
            raise it
        return it

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    texts = ["a", "b"]
    world.do(job_of(tmp_path, texts), fail_first, sleep=sleep)
    assert [round(it) for it in waits[:1]] == [7]
    assert 1.5 <= waits[1] <= 1.6
    assert 3 <= waits[2] <= 3.1
    assert 2 <= waits[3] <= 4 <= waits[4] <= 8
    assert len({key for key, _ in world.asked}) == 1
    world.check_bill(texts)


def test_patience_ends(world: World, tmp_path: Path) -> None:
    now_s = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    async def busy(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(503, json={"error": {"message": "Busy."}}, headers={"Retry-After": "10"})

    job = job_of(tmp_path, ["a"])
    with pytest.raises(BulkError, match=r"Nothing succeeded for 60 s; last, 503: Busy\."):
        world.do(job, busy, sleep=sleep, now_s=lambda: now_s)
    assert 45 <= now_s <= 60
    assert world.do(job).totals.rows == 1


def test_a_conflict_is_not_tried_again(world: World, tmp_path: Path) -> None:
    async def conflict(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(409, json={"error": {"code": "idempotency_conflict", "message": "Other."}})

    with pytest.raises(BulkError, match=r"409: Other\."):
        world.do(job_of(tmp_path, ["a"]), conflict)
    assert len(world.asked) == 1


BAD = [
    (b"{", "no valid JSON"),
    (b"[1]", "no JSON object"),
    (b'{"id": "x"}', "has no field 'text'"),
    (b'{"id": "x", "text": 5}', "its 'text' is no string"),
    (b'{"id": "x", "text": ""}', "its 'text' is empty"),
    (b'{"id": "x", "text": "a\\u0000b"}', "its 'text' holds a NUL character"),
    (b'{"id": "x", "text": "\\ud800"}', "no valid JSON"),
    (b'{"id": 1.5, "text": "a"}', "its 'id' is neither a string nor an integer"),
    (b'{"text": "a"}', "its 'id' is neither a string nor an integer"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_row_is_named(world: World, tmp_path: Path, line: bytes, reason: str) -> None:
    job = job_of(tmp_path, ["a"])
    with job.source.open("ab") as file:
        file.write(b"\n" + line + b"\n")
    with pytest.raises(BulkError, match=rf"in\.jsonl, line 3: {reason}"):
        world.do(job)


def test_bad_rows_are_put_aside_once(world: World, tmp_path: Path) -> None:
    """Also when the run is cut off in between."""
    good = [orjson.dumps({"id": f"row-{n}", "text": it}) for n, it in enumerate(texts_of(len(BAD)))]
    lines = [line for (bad, _), it in zip(BAD, good, strict=True) for line in (bad, it)]
    job = job_of(tmp_path, [], skip_bad=True, concurrency=1, chunk=4)
    job.source.write_bytes(b"\n".join(lines))
    stop_after(world, job, 3)
    done = world.do(job)
    assert (done.totals.rows, done.totals.bad, done.resumed) == (9, 9, 3)
    check_output(job.out, texts_of(len(BAD)))
    rejected = [orjson.loads(line) for line in job.rejected.read_bytes().splitlines()]
    assert [(it["line"], it["reason"], it["row"]) for it in rejected] == [
        (2 * n + 1, reason, line.decode()) for n, (line, reason) in enumerate(BAD)
    ]


def test_a_line_beyond_any_request_is_bad(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE", 100)
    job = job_of(tmp_path, ["a", "b" * 5000, "c"], skip_bad=True)
    done = world.do(job)
    assert (done.totals.rows, done.totals.bad) == (2, 1)


def test_chunks_are_bounded_in_bytes(tmp_path: Path) -> None:
    job = job_of(tmp_path, ["x" * 40_000] * 7, chunk=100)
    assert [len(chunk.rows) for chunk in rows.Source(job).chunks()] == [2, 2, 2, 1]


# As a command, on a port, and killed.


@contextlib.contextmanager
def listening(world: World) -> Iterator[str]:
    """The service's URL."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        ready, stop = threading.Event(), threading.Event()

        async def serve() -> None:
            store = await open_store(world.store_url)
            service = service_over(FakeModels(world.model), store=store, blobs=world.folder / "blobs")
            app = build_app(service, max_body_bytes=4_000_000)
            config = uvicorn.Config(app, lifespan="off", ws="none", http="h11", loop="asyncio", log_config=None)
            server = uvicorn.Server(config)
            served = asyncio.create_task(server.serve([held]))
            ready.set()
            await asyncio.to_thread(stop.wait)
            server.should_exit = True
            await served
            await service.close()
            await store.close()

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        try:
            assert ready.wait(LONG_S)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop.set()
            thread.join(LONG_S)


@pytest.mark.timeout(240)
def test_killed_three_times_it_is_complete_and_billed_once(tmp_path: Path) -> None:
    async def slowly(unit: Unit) -> UnitReply:
        await asyncio.sleep(0.02)
        return await answers(unit)

    world, texts, rng = World(tmp_path, FakeModel(send=slowly)), texts_of(300), random.Random(3)
    source, out, key = jsonl(tmp_path / "in.jsonl", texts), tmp_path / "out.jsonl", tmp_path / "key"
    key.write_text(KEY)
    with listening(world) as url:
        words = ["embed", source, "--out", out, "--model", CARD.id, "--url", url, "--api-key-file", key]
        words += ["--id-field", "id", "--chunk", "5", "--concurrency", "3", "--json"]
        command = [sys.executable, "-m", "serve_app.cli", *map(str, words)]
        for kill in range(3):
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            with process:
                wanted, until_s = 15 * kill + rng.randint(2, 12), time.monotonic() + LONG_S
                while done_chunks(out) < wanted and process.poll() is None and time.monotonic() < until_s:
                    time.sleep(0.002)
                process.send_signal(signal.SIGKILL)
            assert process.returncode == -signal.SIGKILL
            assert not out.exists()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=120)
    told = orjson.loads(done.stdout)
    assert (told["rows"], told["chunks"], told["tokens"]) == (300, 60, tokens_of(texts))
    assert told["resumed_chunks"] > 0
    check_output(out, texts)
    world.check_bill(texts)


def done_chunks(out: Path) -> int:
    try:
        return out.with_name(f"{out.name}.journal").read_bytes().count(b"\n") - 1
    except FileNotFoundError:
        return 0


def test_the_command_tells_what_is_wrong_in_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERVE_APP_API_KEY", raising=False)
    source = jsonl(tmp_path / "in.jsonl", ["a"])
    words = ["embed", source, "--out", tmp_path / "out.jsonl", "--model", "m"]
    cases: list[tuple[list[Any], str]] = [
        ([*words], "There is no API key"),
        ([*words, "--api-key-file", source.with_name("none")], "No such file"),
    ]
    key = tmp_path / "key"
    key.write_text(KEY)
    words += ["--api-key-file", key]
    cases += [
        ([*words, "--url", "ftp://x"], "--url is"),
        ([*words, "--out", tmp_path / "out.csv"], "neither .jsonl nor .parquet"),
        ([*words, "--out", tmp_path / "out.parquet", "--base64"], "--base64 is for JSON Lines"),
        (["embed", shutil.copy(source, tmp_path / "in.csv"), *words[2:]], "neither .jsonl, .parquet nor .txt"),
        (["embed", tmp_path / "none.jsonl", *words[2:]], "No such file"),
        (["embed", shutil.copy(source, tmp_path / "in.parquet"), *words[2:]], "is no Parquet file"),
    ]
    for case, expected in cases:
        result = run(*case)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), case
        assert expected in result.stderr
        assert KEY not in result.stderr


def test_parquet_without_its_extra_is_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    key = tmp_path / "key"
    key.write_text(KEY)
    source = jsonl(tmp_path / "in.jsonl", ["a"])
    result = run("embed", source, "--out", tmp_path / "out.parquet", "--model", "m", "--api-key-file", key)
    assert (result.exit_code, "pip install 'serve-app[bulk]'" in result.stderr) == (2, True)

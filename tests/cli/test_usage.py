from __future__ import annotations

import asyncio
import csv
import datetime as dt
import io
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest
from matplotlib.image import imread

from serve_app.cli import chart
from serve_app.core.idempotency import Emit
from serve_app.core.keys import Plan, Workspace
from serve_app.core.ledger import Kind, UsageEvent, UsageLine
from serve_app.stores import open_store
from tests.cli.books import NEW, OLD, event
from tests.cli.conftest import Run

DAY_MS = 24 * 3600 * 1000
IDLE = Workspace(id="ws_idle", name="Idle", plan=Plan.PRO, created_ms=0)


def events() -> Iterator[UsageEvent]:
    """Two workspaces, three days, two models, and a third of a dollar for a GPU."""
    for who in (OLD, NEW):
        for day in (0, 1, 3):
            yield event(f"{who}-{day}-m3", who, 1_000_003, day * DAY_MS)
            yield event(f"{who}-{day}-small", who, 7, day * DAY_MS, model="BAAI/small", unit_price="0.000000001")
    yield event("hour", NEW, 1_200_000, DAY_MS, kind=Kind.GPU_TIME, unit_price="1", api_key="")


@pytest.fixture
def used(url: str) -> str:
    async def write() -> None:
        store = await open_store(url)
        await store.add_workspace(IDLE)
        await store.run([Emit(event=it) for it in events()])
        await store.close()

    asyncio.run(write())
    return url


def told(run: Run, url: str, *words: object) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(run("usage", "report", "--json", "--store", url, *words).stdout)
    return found


def test_rows_add_up_to_the_total_to_the_last_digit(run: Run, used: str) -> None:
    report = told(run, used)
    assert report["group_by"] == ["workspace", "day", "model", "key"]
    assert len(report["rows"]) == 13
    assert sum(Decimal(row["amount_usd"]) for row in report["rows"]) == Decimal(report["total"]["amount_usd"])
    assert Decimal(report["total"]["amount_usd"]) == sum(it.amount for it in events())
    assert report["total"]["amount_usd"] == "0.387333495333375"
    assert (report["total"]["requests"], report["total"]["input_tokens"]) == (12, 6 * 1_000_010)
    assert report["total"]["reserved_gpu_hours"] == "0.333333"


def test_amounts_have_more_digits_than_a_float(run: Run, url: str) -> None:
    async def write() -> None:
        store = await open_store(url)
        await store.run([Emit(event=event("large", NEW, 10**12 + 1, 0, unit_price="0.900000001"))])
        await store.close()

    asyncio.run(write())
    assert told(run, url)["total"]["amount_usd"] == "900000.001000900000001"


def test_a_workspace_alone_by_model(run: Run, used: str) -> None:
    report = told(run, used, "--workspace", NEW, "--group-by", "model")
    assert [(row["model"], row["requests"], row["input_tokens"]) for row in report["rows"]] == [
        ("BAAI/bge-m3", 3, 3_000_009),
        ("BAAI/small", 3, 21),
    ]
    assert [row["reserved_gpu_hours"] for row in report["rows"]] == ["0.333333", "0"]


def test_the_key_of_a_row_is_its_id(run: Run, used: str) -> None:
    report = told(run, used, "--workspace", NEW, "--group-by", "key")
    assert [row["key"] for row in report["rows"]] == ["", "key_1"]  # a reserved GPU is used by no key


def test_days_are_inclusive(run: Run, used: str) -> None:
    report = told(run, used, "--from", "1970-01-02", "--to", "1970-01-04", "--group-by", "day", "--workspace", OLD)
    assert [row["day"] for row in report["rows"]] == ["1970-01-02", "1970-01-04"]
    assert (report["from"], report["to"]) == ("1970-01-02", "1970-01-04")


def test_csv_has_the_same_digits_and_a_total(run: Run, used: str) -> None:
    result = run("usage", "report", "--format", "csv", "--store", used)
    *rows, total = list(csv.DictReader(io.StringIO(result.stdout)))
    assert total["workspace"] == "total"
    assert [row["amount_usd"] for row in rows] == [row["amount_usd"] for row in told(run, used)["rows"]]
    assert sum(Decimal(row["amount_usd"]) for row in rows) == Decimal(total["amount_usd"])


def test_a_table_ends_with_the_total(run: Run, used: str) -> None:
    lines = run("usage", "report", "--group-by", "model", "--workspace", OLD, "--store", used).stdout.splitlines()
    assert lines[0].split() == ["model", "requests", "input_tokens", "reserved_gpu_hours", "amount_usd"]
    assert lines[-1].split() == ["total", "6", "3000030", "0", "0.027000081000021"]
    ungrouped = run("usage", "report", "--group-by", "", "--workspace", OLD, "--store", used).stdout.splitlines()
    assert [line.split() for line in ungrouped[1:]] == [lines[-1].split()[1:]]


def test_a_workspace_that_used_nothing_is_told_from_one_that_is_not(run: Run, used: str) -> None:
    assert told(run, used, "--workspace", IDLE.id)["total"]["amount_usd"] == "0"
    result = run("usage", "report", "--workspace", "ws_typo", "--store", used)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("suffix", chart.SUFFIXES)
def test_a_chart_is_a_picture(run: Run, used: str, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "charts" / f"usage{suffix}"
    path.parent.mkdir()
    assert run("usage", "report", "--chart", path, "--store", used).exit_code == 0
    assert [it.name for it in path.parent.iterdir()] == [path.name]
    content = path.read_bytes()
    assert content.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])
    if suffix == ".png":
        pixels = imread(path)[:, :, :3].reshape(-1, 3)
        assert len({tuple(pixel) for pixel in pixels[::7]}) > 2  # not blank


def line(day: str, model: str, quantity: int, kind: Kind = Kind.TOKENS) -> UsageLine:
    return UsageLine(
        workspace=NEW,
        day=day,
        kind=kind,
        model=model,
        api_key="",
        tier="flex",
        unit_price="1",
        events=1,
        quantity=quantity,
    )


def test_bars_stand_on_every_day_and_models_beyond_the_ninth_share_one() -> None:
    lines = [line("2026-01-30", f"m{at}", 100 - at) for at in range(12)] + [line("2026-02-01", "m11", 5)]
    days, models = chart.days_of(lines), chart.models_of(lines)
    assert days == [dt.date(2026, 1, 30), dt.date(2026, 1, 31), dt.date(2026, 2, 1)]
    assert models == ["m0", "m1", "m2", "m3", "m4", "m5", "m11", "m6", "m7", chart.OTHERS]
    heights = chart.stacks(lines, days, models, lambda it: Decimal(it.quantity))
    assert heights["m11"] == [89.0, 0.0, 5.0]
    assert heights[chart.OTHERS] == [92.0 + 91.0 + 90.0, 0.0, 0.0]


def test_a_chart_of_nothing_says_so(run: Run, used: str, tmp_path: Path) -> None:
    path = tmp_path / "usage.svg"
    assert run("usage", "report", "--to", "1969-01-01", "--chart", path, "--store", used).exit_code == 0
    assert "nothing was used" in path.read_text()


def test_a_chart_without_matplotlib_is_refused_before_anything_is_read(
    run: Run, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("usage", "report", "--chart", tmp_path / "usage.png", "--store", sqlite_url)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "pip install 'serve-app[chart]'" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--group-by", "colour"), "not kept by colour"),
        (("--from", "2026-02-01", "--to", "2026-01-01"), "is after"),
        (("--from", "yesterday"), "yesterday"),
        (("--chart", "usage.gif"), ".png"),
        (("--chart", "no-such-folder/usage.png"), "no folder"),
        (("--format", "xml"), "xml"),
    ],
)
def test_what_cannot_be_told_is_one_line(run: Run, used: str, words: tuple[str, ...], said: str) -> None:
    result = run("usage", "report", *words, "--store", used)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert said in result.stderr

"""Three times as much as fits: what is still answered, whether refusals say true, and what was billed.

Each round measures the most that is answered (a closed loop), and then requests arrive so many times as often (an open
loop), each with an Idempotency-Key, whatever they are told; who is refused does not come again. It counts what is
answered once the queue is full. Then nobody comes any more, and the last refusals' `Retry-After` are held against how
long it really took until all that waited was answered. The ledger must hold the tokens of the answers, no more and no
fewer.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import orjson
import yaml

from benchmark import BenchError, machine
from benchmark.bills import billed
from benchmark.client import Answer, Client, Route, percentile_ms
from benchmark.report import spread, table
from benchmark.server import UNLIMITED, serving, settings
from benchmark.workloads import Workload, passages, short_queries

MODEL = "all-MiniLM-L6-v2"
FILLED = 2.0  # times what the queue's tokens take: then even what came first, and took turns with the rest, is answered
LAST_S = 1.0  # before the end: the refusals that are held against it
POOL = 512  # different requests; then they come again


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """texts: a request. queue_tokens: what may wait, by default. in_flight: that fill the service."""

    name: str
    workload: Workload
    texts: int
    in_flight: int
    queue_tokens: int


def loads(seed: int) -> list[Load]:
    return [
        Load(name="16 passages a request", workload=passages(seed), texts=16, in_flight=8, queue_tokens=30_000),
        Load(
            name="one short query a request", workload=short_queries(seed), texts=1, in_flight=64, queue_tokens=10_000
        ),
    ]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/bench overload", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="of both phases; medians are printed (default: 3)")
    add("--seconds", type=float, default=30.0, help="of each phase, besides what fills the queue (default: 30)")
    add("--times", type=float, default=3.0, help="of what is answered at most, arrive (default: 3)")
    add("--seed", type=int, default=1, help="of the texts and the arrivals (default: 1)")
    add("--json", type=Path, metavar="FILE", help="write the figures of every round there")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds <= 0 or options.times <= 0:
        parser.error("--rounds, --seconds and --times must be positive")
    return options


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """On the performance counter; told_s: `Retry-After`, to the millisecond if it says so. tokens: of a 200."""

    sent_s: float
    answered_s: float
    status: int
    told_s: float | None
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """good_*_per_s: tokens answered with a 200. told_s, true_s: of each refusal that was followed by an answer."""

    load: str
    most_per_s: float
    offered_per_s: float  # requests
    good_per_s: float
    p50_ms: float
    p99_ms: float
    statuses: dict[int, int]
    told_s: list[float] = field(repr=False)
    true_s: list[float] = field(repr=False)


def measure(options: argparse.Namespace, root: Path) -> None:
    print(f"machine  {machine.description()}\nserver   serve run, ", end="")
    print(" ".join(f"{name}={value}" for name, value in settings().items()), end="\n\n", flush=True)
    rounds, books = list[Round](), list[str]()
    for load in loads(options.seed):
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            folder = Path(name)
            print(f"{load.name}: starting the server", file=sys.stderr)
            with serving(_config(root, folder, load.queue_tokens), root, folder) as server:
                route = Route.parse(server.url, model=MODEL, format="base64", api_key=server.api_key)
                done = asyncio.run(_Overload(options, load, route).rounds())
            rounds += done.rounds
            books.append(_compared(load, done.calls, *asyncio.run(billed(f"sqlite:{folder}/data/serve-app.db"))))
    print(_report(rounds, options, books))
    if options.json:
        raw = [asdict(it) for it in rounds]
        options.json.write_bytes(orjson.dumps(raw, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS))


def _config(root: Path, folder: Path, queue_tokens: int) -> Path:
    """With a queue that is full within seconds: the usual one holds minutes of this machine's work."""
    config = yaml.safe_load((root / "deployments.yaml").read_text())
    for application in config["applications"]:
        if application["name"] == "ingress":
            application["args"] |= {"max_pending_tokens": queue_tokens, "max_workspace_tokens": queue_tokens}
            application["deployments"] = [{"name": "ingress", "user_config": {"limits": UNLIMITED}}]
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    rounds: list[Round]
    calls: list[Call]


class _Overload:
    def __init__(self, options: argparse.Namespace, load: Load, route: Route) -> None:
        self._options = options
        self._load = load
        self._route = route
        self._texts = itertools.cycle([load.workload.take(load.texts) for _ in range(POOL)])
        self._calls: list[Call] = []

    async def rounds(self) -> Done:
        client, rounds = Client(self._route), []
        try:
            await self._closed(client, 3.0)
            for number in range(self._options.rounds):
                at = f"{self._load.name}: round {number + 1}/{self._options.rounds}"
                print(f"{at}, the most", file=sys.stderr)
                most = await self._closed(client, self._options.seconds)
                begun_s = min(call.sent_s for call in most)
                per_s = len(most) / (max(call.answered_s for call in most) - begun_s)
                tokens_each = sum(call.tokens for call in most) / len(most)
                print(f"{at}, {self._options.times * per_s:,.1f} requests a second", file=sys.stderr)
                fill_s = FILLED * self._load.queue_tokens / (per_s * tokens_each)
                over = await self._open(client, self._options.times * per_s, fill_s + self._options.seconds, number)
                rounds.append(self._round(over, fill_s, per_s * tokens_each))
        finally:
            client.close()
        return Done(rounds=rounds, calls=self._calls)

    async def _closed(self, client: Client, seconds: float) -> list[Call]:
        until_s, calls = time.perf_counter() + seconds, []

        async def caller() -> None:
            while time.perf_counter() < until_s:
                calls.append(await self._call(client, self._request(), time.perf_counter()))

        await asyncio.gather(*(caller() for _ in range(self._load.in_flight)))
        if refused := [call.status for call in calls if call.status != 200]:
            raise BenchError(f"{len(refused)} of {len(calls)} were refused though few were in flight: {refused[0]}")
        return calls

    async def _open(self, client: Client, per_s: float, seconds: float, number: int) -> list[Call]:
        chance, requests = random.Random(f"{self._options.seed}-{number}"), self._made()
        tasks, begun_s = list[asyncio.Task[Call]](), time.perf_counter()
        due_s = begun_s + chance.expovariate(per_s)
        while due_s < begun_s + seconds:
            await asyncio.sleep(due_s - time.perf_counter())
            tasks.append(asyncio.create_task(self._call(client, next(requests), due_s)))
            due_s += chance.expovariate(per_s)
        return await asyncio.gather(*tasks)

    def _made(self) -> Iterator[bytes]:
        while True:
            yield self._request()

    def _request(self) -> bytes:
        return self._route.request(next(self._texts), idempotency_key=uuid.uuid4().hex)

    async def _call(self, client: Client, request: bytes, due_s: float) -> Call:
        answer = await client.ask(request)
        call = Call(
            sent_s=due_s,
            answered_s=time.perf_counter(),
            status=answer.status,
            told_s=_told_s(answer),
            tokens=orjson.loads(answer.body)["usage"]["prompt_tokens"] if answer.status == 200 else 0,
        )
        self._calls.append(call)
        return call

    def _round(self, calls: Sequence[Call], fill_s: float, most_per_s: float) -> Round:
        from_s = min(call.sent_s for call in calls) + fill_s
        until_s = from_s + self._options.seconds
        good = [call for call in calls if call.status == 200]
        latencies_s = [call.answered_s - call.sent_s for call in good if call.sent_s >= from_s]
        told_s, true_s = _honesty(calls, until_s)
        return Round(
            load=self._load.name,
            most_per_s=most_per_s,
            offered_per_s=sum(call.sent_s >= from_s for call in calls) / self._options.seconds,
            good_per_s=sum(it.tokens for it in good if from_s <= it.answered_s < until_s) / self._options.seconds,
            p50_ms=percentile_ms(latencies_s, 50),
            p99_ms=percentile_ms(latencies_s, 99),
            statuses=dict(Counter(call.status for call in calls)),
            told_s=told_s,
            true_s=true_s,
        )


def _told_s(answer: Answer) -> float | None:
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        if (value := answer.header(name)) is not None:
            return float(value) * unit_s
    return None


def _honesty(calls: Sequence[Call], until_s: float) -> tuple[list[float], list[float]]:
    """What each of the last refusals told, and how long it was then until nothing waited any more, in seconds.

    Raises BenchError if any refusal names no time.
    """
    refused = [call for call in calls if call.status != 200]
    if silent := [call.status for call in refused if call.told_s is None]:
        raise BenchError(f"{len(silent)} refusals, of status {silent[0]}, do not say when to come again")
    end_s = max(call.answered_s for call in calls if call.status == 200)
    last = [call for call in refused if call.status == 503 and until_s - LAST_S <= call.answered_s < until_s]
    return [call.told_s or 0.0 for call in last], [end_s - call.answered_s for call in last]


def _compared(load: Load, calls: Sequence[Call], events: int, tokens: int) -> str:
    """Raises BenchError if something was billed that was not served, or served and not billed."""
    good = [call.tokens for call in calls if call.status == 200]
    told = (
        f"{load.name}: {len(calls):,} calls, {len(good):,} answered with {sum(good):,} tokens; "
        f"the ledger has {events:,} events of {tokens:,} tokens."
    )
    if (events, tokens) != (len(good), sum(good)):
        raise BenchError(told)
    return told


def _report(rounds: Sequence[Round], options: argparse.Namespace, books: Sequence[str]) -> str:
    rows = [["", "most tokens/s", "requests/s", "answered tokens/s", "of the most", "p50 ms", "p99 ms", "answers"]]
    truth = [["", "Retry-After s", "until nothing waited s", "told to true", "refusals"]]
    for load in dict.fromkeys(it.load for it in rounds):
        mine = [it for it in rounds if it.load == load]
        shares = [it.good_per_s / it.most_per_s for it in mine]
        statuses = sum((Counter(it.statuses) for it in mine), Counter[int]())
        rows.append(
            [
                load,
                *(spread([getattr(it, of) for it in mine], "{:,.0f}") for of in ("most_per_s", "offered_per_s")),
                spread([it.good_per_s for it in mine], "{:,.0f}"),
                spread(shares, "{:.0%}"),
                *(spread([getattr(it, of) for it in mine], "{:,.0f}") for of in ("p50_ms", "p99_ms")),
                ", ".join(f"{count:,} x {status}" for status, count in sorted(statuses.items())),
            ]
        )
        told_s, true_s = ([at for it in mine for at in getattr(it, of)] for of in ("told_s", "true_s"))
        if told_s:
            ratios = [told / true for told, true in zip(told_s, true_s, strict=True)]
            truth.append([load, *(spread(each, "{:.2f}") for each in (told_s, true_s, ratios)), f"{len(told_s)}"])
    how = f"Median (lowest-highest) of {options.rounds} rounds of {options.seconds:g} s."
    what = f"{options.times:g} x the most arrives. {how}"
    return "\n\n".join([what, table(rows), table(truth), *books])

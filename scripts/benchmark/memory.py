"""Memory of each kind of process: idle, with requests that wait, with a second replica; and where a start's time goes.

PSS counts a page that several processes share in parts, so it adds up; USS is what would be free if one ended. Requests
wait because the encoder replica is stopped (SIGSTOP) meanwhile: the queue is then as long as it is said to be.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import orjson
import yaml

from benchmark import BenchError, machine
from benchmark.client import Client, Connection, Route, closed_loop
from benchmark.processes import ALL, ENCODER, Memory, State, kind_of, memory_of
from benchmark.report import spread, table
from benchmark.server import Server, serving, settings
from benchmark.startup import logs_of, moments
from benchmark.workloads import passages, short_queries

MODEL = "all-MiniLM-L6-v2"
PENDING = 1000  # requests in one step
STEPS = 2
WARM_UP = ((short_queries, 1, 512), (passages, 64, 16))  # of which workload, texts a request, requests
SETTLE_S = 3.0
PENDING_S = 20.0  # a replica that does not answer for 30 s is replaced


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/bench memory", description=__doc__)
    parser.add_argument("--rounds", type=int, help="starts with one replica, and with two (default: 3)")
    parser.add_argument("--quick", action="store_true", help="1 round")
    parser.add_argument("--seed", type=int, default=1, help="of the texts (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures there")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 3)
    if options.rounds < 1:
        parser.error("--rounds must be positive")
    return options


def measure(options: argparse.Namespace, root: Path) -> None:
    os.environ.setdefault("RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE", "1")  # else a replica's log holds nothing for long
    starts: list[dict[str, float]] = []
    states: dict[str, list[State]] = {}
    for number in range(options.rounds):
        for replicas in (1, 2):
            print(f"round {number + 1}/{options.rounds}: {replicas} encoder replicas", file=sys.stderr)
            with tempfile.TemporaryDirectory(prefix="bench-") as name:
                config, asked_s = _config(root, Path(name), replicas), time.time()
                with serving(config, root, Path(name)) as server:
                    ready_s = time.time()
                    route = Route.parse(server.url, model=MODEL, format="base64", api_key=server.api_key)
                    asyncio.run(_warm_up(route, options.seed, requests=1))
                    if replicas == 1:
                        end = {"GET /ready says so": ready_s, "first answer": time.time()}
                        starts.append(_start(server, Path(name) / "server.log", asked_s) | _since(asked_s, end))
                    asyncio.run(_warm_up(route, options.seed))
                    for state, found in _states(server, route, replicas, options.seed):
                        states.setdefault(state, []).append(found)
    print(f"machine  {machine.description()}\nserver   serve run, ", end="")
    print(" ".join(f"{name}={value}" for name, value in settings().items()), end="\n\n")
    print(_report(starts, states, options.rounds))
    if options.json:
        raw = {"starts": starts, "memory_mib": states}
        options.json.write_bytes(orjson.dumps(raw, option=orjson.OPT_INDENT_2))


def _config(root: Path, folder: Path, replicas: int) -> Path:
    config = yaml.safe_load((root / "deployments.yaml").read_text())
    entry = next(it["args"] for it in config["applications"] if it["args"].get("id") == MODEL)
    entry["replicas"] = {"min": replicas, "max": replicas}
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


async def _warm_up(route: Route, seed: int, *, requests: int | None = None) -> None:
    client = Client(route)
    for workload, texts, count in WARM_UP[:requests]:
        source = workload(seed)
        bodies = (route.request(source.take(texts)) for _ in range(requests or count))
        await closed_loop(client, bodies, 8)
    client.close()


def _start(server: Server, driver: Path, asked_s: float) -> dict[str, float]:
    """Seconds after the command, by what was done then."""
    logs = logs_of(server)
    controller, encoder = (
        "\n".join(path.read_text(errors="replace") for path in logs.glob(names))
        for names in ("controller_[0-9]*.log", f"replica_{MODEL}_*.log")
    )
    return _since(asked_s, moments(driver.read_text(errors="replace"), controller, encoder, model=MODEL))


def _since(asked_s: float, at: dict[str, float]) -> dict[str, float]:
    return {what: moment_s - asked_s for what, moment_s in at.items()}


def _states(server: Server, route: Route, replicas: int, seed: int) -> Iterator[tuple[str, State]]:
    time.sleep(SETTLE_S)
    yield f"idle, {replicas}", memory_of(server.processes())
    if replicas == 1:
        yield from asyncio.run(_pending(server, route, seed))


async def _pending(server: Server, route: Route, seed: int) -> list[tuple[str, State]]:
    """Memory at each step, and after all callers hung up."""
    (encoder,) = (process for process in server.processes() if kind_of(process.cmdline()) == ENCODER)
    texts, found, callers = short_queries(seed), [], list[tuple[Connection, asyncio.Task[bytes]]]()
    encoder.suspend()
    try:
        for step in range(1, STEPS + 1):
            for text in texts.take(PENDING):
                _, connection = await asyncio.get_running_loop().create_connection(Connection, route.host, route.port)
                callers.append((connection, asyncio.create_task(connection.post(route.request(text)))))
            await _until_pending(server, step * PENDING)
            found.append((f"pending {step}", memory_of(server.processes())))
    finally:
        for connection, task in callers:
            task.cancel()
            connection.close()
        await asyncio.gather(*(task for _, task in callers), return_exceptions=True)
        encoder.resume()
    await _until_pending(server, 0)
    await asyncio.sleep(SETTLE_S)
    return [*found, ("hung up", memory_of(server.processes()))]


async def _until_pending(server: Server, sequences: int) -> None:
    until_s, pending = time.monotonic() + PENDING_S, -1
    while time.monotonic() < until_s:
        _, ready = await asyncio.to_thread(server.readiness)
        pending = ready["models"][MODEL]["pending_sequences"]
        if pending == sequences:
            return
        await asyncio.sleep(0.1)
    raise BenchError(f"{pending} sequences are pending, not {sequences}")


def _report(starts: Sequence[dict[str, float]], states: dict[str, list[State]], rounds: int) -> str:
    start_rows, before = [["start", "s after the command", "s since the line before"]], [0.0] * len(starts)
    for what in sorted(starts[0], key=lambda what: median(start[what] for start in starts)):
        now = [start[what] for start in starts]
        took = [after - earlier for after, earlier in zip(now, before, strict=True)]
        start_rows.append([what, spread(now, "{:.1f}"), spread(took, "{:.1f}")])
        before = now
    kinds = sorted({kind for state in itertools.chain(*states.values()) for kind in state} - {ALL})
    rows = [["MiB", "processes", "idle PSS", "idle USS", *(f"+{step * PENDING:,} pending" for step in (1, 2))]]
    rows[0] += ["+ after they hung up", "+ with a second replica"]
    for kind in [*kinds, ALL]:
        idle = [state.get(kind, Memory()) for state in states["idle, 1"]]
        more = [
            [state.get(kind, Memory()).pss - base.pss for state, base in zip(states[name], idle, strict=True)]
            for name in ("pending 1", "pending 2", "hung up", "idle, 2")
        ]
        figures = [spread([getattr(each, of) for each in idle], "{:.0f}") for of in ("pss", "uss")]
        rows.append([kind, f"{idle[0].processes}", *figures, *(spread(each, "{:+.1f}") for each in more)])
    each_kib = [
        1024 * (state[ALL].pss - base[ALL].pss) / (STEPS * PENDING)
        for state, base in zip(states[f"pending {STEPS}"], states["idle, 1"], strict=True)
    ]
    second = [state[ENCODER].uss / state[ENCODER].processes for state in states["idle, 2"]]
    return "\n\n".join(
        [
            f"Median (lowest-highest) of {rounds} starts; the ingress and the actors start beside the encoder.",
            table(start_rows),
            "What is added is PSS. Pending: so many requests of one short text, none of which is answered.",
            table(rows),
            f"One pending request: {spread(each_kib, '{:.1f}')} KiB. Each of two encoder replicas: "
            f"{spread(second, '{:.0f}')} MiB of its own (USS).",
            "Pages of files that processes of others map, too, count for less in both.",
        ]
    )

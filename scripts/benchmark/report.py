"""Runs to tables: medians over the rounds with their range, and what makes them doubtful."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median

from benchmark.client import percentile_ms
from benchmark.runs import BATCH, CONCURRENCY, IN_FLIGHT, SINGLES_PER_S, Run

FOREIGN_CORES = 0.1  # above it, wall times are somebody else's too
CLIENT_SHARE = 0.1  # of the machine; above it the client is part of what was measured
LATE_MS = 10.0
UNKNOWN = "-"


def tables(runs: Sequence[Run]) -> str:
    rounds = max(run.round for run in runs)
    parts = [
        f"Bulk: {BATCH} texts a request, {CONCURRENCY} at once. Median (lowest-highest) of {rounds} rounds.",
        table(_bulk_rows(runs)),
        "Single short queries, always so many in flight.",
        table(_single_rows(runs)),
        f"Fairness: single short queries arriving at {SINGLES_PER_S:g} a second, alone and beside bulk passages.",
        table(_fairness_rows(runs)),
        "p50, p99: of all rounds together (lowest-highest of a round). client: its share of the machine; "
        "foreign: the most cores that anything else used.",
        *warnings(runs),
    ]
    return "\n\n".join(parts)


def warnings(runs: Sequence[Run]) -> list[str]:
    """What speaks against believing the figures."""
    found = []
    known = [run for run in runs if run.usage.foreign_cores is not None]
    if loud := [run for run in known if (run.usage.foreign_cores or 0) > FOREIGN_CORES]:
        worst = max(loud, key=lambda run: run.usage.foreign_cores or 0)
        found.append(
            f"WARNING: something else used more than {FOREIGN_CORES} cores during {len(loud)} of {len(known)} "
            f"measurements, at worst {worst.usage.foreign_cores:.2f} ({worst.what} {worst.workload}, round "
            f"{worst.round}). Wall times suffer from it; do not quote them."
        )
    if not known:
        found.append("WARNING: the server's processes are not known (--server-pid): no CPU figures, no foreign load.")
    if busy := [run for run in runs if run.usage.client_share > CLIENT_SHARE]:
        worst = max(busy, key=lambda run: run.usage.client_share)
        found.append(
            f"WARNING: the client used {worst.usage.client_share:.0%} of the machine ({worst.what} {worst.workload})."
        )
    lateness_s = [late for run in runs for late in run.lateness_s]
    if (late_ms := percentile_ms(lateness_s, 99)) > LATE_MS:
        found.append(f"WARNING: the client sent single queries up to {late_ms:.0f} ms late (p99): latencies hold it.")
    return found


def _bulk_rows(runs: Sequence[Run]) -> list[list[str]]:
    columns = "workload, texts, tokens each, server texts/s, ceiling texts/s, ratio"
    columns += ", server CPU ms/text, ceiling CPU ms/text, client, foreign, idle server cores"
    rows = [columns.split(", ")]
    for workload in dict.fromkeys(run.workload for run in runs if run.what == "ceiling"):
        served, bare = _select(runs, "bulk", workload), _select(runs, "ceiling", workload)
        ratios = [ours.texts_per_s / best.texts_per_s for ours, best in zip(served, bare, strict=True)]
        rows.append(
            [
                workload,
                f"{bare[0].texts}",
                f"{bare[0].tokens / bare[0].texts:.1f}",
                spread((run.texts_per_s for run in served), "{:.0f}"),
                spread((run.texts_per_s for run in bare), "{:.0f}"),
                spread(ratios, "{:.2f}"),
                spread((server_ms(run) for run in served), "{:.2f}"),
                spread((1000 * run.ceiling_cpu_s / run.texts for run in bare), "{:.2f}"),
                client_share(served),
                foreign([*served, *bare]),
                spread((_server_cores(run) for run in bare), "{:.2f}"),
            ]
        )
    return rows


def _single_rows(runs: Sequence[Run]) -> list[list[str]]:
    rows = [["in flight", "requests", "req/s", "p50 ms", "p99 ms", "server CPU ms/req", "client", "foreign"]]
    for in_flight in (1, IN_FLIGHT):
        mine = _select(runs, f"singles x{in_flight}")
        rows.append(
            [
                f"{in_flight}",
                f"{sum(run.texts for run in mine)}",
                spread((run.texts_per_s for run in mine), "{:.0f}"),
                *latency(mine),
                spread((server_ms(run) for run in mine), "{:.2f}"),
                client_share(mine),
                foreign(mine),
            ]
        )
    return rows


def _fairness_rows(runs: Sequence[Run]) -> list[list[str]]:
    rows = [["singles", "requests", "p50 ms", "p99 ms", "bulk texts/s", "client", "foreign"]]
    for what in ("singles alone", "singles beside bulk"):
        mine, bulk = _select(runs, what), _select(runs, "bulk beside singles") if "beside" in what else []
        rows.append(
            [
                what.removeprefix("singles "),
                f"{sum(run.texts for run in mine)}",
                *latency(mine),
                spread((run.texts_per_s for run in bulk), "{:.0f}") if bulk else UNKNOWN,
                client_share(mine),
                foreign(mine),
            ]
        )
    return rows


def _select(runs: Sequence[Run], what: str, workload: str | None = None) -> list[Run]:
    return [run for run in runs if run.what == what and workload in (None, run.workload)]


def server_ms(run: Run) -> float | None:
    """CPU of all the server's processes for a text; None if nobody said which they are."""
    return None if run.usage.server_s is None else 1000 * run.usage.server_s / run.texts


def _server_cores(run: Run) -> float | None:
    return None if run.usage.server_s is None else run.usage.server_s / run.usage.wall_s


def latency(runs: Sequence[Run]) -> list[str]:
    """p50 and p99, in ms: of all rounds together, with the range of the rounds."""
    together = [latency_s for run in runs for latency_s in run.latencies_s]
    return [
        spread((percentile_ms(run.latencies_s, percent) for run in runs), "{:.1f}", percentile_ms(together, percent))
        for percent in (50, 99)
    ]


def client_share(runs: Sequence[Run]) -> str:
    """Of the whole machine."""
    return f"{median(run.usage.client_share for run in runs):.1%}"


def foreign(runs: Sequence[Run]) -> str:
    """The most cores that anything else used."""
    return spread((run.usage.foreign_cores for run in runs), "{:.2f}", choose=max)


def spread(
    values: Iterable[float | None],
    form: str,
    middle: float | None = None,
    *,
    choose: Callable[[Sequence[float]], float] = median,
) -> str:
    """The middle (by default `choose` of the values), and their range if there is more than one and it is wanted."""
    known = [value for value in values if value is not None]
    if not known:
        return UNKNOWN
    text = form.format(choose(known) if middle is None else middle)
    if len(known) == 1 or choose is max:
        return text
    return f"{text} ({form.format(min(known))}-{form.format(max(known))})"


def table(rows: list[list[str]]) -> str:
    """Columns as wide as they must be; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(line))
        for line in (list(zip(row, widths, strict=True)) for row in rows)
    )

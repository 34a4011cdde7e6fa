"""The cost curves as tables and as a picture: medians over the rounds, a row of panels for each curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmark.client import percentile_ms
from benchmark.report import client_share, foreign, latency, server_ms, spread, table, warnings
from benchmark.runs import Run

Meanings = Mapping[str, str]  # what a curve's values are, by its name


def report(runs: Sequence[Run], curves: Meanings) -> str:
    parts = [f"Median (lowest-highest) of {max(run.round for run in runs)} rounds."]
    columns = "requests, texts/s, tokens/s, p50 ms, p99 ms, server CPU ms/text, CPU ms/1,000 tokens, client, foreign"
    for curve, meaning in curves.items():
        rows = [[curve, *columns.split(", ")]]
        for value, found in _places(runs, curve):
            rows.append(
                [
                    f"{value:,}",
                    f"{sum(len(run.latencies_s) for run in found):,}",
                    spread((run.texts_per_s for run in found), "{:,.0f}"),
                    f"{median(run.tokens / run.wall_s for run in found):,.0f}",
                    *latency(found),
                    spread(map(server_ms, found), "{:.2f}"),
                    spread(map(_per_1000_tokens, found), "{:.0f}"),
                    client_share(found),
                    foreign(found),
                ]
            )
        parts += [f"Against {meaning}.", table(rows)]
    parts.append(
        "p50, p99: of all rounds together (lowest-highest of a round); of fewer than 100 requests the p99 is the "
        "slowest. CPU: of all the server's processes, Ray's upkeep included, which an idle service has, too."
    )
    return "\n\n".join([*parts, *warnings(runs)])


def plot(runs: Sequence[Run], curves: Meanings, path: Path, *, title: str) -> None:
    """A row for each curve: pace, latency, CPU. Both axes are logarithmic. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 11), layout="constrained")
    figure.suptitle(title, fontsize="small")
    for row, (curve, meaning) in zip(figure.subplots(len(curves), 3), curves.items(), strict=True):
        places = _places(runs, curve)
        together = [[second for run in found for second in run.latencies_s] for _, found in places]
        panels: list[dict[str, list[float]]] = [
            {
                "texts/s": [median(run.texts_per_s for run in found) for _, found in places],
                "tokens/s": [median(run.tokens / run.wall_s for run in found) for _, found in places],
            },
            {f"p{percent} ms": [percentile_ms(each, percent) for each in together] for percent in (50, 99)},
            {
                "server CPU ms/text": [median(server_ms(run) or 0.0 for run in found) for _, found in places],
                "CPU ms/1,000 tokens": [median(_per_1000_tokens(run) or 0.0 for run in found) for _, found in places],
            },
        ]
        for axes, lines in zip(row, panels, strict=True):
            for name, heights in lines.items():
                axes.plot([value for value, _ in places], heights, marker=".", label=name)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_major_formatter("{x:,.10g}")
            axes.set_xlabel(meaning, fontsize="small")
            axes.grid(alpha=0.3, which="both")
            axes.legend()
    figure.savefig(path)


def _places(runs: Sequence[Run], curve: str) -> list[tuple[int, list[Run]]]:
    """(value, its runs), in order."""
    by_value: dict[int, list[Run]] = {}
    for run in runs:
        if run.what == curve:
            by_value.setdefault(int(run.workload), []).append(run)
    return sorted(by_value.items())


def _per_1000_tokens(run: Run) -> float | None:
    spent_ms = server_ms(run)
    return None if spent_ms is None else 1000 * spent_ms * run.texts / run.tokens

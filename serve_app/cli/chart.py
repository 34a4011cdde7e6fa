"""Usage as a picture: a bar a day, stacked by model, tokens above and dollars below.

matplotlib is an extra; it draws to memory and files only. Adding up is `usage.py`'s.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any

from serve_app.cli.terminal import Failed
from serve_app.core.ledger import Kind, UsageLine

SUFFIXES = (".png", ".svg", ".pdf")
MOST_MODELS = 9  # that have a colour of their own; the others share a tenth
OTHERS = "others"


def check(path: Path) -> None:
    """Raises Failed if a chart could not be drawn there."""
    if path.suffix.lower() not in SUFFIXES:
        raise Failed(f"A chart is a {', '.join(SUFFIXES)} file.")
    if not path.parent.is_dir():
        raise Failed(f"There is no folder {path.parent}.")
    try:
        import_module("matplotlib.figure")
    except ImportError:
        raise Failed("A chart needs matplotlib: pip install 'serve-app[chart]'.") from None


def draw(lines: Sequence[UsageLine], path: Path, *, title: str) -> None:
    """The file appears when it is complete. Raises OSError."""
    from matplotlib.figure import Figure

    days, models = days_of(lines), models_of(lines)
    figure = Figure(figsize=(10, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    figure.suptitle(f"{title}, {days[0]} to {days[-1]}" if days else f"{title}: nothing was used")
    _bars(above, days, stacks(lines, days, models, _tokens), "input tokens")
    _bars(below, days, stacks(lines, days, models, _dollars), "US dollars")
    if models:
        figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(models)))
    draft = path.with_name(f"{path.name}.part")
    try:
        figure.savefig(draft, format=path.suffix[1:].lower(), dpi=120)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def days_of(lines: Sequence[UsageLine]) -> list[dt.date]:
    """From the first to the last, those without usage, too."""
    used = sorted(dt.date.fromisoformat(line.day) for line in lines)
    return [used[0] + dt.timedelta(days=at) for at in range((used[-1] - used[0]).days + 1)] if used else []


def models_of(lines: Sequence[UsageLine]) -> list[str]:
    """The dearest first; those that have no colour of their own come last, as one."""
    cost: dict[str, Decimal] = {}
    for line in lines:
        cost[line.model] = cost.get(line.model, Decimal(0)) + line.amount
    ranked = sorted(cost, key=lambda model: (-cost[model], model))
    return ranked[:MOST_MODELS] + [OTHERS] * (len(ranked) > MOST_MODELS)


def stacks(
    lines: Sequence[UsageLine], days: Sequence[dt.date], models: Sequence[str], of: Callable[[UsageLine], Decimal]
) -> dict[str, list[float]]:
    """By model, a height for each day."""
    place = {day.isoformat(): at for at, day in enumerate(days)}
    heights = {model: [Decimal(0)] * len(days) for model in models}
    for line in lines:
        heights[line.model if line.model in heights else OTHERS][place[line.day]] += of(line)
    return {model: [float(height) for height in column] for model, column in heights.items()}


def _tokens(line: UsageLine) -> Decimal:
    return Decimal(line.quantity if line.kind is Kind.TOKENS else 0)


def _dollars(line: UsageLine) -> Decimal:
    return line.amount


def _bars(axes: Any, days: Sequence[dt.date], heights: dict[str, list[float]], what: str) -> None:
    dates: Any = import_module("matplotlib.dates")  # half typed
    floor = [0.0] * len(days)
    for at, (model, column) in enumerate(heights.items()):
        axes.bar(days, column, bottom=floor, width=0.8, color=f"C{at}", label=model)
        floor = [below + height for below, height in zip(floor, column, strict=True)]
    axes.set_ylabel(what)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.10g}")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if days:
        locator = dates.AutoDateLocator(minticks=1, maxticks=10)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))

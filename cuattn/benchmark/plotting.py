"""What the pictures share: colours, sizes read from case names, words on where figures come from, bars."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from cuattn.benchmark.grids import text_of
from cuattn.benchmark.results import BenchmarkError, Record

__all__ = [
    "COLORS",
    "PlotError",
    "Series",
    "bars",
    "executor_of",
    "fit_legend",
    "legend_above",
    "number",
    "sizes",
    "where",
]

#: Of Okabe and Ito: eyes that confuse red and green tell these apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999933", "#882255", "#000000")
_SIZE = re.compile(r"([bnmhgde])(\d+)")
_WHERE = {
    "host": "on the host executor, a CPU: not a GPU's",
    "cuda": "on a GPU",
    "none": "no kernel ran",
}


class PlotError(BenchmarkError):
    """A picture cannot be drawn from these reports, or not here."""


class Series(NamedTuple):
    """A record, and the report that it is from where there are several."""

    source: str
    record: Record


def where(executor: str) -> str:
    """Where figures come from, for an axis."""
    return _WHERE[executor]


def executor_of(series: Sequence[Series], what: str) -> str:
    """The executor of all records. Raises `PlotError` where there are none or several: they share no axis."""
    executors = sorted({one.record.executor for one in series} - {"none"})
    if not series:
        raise PlotError(f"nothing in the report belongs into a picture of {what}")
    if len(executors) > 1:
        raise PlotError("figures of a GPU and of the host executor do not belong on one axis: draw them apart")
    return executors[0] if executors else "none"


def sizes(case: str) -> dict[str, int]:
    """The sizes that a case name says, by letter."""
    found: dict[str, int] = {}
    for word in case.split("_"):
        if match := _SIZE.fullmatch(word):
            found.setdefault(match[1], int(match[2]))
    return found


def number(record: Record, metric: str) -> float:
    """A metric as a number. Raises `PlotError` where it is none."""
    value = record.metrics.get(metric)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise PlotError(f"{record.case} has no {metric}")
    return float(value)


def bars(axes: Any, groups: dict[str, dict[str, float]]) -> None:
    """Draw horizontal bars: a group for each name, with a bar for each of its parts, the same colour in every group."""
    names = list(dict.fromkeys(name for parts in groups.values() for name in parts))
    place, ticks = 0.0, []
    drawn: set[str] = set()
    for parts in groups.values():
        first = place
        for name, value in parts.items():
            color = COLORS[names.index(name) % len(COLORS)]
            axes.barh(place, value, height=0.9, color=color, label=None if name in drawn else name)
            axes.text(value, place, f" {text_of(value)}", va="center", fontsize=7)
            drawn.add(name)
            place += 1.0
        ticks.append((first + place - 1.0) / 2)
        place += 0.8
    axes.set_yticks(ticks, list(groups), fontsize=8)
    axes.set_ylim(place - 0.8, -1.0)
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def legend_above(axes: Any) -> None:
    """Draw a legend above the axes, where it hides nothing."""
    count = len(axes.get_legend_handles_labels()[1])
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=min(count, 3), frameon=False, fontsize=8)


def fit_legend(axes: Any) -> None:
    """Draw a legend whose text gets smaller the more there is."""
    count = len(axes.get_legend_handles_labels()[1])
    if count:
        axes.legend(fontsize=8 if count < 6 else 6, ncols=1 if count < 12 else 2)

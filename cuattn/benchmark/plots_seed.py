"""The picture of the suite `seed`: two panels over length as published, and the two larger shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cuattn.benchmark.plotting import (
    COLORS,
    PlotError,
    Series,
    bars,
    executor_of,
    legend_above,
    number,
    sizes,
    where,
)
from cuattn.benchmark.results import Record
from cuattn.benchmark.seed import PUBLISHED_MIB, PUBLISHED_SAVED_PERCENT, PUBLISHED_US, SHAPES
from cuattn.benchmark.tables import label

__all__ = ["seed"]

MIB = 2.0**20
_FUSED, _UNFUSED = COLORS[0], COLORS[1]


def seed(figure: Any, series: Sequence[Series]) -> None:
    """Time and memory over length, what is saved beside what was published; below, the larger shapes."""
    chosen = [one.record for one in series if one.record.suite == "seed"]
    executor = executor_of(series, "seed") if chosen else ""
    own = [record for record in chosen if record.provider == "cuattn"]
    shapes = {case.name for case in SHAPES}
    lines = sorted((record for record in own if record.case not in shapes), key=lambda one: sizes(one.case)["n"])
    large = [record for record in chosen if record.case in shapes]
    if not lines and not large:
        raise PlotError("nothing in the report belongs into a picture of the suite seed")
    rows = bool(lines) + bool(large)
    figure.set_size_inches(13, 4.8 * rows)
    grid = figure.subplots(rows, 2, squeeze=False)
    if lines:
        _times(grid[0][0], lines, executor)
        _memory(grid[0][1], lines)
    if large:
        _shapes(grid[-1], large, executor)
    figure.suptitle("Fused attention beside the unfused: B = 2, H = 1, D = 64, float32; and two training shapes")


def _times(axes: Any, records: Sequence[Record], executor: str) -> None:
    lengths = [sizes(record.case)["n"] for record in records]
    for name, color in (("flash", _FUSED), ("standard", _UNFUSED)):
        times = [number(record, f"{name}_time_us") / 1e3 for record in records]
        axes.plot(lengths, times, "o-", color=color, label=_words(name))
    _axis(axes, lengths, f"time of a call, ms\n{where(executor)}")


def _memory(axes: Any, records: Sequence[Record]) -> None:
    """Memory, with what is saved: ours, and as published where the published baseline still fitted."""
    lengths = [sizes(record.case)["n"] for record in records]
    for name, color in (("flash", _FUSED), ("standard", _UNFUSED)):
        found = [number(record, f"{name}_memory_bytes") / MIB for record in records]
        axes.plot(lengths, found, "o-", color=color, label=_words(name))
    _axis(axes, lengths, "inputs, outputs and temporary arrays, MiB\ncounted: the same on every executor")
    for record, n in zip(records, lengths, strict=True):
        top = number(record, "standard_memory_bytes") / MIB
        published = PUBLISHED_SAVED_PERCENT.get(n)
        text = f"saved {number(record, 'saved_percent'):.1f} %\n"
        text += f"published {published:g} %" if published else "published: past its memory"
        axes.annotate(text, (n, top), (-7, 2), textcoords="offset points", ha="right", fontsize=7)
        if not published:
            axes.plot([n], [top], "x", color="black", ms=11, mew=2, label="the published baseline is past its memory")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.35)
    axes.legend(loc="upper left", fontsize=8)


def _axis(axes: Any, lengths: Sequence[int], name: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel="sequence length N", ylabel=name)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(lengths) / 2.2, max(lengths) * 1.3)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")


def _shapes(pair: Any, records: Sequence[Record], executor: str) -> None:
    """Bars of time and memory for the larger shapes, and those that were published, on a GPU of their own."""
    times: dict[str, dict[str, float]] = {}
    memory: dict[str, dict[str, float]] = {}
    for record in records:
        name = label(record.case).replace(" H", "\nH").replace("attention ", "")
        for metric in ("flash", "standard"):
            if f"{metric}_time_us" not in record.metrics:
                continue
            by = record.provider if record.provider != "cuattn" else _words(metric)
            times.setdefault(name, {})[by] = number(record, f"{metric}_time_us") / 1e3
            memory.setdefault(name, {})[by] = number(record, f"{metric}_memory_bytes") / MIB
    published = "published,\non another GPU"
    if executor == "cuda":
        times[published] = {name: us / 1e3 for name, us in PUBLISHED_US.items()}
    memory["published"] = dict(zip((_words("flash"), _words("standard")), map(float, PUBLISHED_MIB), strict=True))
    for axes, groups, name in (
        (pair[0], times, f"time of a call, ms, {where(executor)}"),
        (pair[1], memory, "inputs, outputs and temporary arrays, MiB"),
    ):
        bars(axes, groups)
        axes.set_xlabel(name)
        legend_above(axes)


def _words(name: str) -> str:
    return "fused" if name == "flash" else "unfused"

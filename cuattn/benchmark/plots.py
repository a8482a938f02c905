"""Pictures of reports: matplotlib figures of what was measured, each axis with where it was measured.

Needs the extra ``plot``. Colours and marks are those of a kind or a provider, the same in every picture.

>>> sorted(KINDS)
['bars', 'decode', 'lengths', 'mix', 'roofline', 'seed']
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cuattn.benchmark import plots_seed
from cuattn.benchmark.lengths import KINDS as LENGTH_KINDS
from cuattn.benchmark.lengths import WINDOW
from cuattn.benchmark.plotting import (
    COLORS,
    PlotError,
    Series,
    bars,
    executor_of,
    fit_legend,
    legend_above,
    number,
    sizes,
    where,
)
from cuattn.benchmark.results import Report
from cuattn.benchmark.tables import label

__all__ = ["KINDS", "PlotError", "Source", "draw", "kind_for", "require", "save"]

CLASSES = ("mma", "special", "float", "int", "memory", "predicate")
#: Suites to the kind of picture that says most about them, the first that fits.
_OF_SUITES = {
    "seed": "seed",
    "lengths": "lengths",
    "decode": "decode",
    "options": "mix",
    "attention": "bars",
    "backward": "bars",
    "softmax": "bars",
    "linear": "bars",
    "layout": "bars",
    "smoke": "bars",
    "dual_chunk": "bars",
}


class Source(NamedTuple):
    """A report and what to call it where there are several."""

    name: str
    report: Report


def kind_for(report: Report) -> str:
    """The kind of picture for the suites of a report. Raises `PlotError` where there is none."""
    suites = {record.suite for record in report.records if not record.error}
    for suite, kind in _OF_SUITES.items():
        if suite in suites:
            return kind
    raise PlotError(f"there is no picture of the suites {', '.join(sorted(suites)) or '(none)'}")


def draw(sources: Sequence[Source], kind: str) -> Any:
    """Draw a figure.

    Parameters
    ----------
    kind : str
        A key of `KINDS`.

    Raises
    ------
    PlotError
        matplotlib is not installed, or nothing in the reports belongs into such a picture.
    """
    _require_matplotlib()
    from matplotlib.figure import Figure

    series = [
        Series(source.name if len(sources) > 1 else "", record)
        for source in sources
        for record in source.report.records
        if not record.error
    ]
    figure = Figure(layout="constrained", dpi=120)
    KINDS[kind](figure, series)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG or SVG, by the name; raises `PlotError` for other names, and where it cannot be written."""
    require(path)
    form = path.suffix.lower().removeprefix(".")
    metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
    try:
        figure.savefig(path, format=form, metadata=metadata)
    except OSError as error:
        raise PlotError(f"cannot write {path}: {error.strerror}") from error


def require(path: Path) -> None:
    """Raise `PlotError` unless pictures can be drawn, and into a file of that name."""
    _require_matplotlib()
    if path.suffix.lower() not in (".png", ".svg"):
        raise PlotError(f"{path.name} is no name of a picture: .png or .svg is needed")


def _require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotError("matplotlib is missing: pip install 'cuattn[plot]'")


def lengths(figure: Any, series: Sequence[Series]) -> None:
    """Counters, or times on a GPU, over lengths: which kind takes least from where on."""
    chosen = [one for one in series if one.record.suite == "lengths"]
    executor = executor_of(chosen, "lengths")
    metrics = {"time_us": "time, µs"} if executor == "cuda" else {}
    if executor == "host":
        metrics = {"warp_instructions": "warp instructions", "global_read_bytes": "bytes read from global memory"}
    figure.set_size_inches(6.4 * len(metrics), 4.8)
    for axes, (metric, name) in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics.items(), strict=True):
        lines: dict[tuple[str, str], dict[int, float]] = {}
        for one in chosen:
            kind = one.record.case.split("_")[1]
            lines.setdefault((one.source, kind), {})[sizes(one.record.case)["n"]] = number(one.record, metric)
        for (source, kind), points in lines.items():
            text = {"window": f"window of {WINDOW}", "blocks": "4 blocks of 64 a row"}.get(kind, kind)
            from_where = _crossing(points, lines.get((source, "attention"), {}))
            if kind != "attention":
                text += f": less from N = {from_where:,}" if from_where else ": not less here"
            color = COLORS[LENGTH_KINDS.index(kind)]
            axes.plot(*_sorted(points), "o-", color=color, label=f"{source} {text}".strip())
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="sequence length N",
            ylabel=f"{name}\n{'on a GPU' if executor == 'cuda' else 'counted by the host executor'}",
        )
        _lengths_as_ticks(axes, [n for points in lines.values() for n in points])
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("Attention, window, blocks and linear attention over length")


def _crossing(points: dict[int, float], base: dict[int, float]) -> int | None:
    """The least length from which on a line stays below another."""
    found = None
    for n in sorted(points.keys() & base.keys(), reverse=True):
        if points[n] >= base[n]:
            break
        found = n
    return found


def _sorted(points: dict[int, float]) -> tuple[list[int], list[float]]:
    return sorted(points), [points[n] for n in sorted(points)]


def _lengths_as_ticks(axes: Any, lengths: Sequence[int]) -> None:
    ticks = sorted(set(lengths))
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks], minor=False)
    axes.set_xticks([], minor=True)


def decode(figure: Any, series: Sequence[Series]) -> None:
    """Bandwidth of decoding over context and page size, beside the copy of the same run."""
    chosen = [one for one in series if one.record.case.startswith("decode_") and "time_us" in one.record.metrics]
    executor = executor_of(chosen, "decode")
    groups: dict[tuple[int, int, int], dict[tuple[str, str, str], dict[int, float]]] = {}
    for one in chosen:
        case, size = one.record.case, sizes(one.record.case)
        if size["n"] != 1:
            continue
        page = next((word for word in case.split("_") if word == "contiguous" or word.startswith("page")), "")
        rest = case.partition(f"_{page}")[2].strip("_").replace("_", " ")
        nbytes = one.record.metrics.get("least_bytes", one.record.metrics.get("work_bytes"))
        if not isinstance(nbytes, int | float):
            continue
        rest = re.sub(r"\bsplits(\d+)", r"\1 splits", rest)
        name = page.replace("page", "pages of ") + (f", {rest}" if rest else "")
        line = groups.setdefault((size["b"], size["h"] // size["g"], size["d"]), {})
        points = line.setdefault((one.source, one.record.provider, name), {})
        points[size["m"]] = nbytes / number(one.record, "time_us") / 1e3
    if not groups:
        raise PlotError("no call of decoding with one query a sequence is in the report")
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure.set_size_inches(5 * columns, 3.8 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, ((batch, group, head_dim), lines) in zip(grid.flat, groups.items(), strict=False):
        for index, ((source, provider, name), points) in enumerate(lines.items()):
            text = " ".join(part for part in (source, provider if provider != "cuattn" else "", name) if part)
            axes.plot(*_sorted(points), "o-", color=COLORS[index % len(COLORS)], label=text)
        for one in series:
            if one.record.suite == "ceilings" and one.record.case == "copy" and executor == "cuda":
                axes.axhline(number(one.record, "bandwidth_gb_per_s"), color="black", ls="--", lw=1, label="copy")
        top = max(value for points in lines.values() for value in points.values())
        axes.set(
            xscale="log",
            ylim=(0, max(1.05 * top, axes.get_ylim()[1])),
            xlabel="context M",
            ylabel=f"GB/s\n{where(executor)}",
        )
        axes.set_title(f"batch {batch}, {group} query head{'s' * (group > 1)} a key head, D {head_dim}", fontsize=9)
        _lengths_as_ticks(axes, [m for points in lines.values() for m in points])
        axes.grid(alpha=0.3)
        fit_legend(axes)
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    figure.suptitle("Bytes of keys, values, queries and results a second of decoding")


def speeds(figure: Any, series: Sequence[Series]) -> None:
    """Operations or bytes a second of each problem, beside peers and ceilings."""
    found: dict[str, tuple[str, list[Series]]] = {}
    for metric, name in (
        ("tflop_per_s", "TFLOP/s"),
        ("gflop_per_s", "GFLOP/s"),
        ("bandwidth_gb_per_s", "GB/s"),
    ):
        chosen = [one for one in series if metric in one.record.metrics and one.record.suite != "ceilings"]
        seen = {(one.source, one.record.case) for _, others in found.values() for one in others}
        chosen = [one for one in chosen if (one.source, one.record.case) not in seen]
        if chosen:
            found[metric] = name, chosen
    if not found:
        raise PlotError("no speeds are in the report")
    counts = [len({label(one.record.case) for one in chosen}) for _, chosen in found.values()]
    bars_in_all = [len(chosen) for _, chosen in found.values()]
    heights = [0.16 * n + 0.16 * m + 0.6 for n, m in zip(bars_in_all, counts, strict=True)]
    figure.set_size_inches(10, max(3.0, sum(heights)))
    grid = figure.subplots(len(found), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (metric, (name, chosen)) in zip(grid.flat, found.items(), strict=True):
        executor = executor_of(chosen, "the speeds")
        groups: dict[str, dict[str, float]] = {}
        for one in chosen:
            by = " ".join(part for part in (one.source, one.record.provider) if part)
            groups.setdefault(label(one.record.case), {})[by] = number(one.record, metric)
        bars(axes, groups)
        for one in series:
            if executor == "cuda" and one.record.suite == "ceilings" and metric in one.record.metrics:
                axes.axvline(number(one.record, metric), color="black", ls="--", lw=1, label=one.record.provider)
        axes.set_xlabel(f"{name}, {where(executor)}")
        if axes.get_legend_handles_labels()[1] != ["cuattn"]:
            legend_above(axes)
    figure.suptitle("Speed" if executor_of(series, "the report") == "cuda" else "Speed of the host executor: no GPU's")


def roofline(figure: Any, series: Sequence[Series]) -> None:
    """Operations a second over operations a byte, below the ceilings of the same run."""
    chosen = [one for one in series if "work_flops" in one.record.metrics and "time_us" in one.record.metrics]
    executor = executor_of(chosen, "roofline")
    figure.set_size_inches(8, 5.5)
    axes = figure.subplots()
    providers = list(dict.fromkeys((one.source, one.record.provider) for one in chosen))
    for index, (source, provider) in enumerate(providers):
        own = [one.record for one in chosen if (one.source, one.record.provider) == (source, provider)]
        x = [number(one, "work_flops") / number(one, "work_bytes") for one in own]
        y = [number(one, "work_flops") / number(one, "time_us") / 1e6 for one in own]
        axes.plot(x, y, "o", color=COLORS[index % len(COLORS)], alpha=0.8, label=f"{source} {provider}".strip())
    ceilings = {one.record.case: one.record for one in series if one.record.suite == "ceilings"}
    copy = ceilings.get("copy")
    product = next((record for case, record in ceilings.items() if case.startswith("matmul")), None)
    if executor == "cuda" and copy is not None and product is not None:
        top, rate = number(product, "tflop_per_s"), number(copy, "bandwidth_gb_per_s") / 1e3
        ridge = top / rate
        found = [number(one.record, "work_flops") / number(one.record, "work_bytes") for one in chosen]
        low, high = min(*found, ridge) / 3, max(*found, ridge) * 3
        axes.plot([low, ridge, high], [low * rate, top, top], "k--", lw=1, label="copy, matmul")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte of inputs and outputs")
    axes.set_ylabel(f"TFLOP/s\n{where(executor)}")
    axes.grid(alpha=0.3)
    fit_legend(axes)
    figure.suptitle(
        "Roofline" if executor == "cuda" else "Operations a second over operations a byte; no roof of a GPU"
    )


def mix(figure: Any, series: Sequence[Series]) -> None:
    """Instructions of a warp by class: what a kernel executes, of each case."""
    chosen = [one for one in series if any(name in one.record.metrics for name in CLASSES)]
    executor_of(chosen, "mix")
    rows = [f"{one.source} {label(one.record.case)}".strip() for one in chosen]
    figure.set_size_inches(9, max(2.5, 0.28 * len(rows) + 1.2))
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for index, name in enumerate((*CLASSES, "other")):
        values = []
        for one in chosen:
            found = {kind: number(one.record, kind) for kind in CLASSES if kind in one.record.metrics}
            total = number(one.record, "warp_instructions")
            values.append(found.get(name, 0.0) if name != "other" else max(0.0, total - sum(found.values())))
        color = COLORS[index % len(COLORS)] if name != "other" else "lightgray"
        axes.barh(rows, values, left=left, color=color, label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("warp instructions of PTX, counted by the host executor")
    axes.legend(ncols=7, loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=8)
    axes.margins(y=0.01)
    figure.suptitle("What the kernels execute")


KINDS: dict[str, Callable[[Any, Sequence[Series]], None]] = {
    "seed": plots_seed.seed,
    "bars": speeds,
    "decode": decode,
    "roofline": roofline,
    "lengths": lengths,
    "mix": mix,
}

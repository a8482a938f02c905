"""Reports on a terminal: one table a suite, and a progress bar."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cuattn.benchmark.results import Record, Report, Value
from cuattn.benchmark.suite import Progress as ProgressCall

EXECUTORS = {"host": "host executor (a CPU; says nothing about a GPU)", "cuda": "GPU", "none": "no kernel runs"}
#: Metrics that are in the JSON but would make the tables too wide.
HIDDEN = frozenset(
    {"samples", "best_us", "best_gflop_per_s", "spread", "cpu_us", "bytes", "stack_bytes", "cubin_bytes", "numpy_ms"}
)
UNITS = {
    "gb_per_s": "GB/s",
    "tflop_per_s": "TFLOP/s",
    "gflop_per_s": "GFLOP/s",
    "us": "µs",
    "ms": "ms",
    "bytes": "bytes",
}


def summary(report: Report) -> RenderableType:
    """Tables of the whole report, and a line on the goals where there are any."""
    groups: dict[tuple[str, str, tuple[str, ...]], list[Record]] = {}
    for record in report.records:
        if not record.error:
            shape = tuple(name for name in record.metrics if name not in HIDDEN)
            key = _merged(record.suite, record.executor, shape)
            groups.setdefault(key, []).append(record)
    parts: list[RenderableType] = [
        table(records, title=f"{suite}: {EXECUTORS[executor]}") for (suite, executor, _), records in groups.items()
    ]
    parts += [Text(f"{record.suite} {record.case} ({record.provider}): {record.error}", "red") for record in report.errors]
    parts.append(Text(goals_line(report.records)))
    return Group(*parts)


def _merged(suite: str, executor: str, shape: tuple[str, ...]) -> tuple[str, str, tuple[str, ...]]:
    """Records with different metrics share a table, except where the suite mixes different things."""
    return (suite, executor, shape) if suite in ("latency", "compile") else (suite, executor, ())


def table(records: Sequence[Record], title: str) -> Table:
    """A row a record, a column a metric."""
    names = list(dict.fromkeys(name for record in records for name in record.metrics if name not in HIDDEN))
    providers = len({record.provider for record in records}) > 1
    result = Table(title=title, title_justify="left")
    result.add_column("case", overflow="fold")
    if providers:
        result.add_column("by")
    for name in names:
        result.add_column(heading(name), justify="right")
    if any(record.goals for record in records):
        result.add_column("goal", no_wrap=True)
    for record in records:
        cells: list[str | Text] = [record.case, *([record.provider] if providers else [])]
        cells += [cell(name, record.metrics) for name in names]
        if any(other.goals for other in records):
            cells.append(_goal(record))
        result.add_row(*cells)
    return result


def heading(name: str) -> str:
    """``"bandwidth_gb_per_s"`` becomes ``"bandwidth, GB/s"``."""
    for suffix, unit in UNITS.items():
        if name == suffix:
            return unit
        if name.endswith(f"_{suffix}"):
            return f"{name.removesuffix(f'_{suffix}').replace('_', ' ')}, {unit}"
    return name.replace("_", " ")


def cell(name: str, metrics: Mapping[str, Value]) -> str:
    """A value as text."""
    value = metrics.get(name)
    if value is None:
        return "" if name not in metrics else "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _goal(record: Record) -> Text:
    words = [
        Text(f"{heading(name)} {goal}" if len(record.goals) > 1 else goal, "green" if record.verdicts[name] else "bold red")
        for name, goal in record.goals.items()
    ]
    return Text("\n").join(words)


def goals_line(records: Sequence[Record]) -> str:
    """How many goals were reached; empty where there are none."""
    verdicts = [verdict for record in records for verdict in record.verdicts.values()]
    return f"{sum(verdicts)} of {len(verdicts)} goals reached" if verdicts else ""


@contextmanager
def progress(console: Console) -> Iterator[ProgressCall]:
    """A progress bar with the time left, as a function for `run_suite`. It vanishes when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)

        def update(done_s: float, total_s: float, label: str) -> None:
            bar.update(task, completed=done_s, total=max(total_s, 1e-9), description=label[:48])

        yield update

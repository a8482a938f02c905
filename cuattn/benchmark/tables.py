"""Reports on a terminal: one table a suite, and a progress bar."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from cuattn.benchmark import grids
from cuattn.benchmark.grids import Cell, Grid, Part, text_of
from cuattn.benchmark.models import MODELS, slug
from cuattn.benchmark.results import Record, Report, Value
from cuattn.benchmark.suite import Progress as ProgressCall

EXECUTORS = {"host": "host executor (a CPU; says nothing about a GPU)", "cuda": "GPU", "none": "no kernel runs"}
#: Metrics that are in the JSON but would make the tables too wide.
HIDDEN = frozenset(
    {
        *("samples", "best_us", "best_gflop_per_s", "spread", "cpu_us", "bytes", "stack_bytes", "cubin_bytes"),
        *("numpy_ms", "launches", "active_lanes", "heavy_modules", "ptx_lines", "nvrtc_cpu_ms"),
        *("float", "int", "memory", "predicate"),
        *("order_free_instructions", "order_free_mma_over_forward", "logits_bytes", "work_flops", "work_bytes"),
    }
)
_ATTENTION = re.compile(
    r"(|backward_|forward_backward_)attention_b(\d+)_n(\d+)_m(\d+)_h(\d+)_g(\d+)_d(\d+)_e(\d+)_(\w+)"
)
_SIZE = re.compile(r"^([bnmhgde])(\d+)$")
_KINDS = {"": "attention", "backward_": "backward", "forward_backward_": "forward and backward"}
_FAMILIES = {
    "varlen": "attention",
    "forward": "backward",
    **dict.fromkeys(("padding", "rope", "split", "remove", "restore", "merge"), "tokens"),
}
MISSING_PEERS = "peers"  # the case of records that say which peers are not installed
_COLORS = {True: "green", False: "bold red"}
UNITS = {
    "gb_per_s": "GB/s",
    "tflop_per_s": "TFLOP/s",
    "gflop_per_s": "GFLOP/s",
    "gflop_per_core_s": "GFLOP a core second",
    "us": "µs",
    "ms": "ms",
    "bytes": "bytes",
    "flops": "FLOPs",
}


def parts(report: Report, *, full: bool = False) -> list[Part]:
    """Return the tables of a report, its errors, and lines on the goals where there are any; `full`: every metric."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in report.records:
        if not record.error:
            groups.setdefault((record.suite, record.executor, _family(record.case)), []).append(record)
    found: list[Part] = [
        table(records, title=f"{suite}: {EXECUTORS[executor]}", full=full)
        for (suite, executor, _), records in groups.items()
    ]
    failed = [record for record in report.records if record.error]
    lost = dict.fromkeys(f"{record.provider} ({record.error})" for record in failed if record.case == MISSING_PEERS)
    found += [Text(f"missing peers: {'; '.join(lost)}", "yellow")] if lost else []
    found += [Text(error_line(record), "red") for record in failed if record.case != MISSING_PEERS]
    if goals := goals_line(report.records):
        found.append(Text(goals))
    found += [Text(missed_line(record), "bold red") for record in report.missed]
    return found


def show(report: Report, console: Console, *, full: bool = False) -> None:
    """Print a report: tables that fit on a terminal, plain ones elsewhere."""
    grids.show(console, parts(report, full=full))


def flat(report: Report) -> Grid:
    """Return a report as one table with a row for each record and a column for each metric: what CSV holds."""
    names = list(dict.fromkeys(name for record in report.records for name in record.metrics))
    goals = any(record.goals for record in report.records)
    columns = ["suite", "case", "provider", "executor", *names, *(["goals"] if goals else []), "error"]
    rows: list[list[Cell]] = []
    for record in report.records:
        values: list[Cell] = [record.metrics.get(name, "") for name in names]
        verdict: list[Cell] = [_goal(record).plain.replace("\n", "; ")] if goals else []
        rows.append([record.suite, record.case, record.provider, record.executor, *values, *verdict, record.error])
    return Grid("", columns, rows, keys=2)


def _family(case: str) -> str:
    """The table that a record belongs to: one for operations whose metrics are the same."""
    word = case.partition("_")[0]
    return _FAMILIES.get(word, word)


def error_line(record: Record) -> str:
    """Return a line that says what failed, and why."""
    return f"{record.suite}, {label(record.case)}, {record.provider}: {record.error}"


def table(records: Sequence[Record], title: str, *, full: bool = False) -> Grid:
    """Return a table with a row for each record and a column for each metric."""
    hidden = frozenset() if full else HIDDEN
    names = list(dict.fromkeys(name for record in records for name in record.metrics if name not in hidden))
    providers = len({record.provider for record in records}) > 1
    goals = any(record.goals for record in records)
    columns = ["case", *(["by"] if providers else []), *map(heading, names), *(["goals"] if goals else [])]
    rows: list[list[Cell]] = []
    for record in records:
        cells: list[Cell] = [label(record.case), *([record.provider] if providers else [])]
        cells += [record.metrics.get(name, "") for name in names]
        rows.append([*cells, *([_goal(record)] if goals else [])])
    return Grid(title, columns, rows, keys=1 + providers)


def label(case: str) -> str:
    """A case in words; of an attention problem fewer of them: what is equal is said once."""
    for name in MODELS:
        for call in ("prefill", "decode", "training"):
            prefix = f"{slug(name)}_{call}_"
            if case.startswith(prefix):
                return f"{name} {call}: {label(case.removeprefix(prefix))}"
    for prefix in ("option_", "gradient_"):
        if case.startswith(prefix):
            return case.removeprefix(prefix).replace("_", " ")
    case = case.removeprefix("workspace_")
    match = _ATTENTION.fullmatch(case)
    if match is None:
        return _in_words(case)
    kind, b, n, m, h, g, d, e, rest = match.groups()
    pairs = (
        f"N {n}" if n == m else f"N {n} M {m}",
        f"H {h}" if h == g else f"H {h} G {g}",
        f"D {d}" if d == e else f"D {d} E {e}",
    )
    return f"{_KINDS[kind]} B {b} {' '.join(pairs)} {rest.replace('_', ' ')}"


def _in_words(text: str) -> str:
    """A label in words that may stand on several lines: sizes as letter and number."""
    return " ".join(_SIZE.sub(lambda match: f"{match[1].upper()} {match[2]}", word) for word in re.split("[ _]", text))


def heading(name: str) -> str:
    """Return the heading of a metric: ``"bandwidth_gb_per_s"`` becomes ``"bandwidth, GB/s"``."""
    for suffix, unit in UNITS.items():
        if name == suffix:
            return unit
        if name.endswith(f"_{suffix}"):
            return f"{name.removesuffix(f'_{suffix}').replace('_', ' ')}, {unit}"
    return name.replace("_", " ")


def cell(name: str, metrics: Mapping[str, Value]) -> str:
    """A value as text; nothing where there is none."""
    return text_of(metrics.get(name)) if name in metrics else ""


def _goal(record: Record) -> Text:
    """The goals of a record, with a word for each on whether it was reached."""
    lines = []
    for name, reached in record.verdicts.items():
        what = record.goals[name] if len(record.goals) == 1 else f"{heading(name)} {record.goals[name]}"
        lines.append(Text(f"{'reached' if reached else 'missed'}: {what}", _COLORS[reached]))
    return Text("\n").join(lines)


def goals_line(records: Sequence[Record]) -> str:
    """How many goals were reached; empty where there are none."""
    verdicts = [verdict for record in records for verdict in record.verdicts.values()]
    return f"{sum(verdicts)} of {len(verdicts)} goals reached" if verdicts else ""


def missed_line(record: Record) -> str:
    """The goals of a record that were missed, and by how much."""
    missed = (name for name, reached in record.verdicts.items() if not reached)
    words = (f"{heading(name)} is {cell(name, record.metrics)}, goal {record.goals[name]}" for name in missed)
    return f"missed: {record.suite}, {label(record.case)}: {'; '.join(words)}"


@contextmanager
def progress(console: Console) -> Iterator[ProgressCall]:
    """A progress bar with the time left, as a function for `run_suite`. It vanishes when it is done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)

        def update(done_s: float, total_s: float, label: str) -> None:
            bar.update(task, completed=done_s, total=max(total_s, 1e-9), description=label[:48])

        yield update

"""`compare`: two result files beside each other."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from cuattn.benchmark import Report, from_json, tables
from cuattn.benchmark import compare as comparing
from cuattn.benchmark.compare import Change
from cuattn.benchmark.grids import Cell, Grid, Part
from cuattn.benchmark.results import BenchmarkError

from .output import emit, format_option

_STYLES = {"slower": "bold red", "changed": "bold red", "failed": "bold red", "missing": "bold red", "faster": "green"}
_QUIET = ("equal",)


class Share(click.ParamType):
    """A part of something: ``5%`` or ``0.05``."""

    name = "SHARE"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        text = str(value)
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share < float("inf"):
            self.fail(f"{value!r} is no share, such as 5% or 0.05", parameter, context)
        return share


def read(path: Path) -> Report:
    """Read a file of results, or say in a line why it is none."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise click.ClickException(f"{path} is no file of results: it is no text") from error
    except (OSError, BenchmarkError) as error:
        raise click.ClickException(f"{path}: {error}") from error


@click.command()
@click.argument("old", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--threshold", type=Share(), default="5%", show_default=True, help="What a time may be longer.")
@click.option("--fail", is_flag=True, help="Exit with status 1 if anything is slower, changed, failed or missing.")
@click.option("--any-machine", is_flag=True, help="Compare files of different machines and executors.")
@click.option("--all", "everything", is_flag=True, help="List counters that are equal too.")
@format_option
def compare(old: Path, new: Path, threshold: float, fail: bool, any_machine: bool, everything: bool, form: str) -> None:
    """Compare two result files: times with their intervals, counters exactly.

    OLD and NEW are files of `cuattn-bench run --json`. The ratio is that of the medians, NEW over OLD, with its 95 %
    interval by bootstrap over the samples in the files. A time is slower when the whole interval lies above the
    threshold, faster when it lies below, alike when it lies within, else unclear: measure longer. What drifts between
    two runs, the clock of a GPU or other programs, is in no interval. Files of different machines or executors are
    refused.

    \b
    Examples:
      cuattn-bench compare before.json after.json
      cuattn-bench compare before.json after.json --threshold 3% --fail
      cuattn-bench compare a.json b.json --any-machine --all --format csv
    """
    before, after = read(old), read(new)
    if not any_machine:
        try:
            comparing.require_same_machine(before, after)
        except BenchmarkError as error:
            raise click.ClickException(f"{error}; --any-machine compares them all the same") from error
    changes = comparing.compare(before, after, threshold=threshold)
    counts = Counter(change.verdict for change in changes)
    shown = [change for change in changes if everything or change.verdict not in _QUIET]
    parts: list[Part] = [grid(shown, short=form in ("table", "markdown"))]
    parts += [Text(line, "dim") for line in comparing.changed_versions(before, after)]
    parts.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "nothing to compare")
    emit(parts, form)
    if not changes:
        raise click.ClickException("the files have no case in common")
    if fail and any(change.verdict in comparing.BAD for change in changes):
        raise click.exceptions.Exit(1)


def grid(changes: list[Change], *, short: bool = False) -> Grid:
    """A line for each metric; `short` leaves out who was timed, if that is but one, and a suite that the case names."""
    columns: tuple[str, ...] = ("case", "by", "metric", "old", "new", "ratio", "95 % of ratios", "verdict")
    rows: list[tuple[Cell, ...]] = [
        (
            _case(change, short),
            change.provider,
            tables.heading(change.metric),
            change.old if change.old is not None else "",
            change.new if change.new is not None else "",
            change.ratio if change.ratio is not None else "",
            "" if change.interval is None else f"{change.interval[0]:.3g} to {change.interval[1]:.3g}",
            Text(change.verdict, _STYLES.get(change.verdict, "")),
        )
        for change in changes
    ]
    if short and len({change.provider for change in changes}) <= 1:
        columns, rows = (columns[0], *columns[2:]), [(row[0], *row[2:]) for row in rows]
    return Grid("new over old", columns, rows, keys=columns.index("metric") + 1)


def _case(change: Change, short: bool) -> str:
    """The suite and the case; in short the case alone, where that begins with the name of the suite."""
    label = tables.label(change.case)
    return label if short and label.split(" ")[0] == change.suite else f"{change.suite}: {label}"

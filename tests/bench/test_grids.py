"""Tables lose nothing, however wide the terminal is, and say the same in every form."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from cuattn.benchmark import Record, Report, tables
from cuattn.benchmark.grids import FORMATS, Cell, Grid, show, text_of, write

WORDS = st.text("abcdefgh_0123456789", min_size=1, max_size=30)
SENTENCES = st.lists(WORDS, min_size=1, max_size=6).map(" ".join)
CELLS = st.one_of(st.integers(0, 10**9), st.floats(0, 1e6), SENTENCES, st.none(), st.just(""))


@st.composite
def some_grids(draw: st.DrawFn) -> Grid:
    width = draw(st.integers(1, 12))
    names = draw(st.lists(SENTENCES, min_size=width, max_size=width, unique=True))
    rows = draw(st.lists(st.lists(CELLS, min_size=width, max_size=width), min_size=1, max_size=8))
    return Grid(draw(SENTENCES), names, rows, keys=draw(st.integers(1, min(2, width))))


def printed(parts: list, width: int, *, terminal: bool = True, form: str = "table") -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None, legacy_windows=False)
    write(console, parts, form)
    return file.getvalue()


@settings(max_examples=40)
@given(some_grids(), st.integers(20, 200))
def test_every_word_and_number_is_there(grid: Grid, width: int) -> None:
    text = printed([grid], width)
    named = [grid.columns] if "┃" in text else []  # a list names a value where there is one
    words = {word for row in [*named, *grid.rows] for cell in row for word in text_of(cell).split()}
    tokens = set(text.replace("│", " ").replace("┃", " ").replace(": ", " ").split())
    assert words <= tokens


@settings(max_examples=40)
@given(some_grids(), st.integers(30, 200))
def test_tables_fit_and_lists_begin_with_their_keys(grid: Grid, width: int) -> None:
    lines = printed([grid], width).splitlines()[1:]
    framed = [line for line in lines if line and line[0] in "┏┃┡│└"]
    assert all(len(line) <= width for line in framed)
    if not framed:
        keys = ["  ".join(text_of(cell) for cell in row[: grid.keys]).rstrip() for row in grid.rows]
        assert [line.rstrip() for line in lines[::2]] == keys


@settings(max_examples=40)
@given(some_grids())
def test_without_a_terminal_a_row_is_a_line(grid: Grid) -> None:
    lines = printed([grid], 20, terminal=False).splitlines()
    assert len(lines) == 2 + len(grid.rows)
    for row, line in zip(grid.rows, lines[2:], strict=True):
        assert " ".join(text_of(cell) for cell in row).split() == line.split()


@settings(max_examples=40)
@given(some_grids())
def test_csv_keeps_values_and_markdown_texts(grid: Grid) -> None:
    names, *rows = csv.reader(io.StringIO(printed([grid], 20, form="csv")))
    assert names == list(grid.columns)
    assert rows == [["" if cell is None else str(cell) for cell in row] for row in grid.rows]
    table = printed([grid], 20, form="markdown").splitlines()[2:]
    cells = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in table if " | " in line]
    if len(grid.columns) > 1:
        assert cells[2:] == [[text_of(cell) for cell in row] for row in grid.rows]


def wide(rows: int) -> Grid:
    names = ["case", *(f"metric{i} of something" for i in range(12))]
    return Grid("wide", names, [[f"case {row}", *range(10**6, 10**6 + 12)] for row in range(rows)])


def test_a_wide_table_with_few_rows_is_turned_and_with_many_split() -> None:
    turned = printed([wide(2)], 80)
    assert "part" not in turned and turned.count("┏") == 1
    assert "│ metric11 of something │ 1,000,011 │ 1,000,011 │" in turned
    split = printed([wide(9)], 80)
    assert "part 1 of 3" in split and split.count("case 3") == 3
    assert printed([wide(9)], 300).count("┏") == 1


def test_a_column_with_long_text_is_text_that_wraps() -> None:
    """It stands at the left and the table upright, though most of its values are numbers."""
    grid = Grid("", ("what", "value"), [("shape", "so many layers " * 9), ("parameters", 1_000_000), ("bytes", 2)])
    text = printed([grid], 80)
    assert "│ parameters │ 1,000,000 " in text and "│ bytes      │ 2 " in text
    assert max(map(len, text.splitlines())) <= 80


def test_parts_of_rows_that_are_called_alike_have_numbers() -> None:
    grid = wide(9)
    alike = Grid("alike", grid.columns, [["same", *row[1:]] for row in grid.rows])
    text = printed([alike], 80)
    assert text.count("│ 9 │ same") == text.count("┏") > 1
    assert text.count("alike") == 1


def test_what_is_too_wide_for_any_table_becomes_a_list() -> None:
    rows: list[list[Cell]] = [[f"{name * 90}", 12345, "now"] for name in "abcdefg"]
    text = printed([Grid("names", ("entry", "bytes", "made"), rows)], 80)
    assert text.splitlines()[1:3] == ["a" * 90, "  bytes: 12,345 · made: now"]


def report() -> Report:
    goals = {"time_us": "<= 20"}
    records = (
        Record("demo", "x_quick", {"time_us": 12.5}, executor="host", goals=goals),
        Record("demo", "x_slow", {"time_us": 2101.0, "samples": 3}, executor="host", goals=goals),
        Record("demo", "wrong", {}, "peer", error="no"),
    )
    return Report({}, records, "", 0.0)


@pytest.mark.parametrize("width", [30, 80, 200])
@pytest.mark.parametrize("terminal", [True, False])
def test_goals_differ_in_words(width: int, terminal: bool) -> None:
    file = io.StringIO()
    tables.show(report(), Console(file=file, width=width, force_terminal=terminal, color_system=None))
    text = " ".join(file.getvalue().replace("│", " ").split())
    assert "reached: <= 20" in text and "missed: <= 20" in text
    assert "2,101" in text and "1 of 2 goals reached" in text
    assert "missed: demo, x slow: time, µs is 2,101, goal <= 20" in text
    assert "samples" not in text
    assert "demo, wrong, peer: no" in text


def test_the_flat_table_has_every_metric_and_error() -> None:
    rows = list(csv.DictReader(io.StringIO(tables.flat(report()).csv())))
    assert [row["samples"] for row in rows] == ["", "3", ""]
    assert [row["goals"] for row in rows] == ["reached: <= 20", "missed: <= 20", ""]
    assert rows[2]["error"] == "no" and rows[1]["time_us"] == "2101.0"
    full = tables.parts(report(), full=True)[0]
    assert isinstance(full, Grid) and "samples" in full.columns


def test_json_and_several_parts() -> None:
    grid = Grid("one", ("a", "b"), [(1, Text("x"))])
    assert json.loads(printed(["a line", grid], 20, form="json")) == {"one": [{"a": 1, "b": "x"}]}
    assert printed([grid, grid], 20, form="csv") == "a,b\n1,x\n\na,b\n1,x\n"
    assert printed([grid, "a line"], 20, form="markdown").endswith("| 1 | x |\n\na line\n")
    assert FORMATS == ("table", "csv", "markdown", "json")
    file = io.StringIO()
    show(Console(file=file, width=10), ["a line that is longer than the console"])
    assert file.getvalue() == "a line that is longer than the console\n"

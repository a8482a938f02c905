"""Tables that lose nothing: measured first, then laid out for the width there is, or written as CSV, Markdown or JSON.

On a terminal a table that is too wide wraps its words, is turned on its side, is split into several with the same first
columns, or becomes a list; nothing is ever cut off. Where the output is no terminal, lines are as long as they must be.

>>> grid = Grid("primes", ("n", "prime"), [(1, 2), (2, 3)])
>>> print(grid.plain())
primes
n  prime
1      2
2      3
>>> print(grid.csv(), end="")
n,prime
1,2
2,3
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["FORMATS", "Cell", "Grid", "Part", "show", "text_of", "write"]

Cell = bool | int | float | str | Text | None
FORMATS = ("table", "csv", "markdown", "json")
_READABLE = 24  # columns of text are not made narrower than this, nor than their longest word
_FRAME = 3  # columns of a terminal that each column of a table takes beside its text
_FEW_ROWS = 4  # that a table may have to be turned on its side


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: a title, names of columns, and rows of values. The first `keys` columns say what a row is about."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    keys: int = 1

    # --- text forms --------------------------------------------------------------------------------------------------

    def plain(self) -> str:
        """Aligned text without a frame: as wide as it must be."""
        texts = [list(self.columns), *self._texts()]
        widths = [max(cell_len(line) for row in texts for line in row[i].split("\n")) for i in range(len(self.columns))]
        numbers = self._numbers()
        lines = [self.title] if self.title else []
        for row in texts:
            cells = [
                " " * (width - cell_len(text)) + text if number else text + " " * (width - cell_len(text))
                for text, width, number in zip((text.replace("\n", "; ") for text in row), widths, numbers, strict=True)
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def csv(self) -> str:
        """Comma-separated values, numbers as they are; the first line names the columns."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([str(value) if isinstance(value, Text) else value for value in row] for row in self.rows)
        return file.getvalue()

    def markdown(self) -> str:
        """A table of Markdown below its title."""
        rule = ["---:" if number else "---" for number in self._numbers()]
        rows = [list(self.columns), rule, *self._texts()]
        lines = [f"| {' | '.join(map(_escaped, row))} |" for row in rows]
        return "\n".join([f"**{self.title}**", "", *lines] if self.title else lines)

    def entries(self) -> list[dict[str, Any]]:
        """A mapping for each row, for JSON."""
        return [
            {
                name: str(value) if isinstance(value, Text) else value
                for name, value in zip(self.columns, row, strict=True)
            }
            for row in self.rows
        ]

    # --- on a terminal -----------------------------------------------------------------------------------------------

    def layout(self, width: int) -> Iterator[Table | Text]:
        """What to print so that it fits into so many columns of a terminal."""
        yield from [Text(self.title, "bold italic")] * bool(self.title)
        groups = self._groups(width)
        if (groups is None or len(groups) > 1) and len(self.rows) <= _FEW_ROWS:
            turned = self._turned()
            turned_groups = turned._groups(width)
            if turned_groups is not None and len(turned_groups) == 1:
                yield turned._table(turned_groups[0])
                return
        if groups is None:
            yield from self._listed()
            return
        if len(groups) > 1 and len({tuple(row[: self.keys]) for row in self._texts()}) < len(self.rows):
            numbered = self._numbered()
            yield from (
                self._listed() if numbered._groups(width) is None else numbered.layout(width)
            )  # nothing else would say which rows of the parts are the same
            return
        for index, group in enumerate(groups):
            if len(groups) > 1:
                yield Text(f"part {index + 1} of {len(groups)}", "dim")
            yield self._table(group)

    def _groups(self, width: int) -> list[dict[int, int]] | None:
        """Columns of each table with their widths, which fit; None where one column and the keys are too wide."""
        natural, least = self._widths()
        everything = range(len(self.columns))
        room = width - 1
        keys = list(range(min(self.keys, len(self.columns))))
        groups: list[list[int]] = [keys[:]]
        for column in everything[len(keys) :]:
            if sum(least[i] + _FRAME for i in (*groups[-1], column)) > room and groups[-1] != keys:
                groups.append(keys[:])
            groups[-1].append(column)
        if any(sum(least[i] + _FRAME for i in group) > room for group in groups):
            return None
        return [_spread(group, natural, least, room - _FRAME * len(group)) for group in groups]

    def _widths(self) -> tuple[list[int], list[int]]:
        """The widths that columns want, and the least that break neither a number nor a word."""
        natural, least = [], []
        rows = self._texts()
        for i, (name, number) in enumerate(zip(self.columns, self._numbers(), strict=True)):
            texts = [row[i] for row in rows]
            wide = max((cell_len(line) for text in texts for line in text.split("\n")), default=0)
            words = max((cell_len(word) for text in texts for word in text.split()), default=0)
            of_name = max(map(cell_len, name.split()), default=0)
            natural.append(max(wide, cell_len(name)))
            least.append(max(of_name, wide if number else max(words, min(wide, _READABLE))))
        return natural, least

    def _turned(self) -> Grid:
        """The table with rows and columns exchanged."""
        first, rest = " ".join(self.columns[: self.keys]), self.columns[self.keys :]
        names = (first, *(" ".join(text_of(cell) for cell in row[: self.keys]) for row in self.rows))
        rows = [(name, *(row[self.keys + i] for row in self.rows)) for i, name in enumerate(rest)]
        return Grid(self.title, names, rows)

    def _numbered(self) -> Grid:
        """The table with a number before each row; without its title, which stands there already."""
        rows = [(index, *row) for index, row in enumerate(self.rows, 1)]
        return Grid("", ("#", *self.columns), rows, self.keys + 1)

    def _table(self, group: dict[int, int]) -> Table:
        table = Table()
        numbers = self._numbers()
        for i, width in group.items():
            justify: Any = "right" if numbers[i] else "left"
            table.add_column(Text(self.columns[i]), justify=justify, width=width, overflow="fold")
        for row in self.rows:
            cells = (row[i] for i in group)
            table.add_row(*(value if isinstance(value, Text) else Text(text_of(value)) for value in cells))
        return table

    def _listed(self) -> Iterator[Text]:
        """Each row as its keys in a line, and below it the other values with their names."""
        for row in self._texts():
            yield Text("  ".join(row[: self.keys]), "bold")
            pairs = zip(self.columns[self.keys :], row[self.keys :], strict=True)
            named = [f"{name}: {text}" for name, text in pairs if text]
            yield Text("  " + " · ".join(named))

    # --- cells -------------------------------------------------------------------------------------------------------

    def _texts(self) -> list[list[str]]:
        return [[text_of(value) for value in row] for row in self.rows]

    def _numbers(self) -> list[bool]:
        """Whether each column holds numbers, or mostly and no long text, which may wrap: these stand at the right."""
        result = []
        for i in range(len(self.columns)):
            values = [row[i] for row in self.rows if row[i] not in ("", None)]
            numbers = sum(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
            sentences = any(cell_len(text_of(value)) > _READABLE for value in values if isinstance(value, str))
            result.append(2 * numbers > len(values) and not sentences)
        return result


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "; ")


def _spread(group: Sequence[int], natural: Sequence[int], least: Sequence[int], room: int) -> dict[int, int]:
    """Give columns their least widths, and what is left in equal parts to those that want more."""
    widths = {i: max(1, least[i]) for i in group}
    left = room - sum(widths.values())
    while left > 0 and (narrow := [i for i in group if widths[i] < natural[i]]):
        for i in narrow[:left]:
            widths[i] += 1
        left -= min(left, len(narrow))
    return widths


def text_of(value: Cell) -> str:
    """A value as people read it: thousands apart, three significant digits of what is not whole, – for None."""
    if value is None:
        return "–"
    if isinstance(value, Text):
        return value.plain
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


Part = Grid | Text | str


def show(console: Console, parts: Iterable[Part]) -> None:
    """Print tables and lines: laid out for a terminal; plain, with lines of any length, where there is none."""
    for index, part in enumerate(parts):
        if not isinstance(part, Grid):
            console.print(part, soft_wrap=True, markup=False, highlight=False)
        elif console.is_terminal:
            for piece in part.layout(console.width):
                lines = isinstance(piece, Text)
                console.print(piece, soft_wrap=lines, markup=False, highlight=False)
        else:
            console.print(("\n" if index else "") + part.plain(), soft_wrap=True, markup=False, highlight=False)


def write(console: Console, parts: Sequence[Part], form: str = "table") -> None:
    """Print tables in one of `FORMATS`. CSV and JSON hold the tables only, Markdown the lines as well."""
    if form == "table":
        show(console, parts)
        return
    grids = [part for part in parts if isinstance(part, Grid)]
    if form == "csv":
        text = "\n".join(grid.csv() for grid in grids)
    elif form == "json":
        text = json.dumps({grid.title: grid.entries() for grid in grids}, indent=1, ensure_ascii=False) + "\n"
    else:
        text = "\n\n".join(part.markdown() if isinstance(part, Grid) else str(part) for part in parts) + "\n"
    console.print(text, end="", soft_wrap=True, markup=False, highlight=False)

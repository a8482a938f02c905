"""The result file, the table on a terminal, and the page in the documentation."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import click
import numpy as np
from rich.table import Table

from bench.mutants.explained import EXPLAINED
from bench.mutants.runner import DISCARDED, KILLED, SURVIVED, Result
from bench.mutants.tests_of import ROOT
from cuattn.benchmark.results import write_text

PAGE = ROOT / "docs/mutants.md"
MARKERS = re.compile(r"(<!-- mutants -->\n).*?(<!-- end -->)", re.DOTALL)


def read(path: Path) -> dict[str, Result]:
    """Read a result file as a mapping from key to result; empty where there is no file."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["mutants"]
    return {row["key"]: Result(**row) for row in rows}


def to_json(results: dict[str, Result]) -> str:
    """Write results as text that `read` reads, one mutant a line."""
    rows = sorted(results.values(), key=lambda result: (result.file, result.line, result.operator, result.key))
    lines = ",\n".join(json.dumps(result.row(), ensure_ascii=False) for result in rows)
    return f'{{"mutants": [\n{lines}\n]}}\n'


def survivors(results: Iterable[Result]) -> list[Result]:
    """The mutants that no test noticed."""
    return [result for result in results if result.status == SURVIVED]


def explanation(result: Result) -> str:
    """Why a survivor is no fault of the tests; empty if nobody has said so."""
    for file, pattern, why in EXPLAINED:
        if file == result.file and re.search(pattern, f"{result.before} => {result.after}"):
            return why
    return ""


def counts(results: Iterable[Result]) -> list[tuple[str, int, int, int, int]]:
    """Count mutants file by file: file, killed, survived, of these explained, discarded."""
    found = list(results)
    lines = []
    for file in sorted({result.file for result in found}):
        mine = [result for result in found if result.file == file]
        status = Counter(result.status for result in mine)
        explained = [result for result in survivors(mine) if explanation(result)]
        lines.append((file, status[KILLED], status[SURVIVED], len(explained), status[DISCARDED]))
    return lines


def table(results: Iterable[Result]) -> Table:
    """The table of the counts for a terminal."""
    result = Table(title="mutants", title_justify="left")
    for heading in ("file", "killed", "survived", "explained", "discarded"):
        result.add_column(heading, justify="left" if heading == "file" else "right")
    lines = counts(results)
    for line in lines:
        result.add_row(*map(str, line))
    result.add_section()
    totals = np.array([line[1:] for line in lines]).reshape(-1, 4).sum(axis=0)
    result.add_row("all", *map(str, totals))
    return result


def markdown(results: Iterable[Result]) -> str:
    """The tables of the page: counts, then survivors with their explanations."""
    found = list(results)
    lines = ["| file | mutants | killed | survived | discarded |", "|---|---:|---:|---:|---:|"]
    total = np.zeros(4, int)
    for file, killed, alive, _, discarded in counts(found):
        numbers = (killed + alive, killed, alive, discarded)
        total += numbers
        lines.append(f"| `{file}` | {' | '.join(map(str, numbers))} |")
    lines.append(f"| all | {' | '.join(map(str, total))} |")
    lines += ["", f"{100 * total[1] / max(1, total[0]):.1f} % of the mutants died.", ""]
    lines += ["| survivor | before | after | why it lives |", "|---|---|---|---|"]
    for result in sorted(survivors(found), key=lambda result: (result.file, result.line, result.after)):
        cells = [f"`{result.file}:{result.line}`", f"`{result.before}`", f"`{result.after}`", explanation(result)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def with_table(page: str, results: dict[str, Result]) -> str:
    """`page` with the tables between its markers."""
    if not MARKERS.search(page):
        raise click.ClickException("the page has no markers for the table")
    text = markdown(results.values())
    return MARKERS.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page)


def write_page(results: dict[str, Result]) -> None:
    """Put the tables into the page."""
    write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8"), results))

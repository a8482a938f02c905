"""Everything that can be measured without a GPU, as a result file and as a table in the documentation.

python -m bench.host_figures            measure: write bench/results/host.json and the table made from it
python -m bench.host_figures --page     write the table anew from the file that is there
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console

from cuattn.benchmark import Record, Report, from_json, run_suite, tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/host.json"
PAGE = ROOT / "docs/benchmarks.md"
MARKERS = re.compile(r"(<!-- figures:host -->\n).*?(<!-- end -->)", re.DOTALL)

Row = tuple[str, str, str, str]  # what, figure, goal, how


def rows(report: Report) -> Iterator[Row]:
    """What has a goal, the speed of the host executor, and the compilations in brief."""
    for record in report.records:
        if record.suite in ("latency", "host"):
            for metric in record.goals or ("gflop_per_s",):
                value = tables.cell(metric, record.metrics)
                yield _what(record, metric), value, record.goals.get(metric, ""), record.method
    yield from compile_rows([record for record in report.records if record.suite == "compile"])


def _what(record: Record, metric: str) -> str:
    case = record.case.removesuffix("_unchecked")
    attention, _, check = case.partition("_check_")
    checked = f", checkers: {check}" if check else ""
    return f"{tables.label(attention).replace('_', ' ')}{checked}: {tables.heading(metric)}"


def compile_rows(records: list[Record]) -> Iterator[Row]:
    """The slowest variant of those that have a limit, and the spills of all."""
    limited = [record for record in records if "nvrtc_ms" in record.goals]
    for kind, found in (
        ("CUBIN", [record for record in limited if "registers" in record.metrics]),
        ("PTX", [record for record in limited if "ptx_lines" in record.metrics]),
    ):
        slowest = max(found, key=lambda record: float(str(record.metrics["nvrtc_ms"])))
        what = f"NVRTC, source to {kind}, slowest of {len(found)} variants with D up to 128: ms"
        yield what, tables.cell("nvrtc_ms", slowest.metrics), slowest.goals["nvrtc_ms"], slowest.method
    spills = [int(str(record.metrics["spill_bytes"])) for record in records if "spill_bytes" in record.metrics]
    yield f"register spills, all {len(spills)} kernels on sm_80 and sm_90a: bytes", str(sum(spills)), "== 0", "ptxas"


def table(report: Report) -> str:
    """Markdown: where and when, then a line a figure."""
    found = report.environment
    lines = [
        f"{found['cpu']}, {found['host_threads']} threads, {found['host_isa']}; NVRTC {found['nvrtc']}, "
        f"Python {found['python']}, NumPy {found['numpy']}; {report.created[:10]}",
        "",
        "| figure | measured | goal | how |",
        "|---|---:|---|---|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in rows(report)]
    return "\n".join(lines)


def with_table(page: str, report: Report) -> str:
    """`page` with the table between its markers."""
    if not MARKERS.search(page):
        raise click.ClickException("the page has no markers for the table")
    return MARKERS.sub(lambda match: f"{match[1]}{table(report)}\n{match[2]}", page)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--page", is_flag=True, help="Do not measure: only write the table anew.")
def main(page: bool) -> None:
    """Run the suite `figures` and write its results. The machine should be otherwise idle.

    \b
    Examples:
      python -m bench.host_figures
      python -m bench.host_figures --page
    """
    if page:
        report = from_json(RESULTS.read_text(encoding="utf-8"))
    else:
        console = Console()
        with tables.progress(console) as progress:
            report = run_suite(["figures"], progress=progress)
        console.print(tables.summary(report))
        if report.failures:  # half a result is none
            raise click.ClickException("a measurement failed; nothing is written")
        report.write(RESULTS)
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), report), encoding="utf-8")


if __name__ == "__main__":
    main(prog_name="python -m bench.host_figures")

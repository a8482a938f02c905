"""Everything that can be measured without a GPU, as a result file and as tables in the documentation.

python -m bench.host_figures                  measure: write bench/results/host.json and the tables made from it
python -m bench.host_figures --only options   measure one suite anew, keep the records of the others
python -m bench.host_figures --page           write the tables anew from the file that is there
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from cuattn.benchmark import Options, Record, Report, from_json, run_suite, tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/host.json"
PAGE = ROOT / "docs/benchmarks.md"
MARKERS = re.compile(r"(<!-- figures:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
SUITE_NAMES = ("latency", "host", "counters", "options", "gradients", "seed", "compile")  # those of the suite `figures`

Row = tuple[str, str, str, str]  # what, figure, goal, how


def rows(report: Report) -> Iterator[Row]:
    """Records of what has a goal, of the speed of the host executor, and of compilations in brief."""
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
    """Records of the slowest variant among those that have a limit, and of the spills of all."""
    limited = [record for record in records if "nvrtc_ms" in record.goals]
    for kind, found in (
        ("CUBIN", [record for record in limited if "registers" in record.metrics]),
        ("PTX", [record for record in limited if "ptx_lines" in record.metrics]),
    ):
        slowest = max(found, key=lambda record: float(str(record.metrics["nvrtc_ms"])))
        what = f"NVRTC, source to {kind}, slowest of {len(found)} plain and causal variants with D up to 128: ms"
        yield what, tables.cell("nvrtc_ms", slowest.metrics), slowest.goals["nvrtc_ms"], slowest.method
    spills = [int(str(record.metrics["spill_bytes"])) for record in records if "spill_bytes" in record.metrics]
    yield f"register spills, all {len(spills)} kernels on sm_80 and sm_90a: bytes", str(sum(spills)), "== 0", "ptxas"


def table(report: Report) -> str:
    """Return a Markdown table: where and when, then one line for each figure."""
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


def option_table(report: Report) -> str:
    """Return a Markdown table of what each option costs."""
    lines = ["| option | warp instructions | ratio | mma | global reads, bytes |", "|---|---:|---:|---:|---:|"]
    for record in report.records:
        if record.suite == "options":
            names = ("warp_instructions", "ratio", "mma", "global_read_bytes")
            cells = [tables.label(record.case), *(tables.cell(name, record.metrics) for name in names)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gradient_table(report: Report) -> str:
    """Return a Markdown table of the backward beside its forward, in a fixed order / in any where these differ."""
    names = ("warp_instructions", "over_forward", "order_free_over_forward", "mma", "mma_over_forward")
    more = ("order_free_mma_over_forward", "global_read_bytes", "workspace_bytes", "order_free_workspace_bytes")
    lines = [
        "| backward | warp instructions | over forward | any order | mma | over forward | any order "
        "| global reads, bytes | workspace, bytes | any order | N × M, bytes |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for record in report.records:
        if record.suite == "gradients" and "over_forward" in record.metrics:
            cells = (tables.cell(name, record.metrics) for name in (*names, *more, "logits_bytes"))
            lines.append(f"| {tables.label(record.case)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def workspace_table(report: Report) -> str:
    """Return a Markdown table of the backward's memory beside the matrices that it does not store."""
    names = ("workspace_bytes", "order_free_workspace_bytes", "logits_bytes")
    lines = ["| problem | workspace, bytes | any order | N × M, bytes |", "|---|---:|---:|---:|"]
    for record in report.records:
        if "workspace_over_logits" in record.metrics:
            cells = [tables.label(record.case), *(tables.cell(name, record.metrics) for name in names)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def seed_table(report: Report) -> str:
    """Return a Markdown table of memory and time, fused beside unfused."""
    names = ("flash_memory_bytes", "standard_memory_bytes", "saved_percent", "published_percent")
    times = ("flash_time_us", "standard_time_us")
    lines = [
        "| problem | fused: bytes | unfused: bytes | saved, % | published, % | fused: ms | unfused: ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for record in report.records:
        if record.suite == "seed":
            cells = [tables.label(record.case), *(tables.cell(name, record.metrics) for name in names)]
            cells += [f"{float(str(record.metrics[name])) / 1e3:,.0f}" for name in times]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {
    "host": table,
    "options": option_table,
    "gradients": gradient_table,
    "workspace": workspace_table,
    "seed": seed_table,
}


def with_table(page: str, report: Report) -> str:
    """`page` with each table between its markers."""
    if {match[2] for match in MARKERS.finditer(page)} != set(TABLES):
        raise click.ClickException("the page has no markers for a table")
    return MARKERS.sub(lambda match: f"{match[1]}{TABLES[match[2]](report)}\n{match[3]}", page)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--page", is_flag=True, help="Do not measure: only write the tables anew.")
@click.option("--only", multiple=True, type=click.Choice(SUITE_NAMES), help="Measure this suite, keep the others.")
def main(page: bool, only: tuple[str, ...]) -> None:
    """Run the suite `figures` and write its results. The machine should be otherwise idle.

    \b
    Examples:
      python -m bench.host_figures
      python -m bench.host_figures --only options --only seed
      python -m bench.host_figures --page
    """
    if page:
        report = from_json(RESULTS.read_text(encoding="utf-8"))
    else:
        console = Console()
        with tables.progress(console) as progress:
            report = run_suite(only or ["figures"], options=Options(executor="host"), progress=progress)
        tables.show(report, console)
        if report.failures:  # half a result is none
            raise click.ClickException("a measurement failed; nothing is written")
        if only:
            report = merged(from_json(RESULTS.read_text(encoding="utf-8")), report)
        report.write(RESULTS)
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), report), encoding="utf-8")


def merged(old: Report, new: Report) -> Report:
    """`old` with the records of the suites in `new` replaced; where and when stay those of the old one."""
    suites = {record.suite for record in new.records}
    records = [record for record in (*old.records, *new.records) if record in new.records or record.suite not in suites]
    records.sort(key=lambda record: SUITE_NAMES.index(record.suite))
    return replace(old, records=tuple(records))


if __name__ == "__main__":
    main(prog_name="python -m bench.host_figures")

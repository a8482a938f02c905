"""`inspect`: the machine code of kernels, counted, and how fast it could be at best."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click
from rich.console import Console
from rich.table import Table

from cuattn import compile
from cuattn.benchmark import inspected, tables
from cuattn.compile import arch as archs
from cuattn.compile import sass
from cuattn.compile.sass import KernelReport
from cuattn.compile.sass.bound import UNIT_OF
from cuattn.errors import ArgumentError
from cuattn.ops.registry import Variant

LEGEND = (
    "all, matrix, exp2: instructions of a warp in an iteration of the main loop. TFLOP/s: at most, everything "
    "overlapped; alone: without overlap. TB/s: what the loop's own loads and stores can ask memory for."
)


@click.command()
@click.argument("names", nargs=-1, metavar="[KERNEL[/ROW]]...")
@click.option("--arch", type=click.Choice(archs.names()), default="sm_90a", show_default=True, help="Compile for this.")
@click.option(
    "--clock",
    "clock_ghz",
    type=click.FloatRange(min=0, min_open=True),
    default=sass.CLOCK_GHZ,
    show_default=True,
    help="GHz that bounds are for.",
)
@click.option(
    "--sms",
    "num_sms",
    type=click.IntRange(min=1),
    default=sass.NUM_SMS,
    show_default=True,
    help="Multiprocessors that bounds are for.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def inspect(names: tuple[str, ...], arch: str, clock_ghz: float, num_sms: int, as_json: bool) -> None:
    """Count the instructions of kernels, and say how fast these could be.

    At best, on an H200; nothing runs. KERNEL is a kernel file, ROW one of the constants it is compiled with; * stands
    for anything. Without a name, the names are listed. One kernel is shown in full, several in a line each. Bounds are
    for compute capability 9.0; what they mean is in docs/inspection.md. Needs nvdisasm: pip install
    nvidia-cuda-nvdisasm.

    \b
    Examples:
      cuattn-bench inspect
      cuattn-bench inspect attention_forward
      cuattn-bench inspect 'attention_forward/float16_d128_128x32*_plain'
      cuattn-bench inspect rope --arch sm_80 --json
    """
    console = Console()
    if not names:
        listing(console, as_json)
        return
    found = []
    chosen = inspected.choose(names)
    with tables.progress(Console(stderr=True)) as progress:
        for done, one in enumerate(chosen):
            progress(done, len(chosen), one.name)
            found += [(one, report) for report in reports(one, arch, clock_ghz, num_sms)]
    if as_json:
        rows = [{"name": one.name, "constants": dict(one.constants), **report.to_dict()} for one, report in found]
        click.echo(json.dumps({"clock_ghz": clock_ghz, "num_sms": num_sms, "kernels": rows}, indent=1))
    elif len(chosen) == 1:
        for one, report in found:
            show(console, one, report, clock_ghz, num_sms)
    else:
        _print(console, _assumed(found[0][1], clock_ghz, num_sms), LEGEND, *summary(found))


def reports(one: Variant, arch: str, clock_ghz: float, num_sms: int) -> list[KernelReport]:
    """Reports of every kernel of one file."""
    if one.arch not in ("", arch):
        raise ArgumentError(f"{one.kernel} is for {one.arch} and cannot be compiled for {arch}")
    binary = compile.build(one.kernel, one.constants, arch=arch, kind="cubin")
    return list(sass.inspect(binary, clock_ghz=clock_ghz, num_sms=num_sms).values())


def listing(console: Console, as_json: bool) -> None:
    """The names of what can be inspected."""
    names = [one.name for one in inspected.everything()]
    if as_json:
        click.echo(json.dumps(names, indent=1))
        return
    table = Table(title="kernels that can be inspected", title_justify="left")
    table.add_column("kernel", no_wrap=True)
    table.add_column("rows", justify="right")
    table.add_column("for example", overflow="fold")
    rows: dict[str, list[str]] = {}
    for one in inspected.everything():
        rows.setdefault(one.kernel, []).append(one.row)
    for kernel, labels in rows.items():
        table.add_row(kernel, str(len(labels)), f"{kernel}/{labels[0]}")
    console.print(table)


def summary(found: list[tuple[Variant, KernelReport]]) -> Iterator[Table]:
    """A table for each kernel: a line a row with its figures and those of its main loop. Empty columns are left out."""
    for kernel in dict.fromkeys(one.kernel for one, _ in found):
        lines = [_line(one, report) for one, report in found if one.kernel == kernel]
        table = Table(title=kernel, title_justify="left")
        table.add_column("row", overflow="fold")
        headings = [heading for heading in lines[0] if heading != "row" and any(line[heading] for line in lines)]
        for heading in headings:
            left = heading in ("entry", "remarks", "limit")
            table.add_column(heading, justify="left" if left else "right", no_wrap=True)
        for line in lines:
            table.add_row(line["row"], *(line[heading] for heading in headings))
        yield table


def _line(one: Variant, report: KernelReport) -> dict[str, str]:
    loop, used, bound = report.main, report.resources, report.main.bound
    counts = loop.counts
    return {
        "row": one.row,
        "entry": "" if report.entry == f"cuattn_{one.kernel}" else report.entry.removeprefix("cuattn_"),
        "regs": "" if used is None else str(used.registers),
        "spills": "" if used is None else str(used.spill_stores + used.spill_loads),
        "remarks": " ".join(dict.fromkeys(note.code for note in report.notes)),
        "all": str(loop.instructions),
        "matrix": _number(counts.get("wgmma", 0) + counts.get("mma", 0)),
        "exp2": _number(counts.get("exp2", 0)),
        "limit": "" if bound is None else bound.limit,
        "TFLOP/s": "" if bound is None else _speed(bound.tflop_per_s),
        "alone": "" if bound is None else _speed(bound.tflop_per_s_alone),
        "TB/s": "" if bound is None else _speed(bound.tb_per_s),
    }


def show(console: Console, one: Variant, report: KernelReport, clock_ghz: float, num_sms: int) -> None:
    """Show everything about one kernel."""
    lines = [f"{one.name}: {report.entry} for {report.arch}, {report.instructions} instructions"]
    if (used := report.resources) is not None:
        spilled = used.spill_stores + used.spill_loads
        lines.append(f"{used.registers} registers, {spilled} bytes of spills, {used.stack_bytes} bytes of stack")
    lines.append(f"{report.local_accesses} loads and stores of local memory")
    for way, registers in report.setmaxnreg.items():
        if registers:
            lines.append(f"setmaxnreg: {way} to {', '.join(map(str, registers))} registers")
    if report.bulk:
        lines.append(f"bulk copies in the code: {_counted(report.bulk)}")
    lines += [f"ptxas: ({note.code}) {note.text}" for note in report.notes] or ["ptxas: no remarks on speed"]
    what = "one iteration of each loop that does them" if report.looped else "begin to end, as no loop does them"
    lines.append(f"instructions of a warp, counted for {report.work}: {what}")
    _print(console, *lines, _instructions(report), _assumed(report, clock_ghz, num_sms))
    if report.main.bound is not None:
        console.print(_units(report))


def _print(console: Console, *parts: str | Table) -> None:
    for part in parts:
        console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))


def _instructions(report: KernelReport) -> Table:
    """Table of the kinds of instructions, a column a loop."""
    table = Table()
    table.add_column("", no_wrap=True)
    for loop in report.loops:
        table.add_column(f"{loop.first:#x}–{loop.last:#x}", justify="right")
    for kind in dict.fromkeys(kind for loop in report.loops for kind in loop.counts):
        unit = f" ({UNIT_OF[kind]})" if UNIT_OF.get(kind, kind) != kind else ""
        table.add_row(kind.replace("_", " ") + unit, *(_number(loop.counts.get(kind, 0)) for loop in report.loops))
    table.add_row("all", *(str(loop.instructions) for loop in report.loops), end_section=True)
    for opcode in dict.fromkeys(opcode for loop in report.loops for opcode in loop.matrix):
        table.add_row(opcode, *(_number(loop.matrix.get(opcode, 0)) for loop in report.loops))
    if any(loop.matrix_groups for loop in report.loops):
        table.add_row("wgmma groups, waits", *(f"{loop.matrix_groups}, {loop.matrix_waits}" for loop in report.loops))
    if any(loop.global_bytes for loop in report.loops):
        table.add_row("global memory, bytes", *(f"{loop.global_bytes:,.0f}" for loop in report.loops))
    return table


def _units(report: KernelReport) -> Table:
    """Table of the cycles that each unit is busy for a warp, and the bounds, a column a loop."""
    table = Table()
    table.add_column("cycles of", no_wrap=True)
    bounds = [loop.bound for loop in report.loops if loop.bound is not None]
    for loop in report.loops:
        table.add_column(f"{loop.first:#x}–{loop.last:#x}", justify="right")
    for unit in dict.fromkeys(unit for one in bounds for unit in one.cycles):
        table.add_row(unit, *(_number(round(one.cycles.get(unit, 0))) for one in bounds))
    table.add_row("limited by", *(one.limit for one in bounds))
    for heading, speeds in (
        ("TFLOP/s at most", [one.tflop_per_s for one in bounds]),
        ("TFLOP/s without overlap", [one.tflop_per_s_alone for one in bounds]),
        ("TB/s asked for at most", [one.tb_per_s for one in bounds]),
    ):
        if any(speeds):
            table.add_row(heading, *map(_speed, speeds))
    return table


def _assumed(report: KernelReport, clock_ghz: float, num_sms: int) -> str:
    if report.main.bound is None:
        return f"{report.arch}: rates are known for compute capability 9.0 only, so there are no bounds"
    return f"bounds for {num_sms} multiprocessors of compute capability 9.0 at {clock_ghz:g} GHz; not measured"


def _counted(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in numbers.items())


def _number(value: int) -> str:
    return f"{value:,}" if value else ""


def _speed(value: float | None) -> str:
    if not value:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

"""`inspect`: the machine code of kernels, counted, and how fast it could be at best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

from cuattn import compile
from cuattn.benchmark import inspected
from cuattn.benchmark.grids import Cell, Grid, Part
from cuattn.compile import arch as archs
from cuattn.compile import sass
from cuattn.compile.sass import KernelReport, LoopReport
from cuattn.compile.sass.bound import UNIT_OF
from cuattn.errors import ArgumentError
from cuattn.ops.registry import Variant

from .output import emit, format_option, progress

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
@format_option
def inspect(names: tuple[str, ...], arch: str, clock_ghz: float, num_sms: int, form: str) -> None:
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
    if not names:
        everything = inspected.everything()
        emit([listing(everything)], form, [one.name for one in everything])
        return
    found = []
    try:
        chosen = inspected.choose(names)
    except ArgumentError as error:
        raise click.BadParameter(str(error), param_hint="KERNEL") from error
    with progress() as update:
        for done, one in enumerate(chosen):
            update(done, len(chosen), one.name)
            found += [(one, report) for report in reports(one, arch, clock_ghz, num_sms)]
    rows = [{"name": one.name, "constants": dict(one.constants), **report.to_dict()} for one, report in found]
    data = {"clock_ghz": clock_ghz, "num_sms": num_sms, "kernels": rows}
    if len(chosen) == 1:
        parts = [part for one, report in found for part in in_full(one, report, clock_ghz, num_sms)]
    else:
        parts = [_assumed(found[0][1], clock_ghz, num_sms), LEGEND, *summary(found)]
    emit(parts, form, data)


def reports(one: Variant, arch: str, clock_ghz: float, num_sms: int) -> list[KernelReport]:
    """Reports of every kernel of one file."""
    if one.arch not in ("", arch):
        raise ArgumentError(f"{one.kernel} is for {one.arch} and cannot be compiled for {arch}")
    binary = compile.build(one.kernel, one.constants, arch=arch, kind="cubin")
    return list(sass.inspect(binary, clock_ghz=clock_ghz, num_sms=num_sms).values())


def listing(everything: Sequence[Variant]) -> Grid:
    """The names of what can be inspected, a line a kernel."""
    labels: dict[str, list[str]] = {}
    for one in everything:
        labels.setdefault(one.kernel, []).append(one.row)
    rows = [(kernel, len(found), f"{kernel}/{found[0]}") for kernel, found in labels.items()]
    return Grid("kernels that can be inspected", ("kernel", "rows", "for example"), rows)


def summary(found: list[tuple[Variant, KernelReport]]) -> Iterator[Grid]:
    """A table for each kernel: a line a row with its figures and those of its main loop. Empty columns are left out."""
    for kernel in dict.fromkeys(one.kernel for one, _ in found):
        lines = [_line(one, report) for one, report in found if one.kernel == kernel]
        names = [name for name in lines[0] if name == "row" or any(line[name] != "" for line in lines)]
        yield Grid(kernel, names, [[line[name] for name in names] for line in lines])


def _line(one: Variant, report: KernelReport) -> dict[str, Cell]:
    loop, used, bound = report.main, report.resources, report.main.bound
    counts = loop.counts
    return {
        "row": one.row,
        "entry": "" if report.entry == f"cuattn_{one.kernel}" else report.entry.removeprefix("cuattn_"),
        "regs": "" if used is None else used.registers,
        "spills": "" if used is None else used.spill_stores + used.spill_loads,
        "remarks": " ".join(dict.fromkeys(note.code for note in report.notes)),
        "all": loop.instructions,
        "matrix": _number(counts.get("wgmma", 0) + counts.get("mma", 0)),
        "exp2": _number(counts.get("exp2", 0)),
        "limit": "" if bound is None else bound.limit,
        "TFLOP/s": "" if bound is None else _speed(bound.tflop_per_s),
        "alone": "" if bound is None else _speed(bound.tflop_per_s_alone),
        "TB/s": "" if bound is None else _speed(bound.tb_per_s),
    }


def in_full(one: Variant, report: KernelReport, clock_ghz: float, num_sms: int) -> list[Part]:
    """Everything about one kernel."""
    lines: list[Part] = [f"{one.name}: {report.entry} for {report.arch}, {report.instructions} instructions"]
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
    lines += [_instructions(report), _assumed(report, clock_ghz, num_sms)]
    return lines if report.main.bound is None else [*lines, _units(report)]


def _instructions(report: KernelReport) -> Grid:
    """Table of the kinds of instructions, a column a loop."""
    rows: list[list[Cell]] = []
    for kind in dict.fromkeys(kind for loop in report.loops for kind in loop.counts):
        unit = f" ({UNIT_OF[kind]})" if UNIT_OF.get(kind, kind) != kind else ""
        rows.append([kind.replace("_", " ") + unit, *(_number(loop.counts.get(kind, 0)) for loop in report.loops)])
    rows.append(["all", *(loop.instructions for loop in report.loops)])
    for opcode in dict.fromkeys(opcode for loop in report.loops for opcode in loop.matrix):
        rows.append([opcode, *(_number(loop.matrix.get(opcode, 0)) for loop in report.loops)])
    if any(loop.matrix_groups for loop in report.loops):
        rows.append(["wgmma groups, waits", *(f"{loop.matrix_groups}, {loop.matrix_waits}" for loop in report.loops)])
    if any(loop.global_bytes for loop in report.loops):
        rows.append(["global memory, bytes", *(round(loop.global_bytes) for loop in report.loops)])
    return Grid("", ("instructions", *map(_addresses, report.loops)), rows)


def _units(report: KernelReport) -> Grid:
    """Table of the cycles that each unit is busy for a warp, and the bounds, a column a loop."""
    bounded = [(loop, loop.bound) for loop in report.loops if loop.bound is not None]
    bounds = [bound for _, bound in bounded]
    rows: list[list[Cell]] = []
    for unit in dict.fromkeys(unit for one in bounds for unit in one.cycles):
        rows.append([unit, *(_number(round(one.cycles.get(unit, 0))) for one in bounds)])
    rows.append(["limited by", *(one.limit for one in bounds)])
    for heading, speeds in (
        ("TFLOP/s at most", [one.tflop_per_s for one in bounds]),
        ("TFLOP/s without overlap", [one.tflop_per_s_alone for one in bounds]),
        ("TB/s asked for at most", [one.tb_per_s for one in bounds]),
    ):
        if any(speeds):
            rows.append([heading, *map(_speed, speeds)])
    return Grid("", ("cycles of", *(_addresses(loop) for loop, _ in bounded)), rows)


def _addresses(loop: LoopReport) -> str:
    return f"{loop.first:#x}–{loop.last:#x}"


def _assumed(report: KernelReport, clock_ghz: float, num_sms: int) -> str:
    if report.main.bound is None:
        return f"{report.arch}: rates are known for compute capability 9.0 only, so there are no bounds"
    return f"bounds for {num_sms} multiprocessors of compute capability 9.0 at {clock_ghz:g} GHz; not measured"


def _counted(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in numbers.items())


def _number(value: int) -> Cell:
    return value or ""


def _speed(value: float | None) -> Cell:
    return value or ""

"""The way from the interpreter's report to an exception that says where."""

from __future__ import annotations

from ..errors import (
    AsyncCopyError,
    DeadlockError,
    DivergenceError,
    KernelFault,
    MemoryFaultError,
    RaceError,
    UninitializedReadError,
)
from .library import ReportStruct
from .table import Table

# FAULT_* of executor.h, from 1
_KINDS: tuple[type[KernelFault], ...] = (
    MemoryFaultError,
    UninitializedReadError,
    RaceError,
    DeadlockError,
    DivergenceError,
    AsyncCopyError,
    KernelFault,
)


def from_report(table: Table, report: ReportStruct) -> KernelFault:
    """Make the exception of a launch's first fault."""
    ctaid, tid = tuple(report.ctaid), tuple(report.tid)
    location = table.locations[report.row] if report.row >= 0 else ""
    lines = [
        f"{table.name}: {report.message.decode(errors='replace')}",
        f"  CTA {ctaid}, thread {tid}",
    ]
    if report.row >= 0:
        lines.append(f"  at {location}: {table.texts[report.row]}")
    if report.other_row >= 0:
        lines.append(f"  the other access at {table.locations[report.other_row]}: {table.texts[report.other_row]}")
    kind = _KINDS[report.kind - 1]
    return kind(
        "\n".join(lines), kernel=table.name, ctaid=ctaid, tid=tid, address=report.address or None, location=location
    )

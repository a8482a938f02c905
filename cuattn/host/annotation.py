"""A kernel's source with counters beside its lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..compile import expand
from ..errors import ArgumentError

__all__ = ["annotated"]

_HEADINGS = ("warp instr.", "lanes", "global B", "shared B")


class Counts(Protocol):
    """What is known of a line."""

    instructions: int
    lanes: int
    global_bytes: int
    shared_bytes: int


def annotated(counts: Mapping[str, Counts], file: str, text: str | None = None) -> str:
    """Return the text of a file with the counters of its lines; see `Profile.annotate`."""
    own: dict[int, Counts] = {}
    for where, of in counts.items():
        name, _, line = where.rpartition(":")
        if name == file:
            own[int(line)] = of
    if not own:
        known = sorted({key.rpartition(":")[0] for key in counts} - {""})
        raise ArgumentError(f"no line of {file!r} was executed; files are {', '.join(known) or 'none'}")
    lines = (_text(file) if text is None else text).splitlines()
    rows = [_HEADINGS, *(_cells(own.get(number)) for number in range(1, len(lines) + 1))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
    sources = [file, *lines]
    return "\n".join(
        "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=True)), source]).rstrip()
        for row, source in zip(rows, sources, strict=True)
    )


def _cells(of: Counts | None) -> tuple[str, ...]:
    if of is None:
        return ("",) * len(_HEADINGS)
    lanes = f"{of.lanes / of.instructions:.1f}" if of.instructions else ""
    moved = (f"{count:,}" if count else "" for count in (of.global_bytes, of.shared_bytes))
    return f"{of.instructions:,}", lanes, *moved


def _text(file: str) -> str:
    """Return the text of a kernel file of this package by its name without a folder."""
    found = sorted(expand.KERNELS.rglob(file))
    if len(found) != 1:
        raise ArgumentError(f"the package has {len(found)} files {file!r}; give the text")
    return found[0].read_text(encoding="utf-8")

"""The way from NVRTC's log to a `CompileError` that shows the line of the kernel file that is wrong."""

from __future__ import annotations

import re

from cuattn.compile.nvrtc import Result
from cuattn.errors import CompileError

_ERROR = re.compile(r"^(.+)\((\d+)\): (?:catastrophic )?error", re.MULTILINE)
_PTXAS_ERROR = re.compile(r"^ptxas .*, line (\d+); error\s*: *(.*)$", re.MULTILINE)
_LINE_DIRECTIVE = re.compile(r'\s*#\s*line\s+(\d+)\s+"([^"]+)"')
_PTX_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', re.MULTILINE)
_PTX_LOC = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
_CONTEXT = 3


def compile_error(result: Result, source: str, *, title: str, name: str) -> CompileError:
    """The error to raise: a title, the place of the first error with the lines around it, and the whole log."""
    parts = [f"NVRTC could not compile {title}"]
    place = _first_place(result)
    if place is not None:
        path, number, reason = place
        parts[0] += f": {path}:{number}{reason}"
        parts += _excerpt(source, name, path, number)
    parts += ["", result.log.strip()]
    return CompileError("\n".join(parts), log=result.log, source=source)


def _first_place(result: Result) -> tuple[str, int, str] | None:
    if match := _ERROR.search(result.log):
        return match[1], int(match[2]), ""
    match = _PTXAS_ERROR.search(result.log)
    if match is None:
        return None
    # ptxas names a line of the PTX. The last .loc before it says which line of the source that came from.
    ptx = result.ptx.decode()
    for line in reversed(ptx.splitlines()[: int(match[1])]):
        if loc := _PTX_LOC.match(line):
            files = dict(_PTX_FILE.findall(ptx))
            return files.get(loc[1], "?"), int(loc[2]), f": {match[2]}"
    return None


def _excerpt(source: str, name: str, path: str, number: int) -> list[str]:
    """The lines around `number` of the file `path`, found in the expanded source through its #line directives."""
    wanted = range(number - _CONTEXT, number + _CONTEXT + 1)
    here, count = name, 0
    found: dict[int, str] = {}
    for line in source.split("\n"):
        directive = _LINE_DIRECTIVE.match(line)
        if directive:
            here, count = directive[2], int(directive[1]) - 1
            continue
        count += 1
        if here == path and count in wanted:
            found.setdefault(count, line)
    return [f"{'>' if at == number else ' '} {at:5d} | {found[at]}" for at in sorted(found)]

"""Resource figures of each kernel, read from what ptxas writes to NVRTC's log (``--ptxas-options=-v``)."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_FUNCTION = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_BARRIERS = re.compile(r"used (\d+) barriers")
_SMEM = re.compile(r"(\d+)(?:\+(\d+))? bytes smem")


@dataclass(frozen=True, slots=True)
class Resources:
    """What one kernel needs of a multiprocessor.

    Attributes
    ----------
    registers : int
        Registers per thread.
    spill_stores, spill_loads : int
        Bytes per thread.
    stack_bytes : int
        Bytes of local memory per thread that the kernel itself takes, spills included.
    static_smem_bytes : int
        Statically declared shared memory per CTA.
    barriers : int
        Named barriers per CTA.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    stack_bytes: int
    static_smem_bytes: int
    barriers: int


def parse(log: str) -> dict[str, Resources]:
    """Parse a log into `Resources` by entry name, for every kernel that the log speaks of."""
    result: dict[str, Resources] = {}
    entry = function = ""
    stack = (0, 0, 0)
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            entry, stack = match[1], (0, 0, 0)
        elif match := _FUNCTION.search(line):
            function = match[1]
        elif match := _STACK.search(line):
            # Device functions that were not inlined have a line of their own; the entry's counts.
            if function == entry:
                stack = (int(match[1]), int(match[2]), int(match[3]))
        elif entry and (match := _USED.search(line)):
            barriers, smem = _BARRIERS.search(line), _SMEM.search(line)
            result[entry] = Resources(
                registers=int(match[1]),
                spill_stores=stack[1],
                spill_loads=stack[2],
                stack_bytes=stack[0],
                static_smem_bytes=sum(int(part) for part in smem.groups() if part) if smem else 0,
                barriers=int(barriers[1]) if barriers else 0,
            )
            entry = ""
    return result

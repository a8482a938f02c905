"""Register allocation: virtual registers → slots of the warp's register file.

PTX is in SSA-like form with thousands of registers; a file that holds each of them would not fit a core's cache.
Liveness runs over basic blocks with one Python integer a set; slots are then given by a linear scan. It holds for
divergent warps too: a lane only ever sees its own path, and intervals cover every row between first and last.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .ptx_types import Label, Reg, Row

LANE_BYTES = {False: 128, True: 256}


@dataclass(slots=True)
class LoweredRow:
    """A row with what the table adds to it."""

    row: Row
    guard: Reg | None
    guard_negated: bool
    location: int
    text: str


@dataclass(slots=True)
class _Block:
    start: int
    end: int  # one past the last row
    successors: list[int]
    used: int = 0
    defined: int = 0
    live_in: int = 0
    live_out: int = 0


def _blocks(rows: Sequence[LoweredRow], labels: dict[str, int]) -> list[_Block]:
    starts = {0, *labels.values()}
    for index, lowered in enumerate(rows):
        if lowered.row.op in ("bra", "brx", "exit"):
            starts.add(index + 1)
    ordered = sorted(s for s in starts if s < len(rows))
    number = {start: i for i, start in enumerate(ordered)}
    blocks = []
    for i, start in enumerate(ordered):
        end = ordered[i + 1] if i + 1 < len(ordered) else len(rows)
        last = rows[end - 1]
        successors = []
        falls_through = True
        if last.row.op in ("bra", "brx"):
            targets = [x for x in last.row.srcs if isinstance(x, Label)]
            successors += [number[labels[x.name]] for x in targets if labels[x.name] < len(rows)]
            falls_through = last.guard is not None
        elif last.row.op == "exit":
            falls_through = last.guard is not None
        if falls_through and end < len(rows):
            successors.append(i + 1)
        blocks.append(_Block(start, end, successors))
    return blocks


class _Liveness:
    def __init__(self, rows: Sequence[LoweredRow], labels: dict[str, int]) -> None:
        self.index: dict[Reg, int] = {}
        self.reads: list[list[int]] = []
        self.writes: list[list[int]] = []
        index = self.index
        for lowered in rows:
            row = lowered.row
            side = [index.setdefault(x, len(index)) for x in row.side]
            reads = [index.setdefault(x, len(index)) for x in row.srcs if type(x) is Reg] + side
            writes = [index.setdefault(x, len(index)) for x in row.dsts if x is not None] + side
            if lowered.guard is not None:
                reads.append(index.setdefault(lowered.guard, len(index)))
                reads += writes  # a guarded write keeps the old value in some lanes
            self.reads.append(reads)
            self.writes.append(writes)
        self.blocks = _blocks(rows, labels)
        self.solve()

    def solve(self) -> None:
        for block in self.blocks:
            used = defined = 0
            for i in range(block.start, block.end):
                for reg in self.reads[i]:
                    if not defined >> reg & 1:
                        used |= 1 << reg
                for reg in self.writes[i]:
                    defined |= 1 << reg
            block.used, block.defined, block.live_in = used, defined, used
        changed = True
        while changed:
            changed = False
            for block in reversed(self.blocks):
                out = 0
                for successor in block.successors:
                    out |= self.blocks[successor].live_in
                live_in = block.used | (out & ~block.defined)
                if out != block.live_out or live_in != block.live_in:
                    block.live_out, block.live_in = out, live_in
                    changed = True

    def intervals(self) -> list[tuple[int, int]]:
        """Return the first and the last row of each register, by index."""
        first = [-1] * len(self.index)
        last = [-1] * len(self.index)
        seen = 0  # a register that lives through many blocks is looked at in one of them
        for block in self.blocks:
            for reg in _members(block.live_in & ~seen):
                first[reg] = block.start
            for row in range(block.start, block.end):
                for reg in (*self.reads[row], *self.writes[row]):
                    if first[reg] < 0:
                        first[reg] = row
            seen |= block.live_in | block.used | block.defined
        seen = 0
        for block in reversed(self.blocks):
            for reg in _members(block.live_out & ~seen):
                last[reg] = block.end - 1
            for row in range(block.end - 1, block.start - 1, -1):
                for reg in (*self.reads[row], *self.writes[row]):
                    if last[reg] < 0:
                        last[reg] = row
            seen |= block.live_out | block.used | block.defined
            for reg in _members(block.live_in & ~seen):
                last[reg] = block.start
            seen |= block.live_in
        return list(zip(first, last, strict=True))


def _members(registers: int) -> Iterator[int]:
    """Return the numbers of the bits that are set."""
    while registers:
        low = registers & -registers
        yield low.bit_length() - 1
        registers ^= low


def allocate(rows: Sequence[LoweredRow], labels: dict[str, int], base: int) -> tuple[dict[Reg, int], int]:
    """Allocate registers: the byte offset of every one, from ``base`` on, and the end of the file."""
    liveness = _Liveness(rows, labels)
    registers = list(liveness.index)
    intervals = liveness.intervals()
    order = sorted(range(len(registers)), key=lambda r: intervals[r])
    free: dict[bool, list[int]] = {False: [], True: []}
    active: list[tuple[int, int]] = []
    slots: dict[Reg, int] = {}
    top = base
    own = {reg for lowered in rows for reg in lowered.row.side}
    for name in liveness.index:
        if name in own:
            slots[name] = top
            top += LANE_BYTES[name.wide]
    for reg in order:
        if registers[reg] in own:
            continue
        start, end = intervals[reg]
        while active and active[0][0] < start:  # a row's results never share a slot with its own sources
            done = registers[heapq.heappop(active)[1]]
            free[done.wide].append(slots[done])
        wide = registers[reg].wide
        if free[wide]:
            slots[registers[reg]] = free[wide].pop()
        else:
            slots[registers[reg]] = top
            top += LANE_BYTES[wide]
        heapq.heappush(active, (end, reg))
    return slots, top

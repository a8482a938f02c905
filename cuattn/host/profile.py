"""Counters: what a kernel executes and moves, exact and without a GPU."""

from __future__ import annotations

from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from .annotation import annotated
from .lowering.op_classes import NOT_COUNTED, class_of
from .table import Table

_SPACES = {0: "generic", 1: "global", 2: "shared", 3: "local"}


@dataclass(slots=True)
class LineCounts:
    """What one source line executed: warp instructions, active lanes of them, and bytes of all their accesses."""

    instructions: int = 0
    lanes: int = 0
    global_bytes: int = 0
    shared_bytes: int = 0


class Profile:
    """What the launches of a ``with cuattn.host.profile() as p:`` block executed.

    Attributes
    ----------
    launches : int
        Kernels launched.
    instructions : Counter
        Class (``"mma"``, ``"memory"``, ``"float"``, ``"int"``, ``"convert"``, ``"control"``, ...) → warp instructions.
    opcodes : Counter
        PTX opcode → warp instructions.
    lanes : Counter
        Class → active lanes, summed over its warp instructions.
    bytes : dict
        ``bytes[space]["read" or "write"]``: bytes asked for by active lanes in ``"global"``, ``"shared"``, ``"local"``
        and ``"generic"`` memory. Asynchronous copies count as a global read and a shared write.
    lines : Counter
        Source line → warp instructions.
    line_counts : dict
        Source line → `LineCounts`: warp instructions, active lanes, bytes of global and of shared memory.
    kernels : Counter
        Name of a kernel → launches of it.
    lines_of_code : set
        Source lines that the launched kernels have instructions of, executed or not.
    """

    def __init__(self) -> None:
        self.launches = 0
        self.instructions: Counter[str] = Counter()
        self.opcodes: Counter[str] = Counter()
        self.lanes: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self.line_counts: dict[str, LineCounts] = {}
        self.kernels: Counter[str] = Counter()
        self._tables: dict[int, Table] = {}
        self.bytes = {space: {"read": 0, "write": 0} for space in _SPACES.values()}

    @property
    def warp_instructions(self) -> int:
        """Number of all warp instructions."""
        return sum(self.instructions.values())

    @property
    def active_lane_fraction(self) -> float:
        """Ratio of active lanes to 32 times the warp instructions: 1.0 without divergence and predication."""
        return sum(self.lanes.values()) / (32 * self.warp_instructions) if self.warp_instructions else 0.0

    @property
    def lines_of_code(self) -> set[str]:
        """Source lines that the launched kernels have instructions of, executed or not."""
        found = set()
        for table in self._tables.values():
            kinds = zip(table.op_names, table.locations, strict=True)
            found |= {_line(location) for op, location in kinds if class_of(op) != NOT_COUNTED}
        return found

    def add(self, table: Table, rows: np.ndarray, lanes: np.ndarray, moved: np.ndarray) -> None:
        """Add the counters of one launch."""
        self.launches += 1
        self.kernels[table.name] += 1
        self._tables[id(table)] = table
        for index in np.flatnonzero(rows):
            op, count = table.op_names[index], int(rows[index])
            kind = class_of(op)
            if kind == NOT_COUNTED:
                continue
            self.instructions[kind] += count
            self.lanes[kind] += int(lanes[index])
            text = table.texts[index]
            self.opcodes[text.split()[1 if text.startswith("@") else 0]] += count
            where = _line(table.locations[index])
            self.lines[where] += count
            of_line = self.line_counts.setdefault(where, LineCounts())
            of_line.instructions += count
            of_line.lanes += int(lanes[index])
            if moved[index]:
                self._add_bytes(op, int(table.rows[index, 3]) & 7, int(moved[index]), of_line)

    def _add_bytes(self, op: str, space: int, moved: int, of_line: LineCounts) -> None:
        if op in _COPIES:
            source, target = _COPIES[op]
            moves = [(source, "read"), (target, "write")]
        else:
            ways = [way for way, ops in _WAYS.items() if op in ops]
            moves = [(_SPACES[space], way) for way in ways]
        for name, way in moves:
            self.bytes[name][way] += moved
            if name == "global":
                of_line.global_bytes += moved
            elif name == "shared":
                of_line.shared_bytes += moved

    def annotate(self, file: str, text: str | None = None) -> str:
        """Return a kernel's source with what each line executed beside it.

        Columns are warp instructions, active lanes of 32 on average, and bytes of global and of shared memory. Work of
        a function that was inlined stands at its own lines, for all its callers together.

        Parameters
        ----------
        file : str
            Name of a file in `lines`, such as "softmax_rows.cuh".
        text : str, optional
            Its text; left out, that of the file of this name among the kernels of this package.

        Returns
        -------
        str

        Raises
        ------
        ArgumentError
            No line of the file was executed, or its text is not given and the package has no such file.

        Examples
        --------
        >>> import numpy as np
        >>> import cuattn
        >>> with cuattn.host.profile() as p:
        ...     y = cuattn.softmax(np.zeros((2, 8), np.float32))
        >>> "for " in p.annotate("softmax_rows.cuh")
        True
        """
        return annotated(self.line_counts, file, text)


_WAYS = {"read": ("ld", "ldmatrix", "atom"), "write": ("st", "stmatrix", "atom")}


def _line(location: str) -> str:
    """Return the line itself, without where it was inlined."""
    return location.split(",")[0]


#: Asynchronous copies: where they read and where they write. A tile counts whole, also where it ends beyond its array.
_COPIES = {
    **dict.fromkeys(("cp_async", "bulk_load", "bulk_tensor_load"), ("global", "shared")),
    **dict.fromkeys(("bulk_store", "bulk_tensor_store"), ("shared", "global")),
    "bulk_copy": ("shared", "shared"),
}

_active: ContextVar[tuple[Profile, ...]] = ContextVar("cuattn.host profiles", default=())


class profile:
    """Count what the launches in a block execute: those of this thread or task.

    Examples
    --------
    >>> import cuattn.host
    >>> with cuattn.host.profile() as p:
    ...     pass
    >>> p.warp_instructions
    0
    """

    def __enter__(self) -> Profile:
        self._profile = Profile()
        _active.set((*_active.get(), self._profile))
        return self._profile

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.set(tuple(x for x in _active.get() if x is not self._profile))


def active() -> tuple[Profile, ...]:
    """Return the profiles that are open here."""
    return _active.get()

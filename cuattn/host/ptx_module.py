"""A parsed PTX module: kernels, variables, and where their instructions come from."""

from __future__ import annotations

from dataclasses import dataclass, field

from .ptx_types import Address, Instruction, Operand, Reg, Symbol


@dataclass(frozen=True, slots=True)
class SourceLocation:
    """A ``.loc``: where an instruction comes from, and where that code was inlined."""

    file: int
    line: int
    column: int
    inlined_at: int  # index of the location of the call, -1 for none


@dataclass(slots=True)
class Variable:
    """A variable in some state space. ``data`` holds its initial bytes (``None``: zeros or undefined)."""

    name: str
    space: str
    align: int
    size: int
    extern: bool = False
    data: bytes | None = None


@dataclass(slots=True)
class Parameter:
    """A kernel's parameter as declared.

    ``type`` is its PTX type without the dot, ``"u64"``, or ``"struct"`` for an array of bytes. ``pointer`` says whether
    a 64-bit integer is an address; ``None`` where neither the declaration nor the code tells.
    """

    name: str
    offset: int
    size: int
    type: str
    pointer: bool | None = None
    align: int = 8


@dataclass(slots=True)
class Entry:
    """One kernel: its parameters, its instructions in text order, and the row numbers of its labels."""

    name: str
    params: list[Parameter]
    body: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def param_bytes(self) -> int:
        last = self.params[-1] if self.params else None
        return last.offset + last.size if last else 0

    def find_pointers(self) -> None:
        """Note which parameters the code turns into global addresses as they are."""
        by_name = {p.name: p for p in self.params if p.size == 8 and p.pointer is None}
        loaded: dict[Operand, Parameter] = {}
        for ins in self.body:
            if ins.parts[:2] == ("ld", "param") and len(ins.operands) == 2:
                where = ins.operands[1]
                if isinstance(where, Address) and isinstance(where.base, Symbol) and not where.offset:
                    param = by_name.get(where.base.name)
                    if param is not None and isinstance(ins.operands[0], Reg):
                        loaded[ins.operands[0]] = param
            elif ins.parts[:3] == ("cvta", "to", "global") and ins.operands[-1] in loaded:
                loaded[ins.operands[-1]].pointer = True


@dataclass(slots=True)
class Module:
    version: str
    target: str
    entries: dict[str, Entry]
    variables: list[Variable]
    files: dict[int, str]
    locations: list[SourceLocation]

    def describe(self, location: int) -> str:
        """``file:line, inlined at file:line, ...`` of a location index."""
        if location < 0:
            return "unknown source line"
        parts: list[str] = []
        while location >= 0 and len(parts) < 16:
            loc = self.locations[location]
            name = self.files.get(loc.file, f"file {loc.file}").rsplit("/", 1)[-1]
            parts.append(f"{name}:{loc.line}")
            location = loc.inlined_at
        return ", inlined at ".join(parts)

"""The pieces of a parsed PTX instruction, and the rows that it is lowered to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

WIDE_TYPES = frozenset({"b64", "u64", "s64", "f64"})


@dataclass(slots=True, eq=False)
class Reg:
    """A virtual register, unique over scopes. ``type`` is its PTX type without the dot (``pred``, ``b32``, ...).

    There is one object for each register, so that sets and dictionaries compare by identity.
    """

    name: str
    type: str
    wide: bool = field(init=False)

    def __post_init__(self) -> None:
        self.wide = self.type in WIDE_TYPES


@dataclass(frozen=True, slots=True)
class Imm:
    """A literal as written: an ``int``, or the bits of ``0f...`` (``width`` 32) and ``0d...`` (``width`` 64)."""

    value: int
    float_width: int = 0  # 0 integer literal, 32 or 64 float bits


@dataclass(frozen=True, slots=True)
class Special:
    """A special register, ``%tid.x``."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name that is no register: a parameter, a variable in some state space."""

    name: str


@dataclass(frozen=True, slots=True)
class Label:
    name: str


@dataclass(frozen=True, slots=True)
class Sink:
    """The bit bucket, ``_``."""


@dataclass(frozen=True, slots=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """``d|p``: two destinations in one operand."""

    first: Operand
    second: Operand


@dataclass(frozen=True, slots=True)
class Negated:
    """``!p`` as a source operand."""

    reg: Reg


@dataclass(frozen=True, slots=True)
class Address:
    """``[base + offset]``, or ``[base, {coordinates}]`` with the rest in ``extra``."""

    base: Operand
    offset: int = 0
    extra: tuple[Operand, ...] = ()


Operand: TypeAlias = Reg | Imm | Special | Symbol | Label | Sink | Vector | Pair | Negated | Address


@dataclass(slots=True)
class Instruction:
    opcode: str  # as written: "add.rn.f32"
    parts: tuple[str, ...]  # ("add", "rn", "f32")
    operands: tuple[Operand, ...]
    guard: Reg | None
    guard_negated: bool
    location: int  # index into the module's list of source locations, -1 unknown
    line: int  # line of the PTX text, 1-based
    text: str = ""


@dataclass(frozen=True, slots=True)
class Const:
    """A constant slot: ``bits`` in every lane, plus the address of ``symbol``, which is known when a module loads."""

    bits: int
    wide: bool = False
    symbol: str = ""


Source: TypeAlias = Reg | Const | Special | Label | int


@dataclass(slots=True)
class Row:
    """One row of the table: handler name, destinations, sources, plain numbers, in the order of ``Row.a`` in C.

    A destination of ``None`` is a result that nobody wants; it gets a scratch slot. ``side`` holds registers that are
    both read and written, too many for ``Row.a`` or used later than the row runs: they have slots of their own in the
    whole kernel. Behind its numbers such a row has the index of the first in ``Launch.side``, and their count.
    """

    op: str
    dsts: Sequence[Reg | None] = ()
    srcs: Sequence[Source] = ()
    numbers: Sequence[int] = ()
    flags: int = 0
    side: Sequence[Reg] = ()

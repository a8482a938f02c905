"""Reading the opcode of an arithmetic instruction: every part must be taken, or the instruction is refused."""

from __future__ import annotations

from types import TracebackType

from ..ptx_types import WIDE_TYPES, Const, Imm, Instruction, Operand, Reg, Source, Special
from .rules import destination, source

# c/alu.h
FTZ, SAT, RELU, NAN, XORSIGN, X2, SATFINITE = 1, 2, 4, 8, 16, 32, 64
ROUNDING = {"rn": 0, "rz": 1, "rm": 2, "rp": 3, "rna": 4}

FLOAT_TYPES = frozenset({"f16", "f16x2", "bf16", "bf16x2", "f32", "f64"})


class Opcode:
    """The parts of an opcode after the first one, taken one by one.

    Used as a context manager: leaving the block with parts left over raises `ValueError`, so that no rule can
    overlook a modifier.

        with Opcode(ins) as op:
            kind = op.last()
            rounding = op.take("rn", "rz", default="rn")
    """

    def __init__(self, ins: Instruction) -> None:
        self.text = ins.opcode
        self.rest = list(ins.parts[1:])

    def __enter__(self) -> Opcode:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.rest:
            raise ValueError(f".{self.rest[0]} is not supported in {self.text}")

    def last(self) -> str:
        """Take the last part, usually the type."""
        if not self.rest:
            raise ValueError(f"{self.text} has no type")
        return self.rest.pop()

    def take(self, *names: str, default: str = "") -> str:
        """Take the one part that is among ``names``, or return ``default``."""
        found = [part for part in self.rest if part in names]
        if len(found) > 1:
            raise ValueError(f"{self.text}: .{found[0]} and .{found[1]} exclude each other")
        if not found:
            return default
        self.rest.remove(found[0])
        return found[0]

    def flags(self, **names: int) -> int:
        """Take those of ``names`` that the opcode has, and return the sum of their values."""
        return sum(value for name, value in names.items() if self.take(name))


def read(operand: Operand, type_name: str) -> Source:
    """Return a source operand whose register must have the width of ``type_name``."""
    if isinstance(operand, Reg):
        _check_width(operand, type_name)
    if isinstance(operand, Special) and type_name in WIDE_TYPES:
        raise ValueError(f"special register {operand.name} where .{type_name} is expected")
    if isinstance(operand, Imm) and operand.float_width and type_name[0] in "usp":
        raise ValueError(f"a float literal where .{type_name} is expected")
    if isinstance(operand, Imm) and operand.float_width == 64 and type_name not in WIDE_TYPES:
        raise ValueError(f"a 64-bit float literal where .{type_name} is expected")
    return source(operand, type_name)


def write(operand: Operand, type_name: str) -> Reg | None:
    """Return a destination operand whose register must have the width of ``type_name``."""
    if isinstance(operand, Reg):
        _check_width(operand, type_name)
    return destination(operand)


def _check_width(reg: Reg, type_name: str) -> None:
    if reg.wide != (type_name in WIDE_TYPES) or (reg.type == "pred") != (type_name == "pred"):
        raise ValueError(f"register {reg.name} of type .{reg.type} where .{type_name} is expected")


_BITS = {"8": 8, "16": 16, "32": 32, "64": 64, "8x2": 16, "16x2": 32}


def bits_of(type_name: str) -> int:
    """Return the bits of a register of that type: 16 for ``s16`` and ``bf16``, 32 for ``f16x2``."""
    digits = type_name.lstrip("abcdefghijklmnopqrstuvwxyz")
    bits = _BITS.get(digits)
    if bits is None:
        raise ValueError(f".{type_name:.20} is not an arithmetic type")
    return bits


def untyped(type_name: str) -> str:
    """Return the type without its sign: ``b32`` for ``s32``, ``u32`` and ``f32``."""
    return f"b{bits_of(type_name)}"


def expect(ins: Instruction, count: int) -> tuple[Operand, ...]:
    """Return the operands, of which there must be ``count``."""
    if len(ins.operands) != count:
        raise ValueError(f"{ins.opcode} with {len(ins.operands)} operands instead of {count}")
    return ins.operands


ZERO = Const(0)

"""Arithmetic on f16, f16x2, bf16 and bf16x2."""

from __future__ import annotations

from ..ptx_types import Const, Instruction, Row
from .context import Context
from .modifiers import FTZ, NAN, RELU, SAT, X2, XORSIGN, Opcode, expect, read, write
from .rules import rule

HALF_TYPES = frozenset({"f16", "f16x2", "bf16", "bf16x2"})
SOURCES = {"fma": 3, "ex2": 1, "tanh": 1}


def _is_half(ins: Instruction) -> bool:
    return ins.parts[-1] in HALF_TYPES


def _half(ins: Instruction, kind: str, flags: int) -> Row:
    d, *sources = expect(ins, 1 + SOURCES.get(ins.parts[0], 2))
    packed = X2 if kind.endswith("x2") else 0
    srcs = [read(operand, kind) for operand in sources]
    return Row(f"{ins.parts[0]}_{kind.removesuffix('x2')}", [write(d, kind)], srcs, flags=flags | packed)


@rule("add", "sub", "mul", "fma")
def lower_half_arithmetic(ins: Instruction, context: Context) -> Row | None:
    if not _is_half(ins):
        return None
    with Opcode(ins) as op:
        kind = op.last()
        rounding = op.take("rn")
        flags = op.flags(ftz=FTZ, sat=SAT, relu=RELU)
    if ins.parts[0] == "fma" and not rounding:
        return None
    if flags & RELU and (ins.parts[0] != "fma" or flags & SAT):
        return None
    if kind[0] == "b" and flags & (FTZ | SAT):
        return None
    return _half(ins, kind, flags)


@rule("min", "max")
def lower_half_min(ins: Instruction, context: Context) -> Row | None:
    if not _is_half(ins):
        return None
    with Opcode(ins) as op:
        kind = op.last()
        flags = op.flags(ftz=FTZ, NaN=NAN, xorsign=XORSIGN)
        absolute = op.take("abs")
    if bool(absolute) != bool(flags & XORSIGN) or (kind[0] == "b" and flags & FTZ):
        return None
    return _half(ins, kind, flags)


@rule("ex2", "tanh")
def lower_half_special(ins: Instruction, context: Context) -> Row | None:
    if not _is_half(ins):
        return None
    with Opcode(ins) as op:
        kind, approx, flags = op.last(), op.take("approx"), op.flags(ftz=FTZ)
    # ex2 on bf16 exists with .ftz only, everything else without.
    if not approx or bool(flags) != (ins.parts[0] == "ex2" and kind[0] == "b"):
        return None
    return _half(ins, kind, flags)


@rule("neg", "abs")
def lower_half_sign(ins: Instruction, context: Context) -> Row | None:
    if not _is_half(ins):
        return None
    with Opcode(ins) as op:
        kind = op.last()
    d, a = expect(ins, 2)
    packed = kind.endswith("x2")
    if ins.parts[0] == "neg":
        return Row("xor_b32", [write(d, kind)], [read(a, kind), Const(0x80008000 if packed else 0x8000)])
    return Row("and_b32", [write(d, kind)], [read(a, kind), Const(0x7FFF7FFF if packed else 0x7FFF)])

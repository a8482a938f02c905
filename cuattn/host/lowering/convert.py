"""cvt: between integers, floating-point formats, packed pairs."""

from __future__ import annotations

from ..ptx_types import Const, Instruction, Operand, Reg, Row, Source
from .context import Context
from .modifiers import FTZ, RELU, ROUNDING, SAT, SATFINITE, Opcode, bits_of, expect, write
from .modifiers import read as read_exact
from .rules import destination, rule, source

# The types of the handler `convert`, in the order of c/convert.c.
TYPES = ("f16", "bf16", "tf32", "f32", "e4m3", "e5m2", "f64", "u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
INTEGERS = frozenset(TYPES[7:])
FLOATS = frozenset({"f16", "bf16", "f32", "f64"})
INTEGER_ROUNDING = {"rni": 0, "rzi": 1, "rmi": 2, "rpi": 3}
NUMBER = {name: k for k, name in enumerate(TYPES)}

# Conversions with a handler of their own: (rounding, destination, source).
FAST = frozenset(
    [("rn", f, i) for f in ("f32", "f64") for i in ("s32", "u32", "s64", "u64")]
    + [(r, "s32", "f32") for r in INTEGER_ROUNDING]
    + [(r, "f32", "f32") for r in INTEGER_ROUNDING]
    + [("rni", "u32", "f32"), ("rzi", "u32", "f32"), ("rn", "f32", "f64"), ("", "f64", "f32"), ("", "f32", "f16")]
    + [("", "f32", "bf16"), ("rn", "f16", "f32"), ("rn", "bf16", "f32"), ("rna", "tf32", "f32")]
)
MANTISSA = {"f16": 11, "bf16": 8, "f32": 24, "f64": 53}
PACKED_HALVES = {"f16x2": "f16", "bf16x2": "bf16", "e4m3x2": "e4m3", "e5m2x2": "e5m2"}


def read(operand: Operand, kind: str) -> Source:
    """Read the source of a cvt, whose register may be wider than its type: then its low part counts."""
    if isinstance(operand, Reg) and operand.wide and bits_of(kind) < 64:
        raise ValueError(f"cvt from the low part of a 64-bit register is not supported for .{kind}")
    return read_exact(operand, kind)


def register_bits(reg: Reg | None, kind: str) -> int:
    return bits_of(kind) if reg is None else 1 if reg.type == "pred" else bits_of(reg.type)


@rule("cvt")
def lower_cvt(ins: Instruction, context: Context) -> Row | list[Row] | None:
    with Opcode(ins) as op:
        kind_from, kind_to = op.last(), op.last()
        rounding = op.take(*ROUNDING, *INTEGER_ROUNDING)
        flags = op.flags(ftz=FTZ, sat=SAT, relu=RELU, satfinite=SATFINITE)
    if kind_to in PACKED_HALVES or kind_from in PACKED_HALVES:
        return _packed(ins, kind_to, kind_from, rounding, flags)
    if kind_to in INTEGERS and kind_from in INTEGERS:
        return _integers(ins, context, kind_to, kind_from, flags) if not rounding else None
    if flags & FTZ and "f32" not in (kind_to, kind_from):
        return None
    d, a = expect(ins, 2)
    if kind_to in INTEGERS and kind_from in FLOATS:
        return _float_to_int(d, a, kind_to, kind_from, rounding, flags)
    if kind_to in FLOATS and kind_from in INTEGERS:
        return _int_to_float(d, a, kind_to, kind_from, rounding, flags)
    if kind_to in FLOATS and kind_from in FLOATS:
        return _float_to_float(d, a, kind_to, kind_from, rounding, flags)
    if kind_to == "tf32" and kind_from == "f32" and rounding in ("rn", "rz", "rna") and not flags & (FTZ | SAT):
        return _convert(d, a, kind_to, kind_from, rounding, "", flags)
    return None


def _convert(d: Operand, a: Operand, kind_to: str, kind_from: str, rounding: str, integer: str, flags: int) -> Row:
    """Lower a conversion to its own handler where it has one, else to the general one."""
    width_to = "b32" if kind_to == "tf32" else kind_to
    target = write(d, width_to)
    value = read(a, kind_from)
    if not flags and (rounding or integer, kind_to, kind_from) in FAST:
        name = "_".join(part for part in ("cvt", rounding or integer, kind_to, kind_from) if part)
        return Row(name, [target], [value])
    mask = _signed((1 << min(register_bits(target, kind_to), 32)) - 1)
    modes = [ROUNDING.get(rounding, 0), INTEGER_ROUNDING.get(integer, -1)]
    numbers = [1, NUMBER[kind_from], NUMBER[kind_to], *modes, mask]
    return Row("convert", [target], [value, value], numbers, flags)


def _signed(mask: int) -> int:
    """Return a 32-bit mask as the s32 that a row holds."""
    return mask - (1 << 32) if mask >> 31 else mask


def _float_to_int(d: Operand, a: Operand, kind_to: str, kind_from: str, rounding: str, flags: int) -> Row | None:
    # .sat says what happens anyway: a float clamps to the range of an integer.
    if rounding not in INTEGER_ROUNDING or flags & (RELU | SATFINITE):
        return None
    return _convert(d, a, kind_to, kind_from, "", rounding, flags & FTZ)


def _int_to_float(d: Operand, a: Operand, kind_to: str, kind_from: str, rounding: str, flags: int) -> Row | None:
    if rounding not in ("rn", "rz", "rm", "rp") or flags & (RELU | SATFINITE | FTZ):
        return None
    if kind_to == "f64" and bits_of(kind_from) == 64 and (rounding != "rn" or flags):
        if flags:
            return None
        numbers = [ROUNDING[rounding], int(kind_from == "s64")]
        return Row("cvt_f64_int64_rounded", [write(d, kind_to)], [read(a, kind_from)], numbers)
    return _convert(d, a, kind_to, kind_from, rounding, "", flags)


def _float_to_float(d: Operand, a: Operand, kind_to: str, kind_from: str, rounding: str, flags: int) -> Row | None:
    narrowing = MANTISSA[kind_to] < MANTISSA[kind_from] or {kind_to, kind_from} == {"f16", "bf16"}
    if rounding in INTEGER_ROUNDING:
        return _convert(d, a, kind_to, kind_from, "", rounding, flags) if kind_to == kind_from else None
    if rounding == "rna" or bool(rounding) != narrowing:
        return None
    return _convert(d, a, kind_to, kind_from, rounding, "", flags)


def _packed(ins: Instruction, kind_to: str, kind_from: str, rounding: str, flags: int) -> Row | None:
    """Lower a conversion to pairs: d = {a, b} from two f32, or both halves of one register."""
    target_kind, source_kind = PACKED_HALVES.get(kind_to), PACKED_HALVES.get(kind_from, kind_from)
    if target_kind is None or rounding not in ("rn", "rz") or flags & (FTZ | SAT):
        return None
    eight_bits = target_kind in ("e4m3", "e5m2")
    if eight_bits != bool(flags & SATFINITE) or (rounding == "rz" and (eight_bits or source_kind != "f32")):
        return None
    register = "b16" if eight_bits else "b32"
    target = write(ins.operands[0], register)
    if source_kind == "f32":
        _, a, b = expect(ins, 3)
        srcs = [read(a, "f32"), read(b, "f32")]
        if rounding == "rn" and not flags and not eight_bits:
            return Row(f"cvt_rn_{kind_to}_f32", [target], srcs)
    elif (eight_bits and source_kind == "f16") or (target_kind == "f16" and source_kind in ("e4m3", "e5m2")):
        _, a = expect(ins, 2)
        srcs = [read_exact(a, "b16" if target_kind == "f16" else "b32")] * 2
    else:
        return None
    numbers = [2, NUMBER[source_kind], NUMBER[target_kind], ROUNDING[rounding], -1, -1]
    return Row("convert", [target], srcs, numbers, flags)


def _integers(ins: Instruction, context: Context, kind_to: str, kind_from: str, flags: int) -> Row | list[Row] | None:
    if flags & ~SAT:
        return None
    d, a = expect(ins, 2)
    target = destination(d)
    if isinstance(a, Reg) and (a.type == "pred" or (bits_of(kind_from) == 64 and not a.wide)):
        return None
    wide_target = target.wide if target is not None else bits_of(kind_to) == 64
    if (target is not None and target.type == "pred") or register_bits(target, kind_to) < bits_of(kind_to):
        return None
    value = source(a, kind_from)
    wide_source = value.wide if isinstance(value, (Reg, Const)) else False
    if flags & SAT:
        if wide_target != (bits_of(kind_to) == 64) or wide_source != (bits_of(kind_from) == 64):
            return None
        mask = (1 << min(register_bits(target, kind_to), 32)) - 1
        rows = [Row("cvt_sat_int", [target], [value], [NUMBER[kind_from], NUMBER[kind_to], _signed(mask)])]
    elif bits_of(kind_to) == bits_of(kind_from) == 64:
        rows = [Row("mov_b64", [target], [value])]
    else:
        rows = []
        if wide_source:
            low = context.new_register("b32")
            rows, value = [Row("cvt_b32_b64", [low], [value])], low
        rows = _extend(rows, target, value, kind_to, kind_from, context)
    return rows


def _extend(
    rows: list[Row], target: Reg | None, value: Source, kind_to: str, kind_from: str, context: Context
) -> list[Row]:
    """Extend the low part of a 32-bit register to the target register.

    The narrower of the two types says which bits count and how they extend; a signed value that goes to a wider
    unsigned type keeps its sign bits up to the end of that type only.
    """
    bits_to, bits_from, register = bits_of(kind_to), bits_of(kind_from), register_bits(target, kind_to)
    field = min(bits_to, bits_from)
    signed = (kind_to if bits_to <= bits_from else kind_from)[0] == "s"
    kept = register if kind_to[0] == "s" else bits_to
    if register == 64:
        if not signed and field < 32:
            low = context.new_register("b32")
            return [*rows, Row("and_b32", [low], [value, Const((1 << field) - 1)]), Row("cvt_b64_u32", [target], [low])]
        if signed and kept < 64:
            raise ValueError(f"cvt.{kind_to}.{kind_from} into a 64-bit register is not supported")
        if field == 32:
            return [*rows, Row("cvt_b64_s32" if signed else "cvt_b64_u32", [target], [value])]
        return [*rows, Row("cvt_extend_b64_b32", [target], [value], [32 - field])]
    if field == 32 and rows:
        return [Row("cvt_b32_b64", [target], rows[0].srcs)]
    if field == 32:
        return [*rows, Row("mov_b32", [target], [value])]
    if signed:
        return [*rows, Row("cvt_extend_b32", [target], [value], [32 - field, _signed((1 << kept) - 1)])]
    return [*rows, Row("and_b32", [target], [value, Const((1 << field) - 1)])]

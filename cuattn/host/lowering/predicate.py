"""Comparisons (setp, set), selections (selp, slct) and moves between registers and vectors of registers."""

from __future__ import annotations

from ..ptx_types import Const, Imm, Instruction, Negated, Operand, Pair, Reg, Row, Source, Special, Vector
from .alu_int import INT_TYPES
from .context import Context
from .modifiers import FTZ, ZERO, Opcode, bits_of, expect, read, untyped, write
from .rules import rule

# comparison → (handler's comparison, operands swapped)
SIGNED = {"eq": ("eq", 0), "ne": ("ne", 0), "lt": ("lt", 0), "le": ("le", 0), "gt": ("lt", 1), "ge": ("le", 1)}
UNSIGNED = SIGNED | {"lo": ("lt", 0), "ls": ("le", 0), "hi": ("lt", 1), "hs": ("le", 1)}
FLOAT = SIGNED | {
    "equ": ("equ", 0), "neu": ("neu", 0), "ltu": ("ltu", 0), "leu": ("leu", 0), "gtu": ("ltu", 1), "geu": ("leu", 1),
    "num": ("num", 0), "nan": ("nan", 0),
}  # fmt: skip
COMPARISONS = frozenset(UNSIGNED | FLOAT)
COMBINE = {"and": 0, "or": 1, "xor": 2}


def compare(comparison: str, kind: str, p: Reg, a: Source, b: Source) -> Row | None:
    """Make the row of one comparison of two sources of type ``kind`` (16-bit floats: converted to f32 already)."""
    if kind in ("f32", "f64"):
        table, suffix = FLOAT, kind
    elif kind in INT_TYPES:
        table = SIGNED if kind[0] == "s" else UNSIGNED
        suffix = "u32" if kind == "u16" else kind
    elif kind in ("b16", "b32", "b64"):
        table, suffix = {"eq": ("eq", 0), "ne": ("ne", 0)}, kind
    else:
        return None
    if comparison not in table:
        return None
    name, swapped = table[comparison]
    if kind[0] != "f" and name in ("eq", "ne"):
        suffix = "b64" if bits_of(kind) == 64 else "b32"
    return Row(f"setp_{name}_{suffix}", [p], [b, a] if swapped else [a, b])


def _float_source(value: Source, kind: str, half: int, ftz: bool, context: Context) -> tuple[Source, list[Row]]:
    """Return a floating-point operand as comparisons take it: 16-bit ones as f32, subnormals flushed if asked."""
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        rows, bits = [], value
        if kind.endswith("x2"):
            bits = context.new_register("b32")
            rows.append(
                Row("shr_u32", [bits], [value, Const(16)]) if half else Row("and_b32", [bits], [value, Const(0xFFFF)])
            )
        widened = context.new_register("f32")
        rows.append(Row("cvt_f32_bf16" if kind[0] == "b" else "cvt_f32_f16", [widened], [bits]))
        return widened, rows
    if ftz:
        flushed = context.new_register("f32")
        return flushed, [Row("flush_f32", [flushed], [value])]
    return value, []


def test_rows(
    ins: Instruction, context: Context, comparison: str, kind: str, flags: int, a: Operand, b: Operand, half: int = 0
) -> tuple[Reg, list[Row]] | None:
    """Make rows that compute one comparison into a predicate of their own. ``half``: which one of a packed pair."""
    if flags & FTZ and kind not in ("f32",):
        return None
    p = context.new_register("pred")
    x, rows_x = _float_source(read(a, kind), kind, half, bool(flags & FTZ), context)
    y, rows_y = _float_source(read(b, kind), kind, half, bool(flags & FTZ), context)
    row = compare(comparison, "f32" if kind in ("f16", "bf16", "f16x2", "bf16x2") else kind, p, x, y)
    return (p, [*rows_x, *rows_y, row]) if row else None


def _combine(p: Reg | None, q: Reg | None, test: Reg, boolean: str, operand: Operand | None) -> Row:
    """Compute p = test OP c, q = !test OP c; without an operation c is true and the operation is "and"."""
    negated = isinstance(operand, Negated)
    if operand is None:
        c: Source = Const(1)
    else:
        c = read(operand.reg if isinstance(operand, Negated) else operand, "pred")
    return Row("setp_combine", [p, q], [test, c], [COMBINE[boolean or "and"], int(negated)])


@rule("setp")
def lower_setp(ins: Instruction, context: Context) -> Row | list[Row] | None:
    with Opcode(ins) as op:
        kind = op.last()
        boolean, flags = op.take("and", "or", "xor"), op.flags(ftz=FTZ)
        comparison = op.take(*COMPARISONS)
    d, a, b, *rest = ins.operands
    if len(rest) != (1 if boolean else 0) or not comparison:
        return None
    packed = kind.endswith("x2")
    p, q = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    if not boolean and q is None and not flags and not packed and kind not in ("f16", "bf16"):
        target = write(p, "pred")
        return compare(comparison, kind, target, read(a, kind), read(b, kind)) if target else Row("nop")
    test = test_rows(ins, context, comparison, kind, flags, a, b)
    if test is None:
        return None
    register, rows = test
    p_target = write(p, "pred")
    q_target = write(q, "pred") if q is not None else None
    operand = rest[0] if rest else None
    if not packed:
        return [*rows, _combine(p_target, q_target, register, boolean, operand)]
    high = test_rows(ins, context, comparison, kind, flags, a, b, half=1)
    if high is None or q is None:
        return None
    # The boolean operand may be one of the destinations: both results are ready before either is written.
    low_result, high_result = context.new_register("pred"), context.new_register("pred")
    rows += high[1]
    rows.append(_combine(low_result, None, register, boolean, operand))
    rows.append(_combine(high_result, None, high[0], boolean, operand))
    rows += [Row("mov_b32", [target], [value]) for target, value in ((p_target, low_result), (q_target, high_result))]
    return rows


@rule("set")
def lower_set(ins: Instruction, context: Context) -> list[Row] | None:
    """Lower ``set``: the comparison as all ones or 1.0 in a register."""
    with Opcode(ins) as op:
        kind, result = op.last(), op.last()
        boolean, flags = op.take("and", "or", "xor"), op.flags(ftz=FTZ)
        comparison = op.take(*COMPARISONS)
    d, a, b, *rest = ins.operands
    if len(rest) != (1 if boolean else 0) or not comparison:
        return None
    true = {"u32": 0xFFFFFFFF, "s32": 0xFFFFFFFF, "u16": 0xFFFF, "s16": 0xFFFF, "f32": 0x3F800000,
            "f16": 0x3C00, "bf16": 0x3F80, "f16x2": 0x3C00, "bf16x2": 0x3F80}.get(result)  # fmt: skip
    packed = kind.endswith("x2")
    if true is None or packed != (result.endswith("x2") or (packed and result in ("u32", "s32"))):
        return None
    if packed:
        true &= 0xFFFF
    rows: list[Row] = []
    halves = []
    for half in range(2 if packed else 1):
        test = test_rows(ins, context, comparison, kind, flags, a, b, half)
        if test is None:
            return None
        p = context.new_register("pred")
        value = context.new_register("b32")
        rows += test[1]
        rows.append(_combine(p, None, test[0], boolean, rest[0] if rest else None))
        rows.append(Row("selp_b32", [value], [Const(true), ZERO, p]))
        halves.append(value)
    target = write(d, result)
    rows.append(Row("pack_2x16", [target], halves) if packed else Row("mov_b32", [target], halves))
    return rows


@rule("selp")
def lower_selp(ins: Instruction, context: Context) -> Row | None:
    with Opcode(ins) as op:
        kind = op.last()
    d, a, b, p = expect(ins, 4)
    if isinstance(p, Negated):
        return None
    width = "b64" if bits_of(kind) == 64 else "b32"
    srcs = [read(a, kind), read(b, kind), read(p, "pred")]
    return Row(f"selp_{width}", [write(d, kind)], srcs)


@rule("slct")
def lower_slct(ins: Instruction, context: Context) -> list[Row] | Row | None:
    with Opcode(ins) as op:
        test, kind, flags = op.last(), op.last(), op.flags(ftz=FTZ)
    d, a, b, c = expect(ins, 4)
    if test not in ("s32", "f32") or (flags and test != "f32"):
        return None
    width = "b64" if bits_of(kind) == 64 else "b32"
    # .ftz turns a negative subnormal into -0, which counts as >= 0.
    chooser, rows = _float_source(read(c, test), test, 0, bool(flags), context)
    srcs = [read(a, kind), read(b, kind), chooser]
    return [*rows, Row(f"slct_{width}_{test}", [write(d, kind)], srcs)]


@rule("mov")
def lower_mov(ins: Instruction, context: Context) -> Row | None:
    """Lower ``mov``: register to register, literals, special registers, packing and unpacking of vectors."""
    with Opcode(ins) as op:
        kind = op.last()
    d, a = expect(ins, 2)
    if isinstance(d, Vector):
        return _unpack(kind, d, a)
    if isinstance(a, Vector):
        return _pack(kind, d, a)
    if not isinstance(a, (Reg, Imm, Special)):
        return None
    width = "b32" if kind == "pred" else untyped(kind)
    if width not in ("b16", "b32", "b64"):
        return None
    return Row("mov_b64" if width == "b64" else "mov_b32", [write(d, kind)], [read(a, kind)])


PARTS = {("b16", 2): 8, ("b32", 2): 16, ("b32", 4): 8, ("b64", 2): 32, ("b64", 4): 16}


def _pack(kind: str, d: Operand, a: Vector) -> Row | None:
    bits = PARTS.get((kind, len(a.items)))
    if bits is None:
        return None
    srcs = [read(item, f"b{bits}") for item in a.items]
    return Row(f"pack_{len(srcs)}x{bits}", [write(d, kind)], srcs)


def _unpack(kind: str, d: Vector, a: Operand) -> Row | None:
    bits = PARTS.get((kind, len(d.items)))
    if bits is None:
        return None
    return Row(f"unpack_{len(d.items)}x{bits}", [write(item, f"b{bits}") for item in d.items], [read(a, kind)])

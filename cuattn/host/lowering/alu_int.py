"""Integer arithmetic: add, sub, mul, mad, div, rem, abs, neg, min, max, sad, dot products, carry chains."""

from __future__ import annotations

from ..ptx_types import Const, Imm, Instruction, Reg, Row
from .context import Context
from .modifiers import ZERO, Opcode, bits_of, expect, read, untyped, write
from .rules import rule

INT_TYPES = frozenset({"s16", "u16", "s32", "u32", "s64", "u64"})
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
SIGN_MATTERS = frozenset({"div", "rem", "min", "max", "sad", "mul.hi", "mad.hi"})
CARRY = Reg("%cc", "pred")  # CC.CF, a value a lane


def _is_int(ins: Instruction) -> bool:
    return ins.parts[-1] in INT_TYPES


def _row(name: str, ins: Instruction, types: str | tuple[str, ...]) -> Row:
    """Make a row with the destination first; ``types`` has one type, or one for each operand."""
    each = (types,) * len(ins.operands) if isinstance(types, str) else types
    operands = expect(ins, len(each))
    srcs = [read(operand, kind) for operand, kind in zip(operands[1:], each[1:], strict=True)]
    return Row(name, [write(operands[0], each[0])], srcs)


def _name(operation: str, kind: str) -> str:
    suffix = kind if operation in SIGN_MATTERS else untyped(kind)
    return f"{operation.replace('.', '_')}_{suffix}"


@rule("add", "sub")
def lower_add(ins: Instruction, context: Context) -> Row | list[Row] | None:
    kind = ins.parts[-1]
    if kind in ("u16x2", "s16x2"):
        if ins.parts[0] != "add" or len(ins.parts) != 2:
            return None
        expect(ins, 3)
        return _row("add_b16x2", ins, kind)
    if not _is_int(ins):
        return None
    if "cc" in ins.parts:
        return lower_carry(ins, context)
    with Opcode(ins) as op:
        op.last()
        saturate = op.take("sat")
    reg, base, distance = expect(ins, 3)
    if base in context.param_registers and isinstance(reg, Reg) and isinstance(distance, Imm) and ins.parts[0] == "add":
        # The compiler addresses the fields of a large parameter from somewhere in its middle.
        context.param_registers[reg] = context.param_registers[base] + distance.value
    if saturate:
        return _row(f"{ins.parts[0]}_sat_s32", ins, kind) if kind == "s32" else None
    return _row(_name(ins.parts[0], kind), ins, kind)


@rule("addc", "subc")
def lower_carry(ins: Instruction, context: Context) -> Row | None:
    """Lower add.cc, addc, addc.cc and the same of sub to one handler; an unused carry is zero, or goes nowhere."""
    with Opcode(ins) as op:
        kind = op.last()
        carry_out = op.take("cc")
    if kind not in ("s32", "u32", "b32", "s64", "u64"):
        return None
    d, a, b = expect(ins, 3)
    base = ins.parts[0]
    # A subtraction adds the complement and 1.
    carry_in = CARRY if base.endswith("c") else Const(int(base == "sub"))
    dsts = [write(d, kind), CARRY if carry_out else None]
    name = f"{base[:3]}c_{untyped(kind)}"
    return Row(name, dsts, [read(a, kind), read(b, kind), carry_in])


@rule("mul", "mad", "mul24", "mad24", "madc")
def lower_mul(ins: Instruction, context: Context) -> Row | list[Row] | None:
    if not _is_int(ins):
        return None
    base = ins.parts[0]
    with Opcode(ins) as op:
        kind = op.last()
        part = op.take("lo", "hi", "wide")
        carry_out, saturate = op.take("cc"), op.take("sat")
    if not part:
        return None
    expect(ins, 4 if base.startswith("mad") else 3)
    if base in ("mul24", "mad24"):
        return _mul24(ins, context, kind, part) if not carry_out and not saturate else None
    if base == "madc" or carry_out:
        return _mad_carry(ins, context, kind, part, bool(carry_out)) if not saturate else None
    if saturate:
        return _row("mad_hi_sat_s32", ins, kind) if (base, part, kind) == ("mad", "hi", "s32") else None
    if part == "wide":
        types = (WIDER[kind], kind, kind, WIDER[kind]) if kind in WIDER else ()
        return _row(f"{base}_wide_{kind}", ins, types[: len(ins.operands)]) if types else None
    return _row(_name(f"{base}.{part}", kind), ins, kind)


def _mul24(ins: Instruction, context: Context, kind: str, part: str) -> Row | list[Row] | None:
    if kind not in ("s32", "u32") or part == "wide":
        return None
    name = f"mul24_{part}_{kind}"
    if ins.parts[0] == "mul24":
        return _row(name, ins, kind)
    d, a, b, c = ins.operands
    product = context.new_register("b32")
    return [
        Row(name, [product], [read(a, kind), read(b, kind)]),
        Row("add_b32", [write(d, kind)], [product, read(c, kind)]),
    ]


def _mad_carry(ins: Instruction, context: Context, kind: str, part: str, carry_out: bool) -> list[Row] | None:
    if part == "wide" or kind in ("s16", "u16"):
        return None
    d, a, b, c = ins.operands
    product = context.new_register(untyped(kind))
    add = Row(
        f"addc_{untyped(kind)}",
        [write(d, kind), CARRY if carry_out else None],
        [product, read(c, kind), CARRY if ins.parts[0] == "madc" else ZERO],
    )
    return [Row(_name(f"mul.{part}", kind), [product], [read(a, kind), read(b, kind)]), add]


@rule("div", "rem", "min", "max", "sad")
def lower_binary(ins: Instruction, context: Context) -> Row | None:
    if ins.parts[0] in ("min", "max") and ins.parts[1:] in (("u16x2",), ("s16x2",)):
        expect(ins, 3)
        return _row("_".join(ins.parts), ins, ins.parts[1])
    if not _is_int(ins):
        return None
    with Opcode(ins) as op:
        kind = op.last()
    expect(ins, 4 if ins.parts[0] == "sad" else 3)
    # A zero-extended 16-bit value is a 32-bit one, so these need no handler of their own.
    name_kind = "u32" if kind == "u16" and ins.parts[0] != "sad" else kind
    return _row(_name(ins.parts[0], name_kind), ins, kind)


@rule("abs", "neg")
def lower_unary(ins: Instruction, context: Context) -> Row | None:
    if ins.parts[-1] not in ("s16", "s32", "s64"):
        return None
    with Opcode(ins) as op:
        kind = op.last()
    expect(ins, 2)
    return _row(f"abs_{kind}" if ins.parts[0] == "abs" else f"neg_b{bits_of(kind)}", ins, kind)


@rule("dp4a")
def lower_dp4a(ins: Instruction, context: Context) -> Row | None:
    with Opcode(ins) as op:
        second, first = op.last(), op.last()
    return _dot("dp4a", ins, first, second)


@rule("dp2a")
def lower_dp2a(ins: Instruction, context: Context) -> Row | None:
    with Opcode(ins) as op:
        second, first, half = op.last(), op.last(), op.take("lo", "hi")
    return _dot(f"dp2a_{half}", ins, first, second) if half else None


def _dot(name: str, ins: Instruction, first: str, second: str) -> Row | None:
    if first not in ("s32", "u32") or second not in ("s32", "u32"):
        return None
    expect(ins, 4)
    return _row(f"{name}_{first}_{second}", ins, "b32")

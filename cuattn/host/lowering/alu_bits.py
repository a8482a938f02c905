"""Logic, shifts, bit fields, byte permutation, counts."""

from __future__ import annotations

from ..ptx_types import Const, Instruction, Row
from .context import Context
from .modifiers import Opcode, bits_of, expect, read, write
from .rules import rule

PERMUTE_CONSTANTS = {0x5410: "prmt_5410", 0x7632: "prmt_7632"}  # the two that pack and split 16-bit pairs
PERMUTE_MODES = ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")


@rule("and", "or", "xor")
def lower_logic(ins: Instruction, context: Context) -> Row | None:
    with Opcode(ins) as op:
        kind = op.last()
    if kind not in ("pred", "b16", "b32", "b64"):
        return None
    d, a, b = expect(ins, 3)
    width = "b64" if kind == "b64" else "b32"
    return Row(f"{ins.parts[0]}_{width}", [write(d, kind)], [read(a, kind), read(b, kind)])


@rule("not", "cnot")
def lower_not(ins: Instruction, context: Context) -> Row | None:
    with Opcode(ins) as op:
        kind = op.last()
    base = ins.parts[0]
    if kind not in ("b16", "b32", "b64") and (base, kind) != ("not", "pred"):
        return None
    d, a = expect(ins, 2)
    suffix = "b32" if (base, kind) == ("cnot", "b16") else kind
    return Row(f"{base}_{suffix}", [write(d, kind)], [read(a, kind)])


@rule("shl", "shr")
def lower_shift(ins: Instruction, context: Context) -> Row | None:
    with Opcode(ins) as op:
        kind = op.last()
    if kind[0] not in ("bus" if ins.parts[0] == "shr" else "b") or kind[1:] not in ("16", "32", "64"):
        return None
    d, a, amount = expect(ins, 3)
    if ins.parts[0] == "shr" and kind[0] == "s":
        name = f"shr_{kind}"
    elif ins.parts[0] == "shr":
        name = "shr_u64" if kind[1:] == "64" else "shr_u32"
    else:
        name = f"shl_{kind}"
    return Row(name, [write(d, kind)], [read(a, kind), read(amount, "u32")])


@rule("shf")
def lower_funnel_shift(ins: Instruction, context: Context) -> Row | None:
    with Opcode(ins) as op:
        kind, direction, mode = op.last(), op.take("l", "r"), op.take("wrap", "clamp")
    if kind != "b32" or not direction or not mode:
        return None
    return _three(f"shf_{direction}_{mode}", ins)


@rule("lop3")
def lower_lop3(ins: Instruction, context: Context) -> Row | None:
    with Opcode(ins) as op:
        kind = op.last()
    if kind != "b32":
        return None
    d, a, b, c, table = expect(ins, 5)
    srcs = [read(operand, kind) for operand in (a, b, c)]
    number = read(table, "u32")
    return Row("lop3_b32", [write(d, kind)], srcs, [number.bits]) if isinstance(number, Const) else None


@rule("prmt")
def lower_permute(ins: Instruction, context: Context) -> Row | None:
    with Opcode(ins) as op:
        mode, kind = op.take(*PERMUTE_MODES), op.last()  # the mode stands after the type
    if kind != "b32":
        return None
    d, a, b, selector = expect(ins, 4)
    choice = read(selector, kind)
    if not mode and isinstance(choice, Const) and choice.bits & 0xFFFF in PERMUTE_CONSTANTS:
        return Row(PERMUTE_CONSTANTS[choice.bits & 0xFFFF], [write(d, kind)], [read(a, kind), read(b, kind)])
    return _three(f"prmt_{mode}" if mode else "prmt", ins)


@rule("bfe")
def lower_extract(ins: Instruction, context: Context) -> Row | None:
    with Opcode(ins) as op:
        kind = op.last()
    if kind not in ("u32", "s32", "u64", "s64"):
        return None
    d, a, pos, length = expect(ins, 4)
    srcs = [read(a, kind), read(pos, "u32"), read(length, "u32")]
    return Row(f"bfe_{kind}", [write(d, kind)], srcs)


@rule("bfi")
def lower_insert(ins: Instruction, context: Context) -> Row | None:
    with Opcode(ins) as op:
        kind = op.last()
    if kind not in ("b32", "b64"):
        return None
    d, a, b, pos, length = expect(ins, 5)
    srcs = [read(a, kind), read(b, kind), read(pos, "u32"), read(length, "u32")]
    return Row(f"bfi_{kind}", [write(d, kind)], srcs)


@rule("popc", "clz", "brev")
def lower_count(ins: Instruction, context: Context) -> Row | None:
    with Opcode(ins) as op:
        kind = op.last()
    if kind not in ("b32", "b64"):
        return None
    d, a = expect(ins, 2)
    result = kind if ins.parts[0] == "brev" else "u32"
    return Row(f"{ins.parts[0]}_{kind}", [write(d, result)], [read(a, kind)])


@rule("bfind")
def lower_find(ins: Instruction, context: Context) -> Row | None:
    with Opcode(ins) as op:
        kind, shift = op.last(), op.take("shiftamt")
    if kind[0] not in "us" or bits_of(kind) not in (32, 64):
        return None
    d, a = expect(ins, 2)
    return Row(f"bfind_{'shiftamt_' if shift else ''}{kind}", [write(d, "u32")], [read(a, kind)])


def _three(name: str, ins: Instruction) -> Row:
    d, a, b, c = expect(ins, 4)
    return Row(name, [write(d, "b32")], [read(operand, "b32") for operand in (a, b, c)])

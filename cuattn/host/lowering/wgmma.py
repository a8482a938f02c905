"""wgmma: matrix products of a warpgroup.

A row's operands: A (a descriptor, or four registers), B's descriptor, scale-d. The accumulators are its side registers,
and A's registers once more: both belong to the operation until the warp has waited for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ptx_types import Const, Imm, Instruction, Operand, Reg, Row, Source, Vector
from .context import Context
from .modifiers import read
from .rules import rule

# c/wgmma_types.h
_TYPES = {name: number for number, name in enumerate(("f16", "bf16", "tf32", "e4m3", "e5m2", "s8", "u8"))}
_ACCUMULATORS = {"f32": 0, "f16": 1, "s32": 2}
A_REGISTERS, A_MN_MAJOR, B_MN_MAJOR, NEGATIVE, SATURATE = 0x100, 0x200, 0x400, 0x800, 0x1000

# type of A → types of B that go with it, accumulators, k
_FP8, _INT8 = ("e4m3", "e5m2"), ("s8", "u8")
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], int]] = {
    "f16": (("f16",), ("f32", "f16"), 16),
    "bf16": (("bf16",), ("f32",), 16),
    "tf32": (("tf32",), ("f32",), 8),
    "e4m3": (_FP8, ("f32", "f16"), 32),
    "e5m2": (_FP8, ("f32", "f16"), 32),
    "s8": (_INT8, ("s32",), 32),
    "u8": (_INT8, ("s32",), 32),
}
_INTEGER_N = frozenset({8, 24, *range(16, 257, 16)})


@rule("wgmma")
def lower_wgmma(ins: Instruction, context: Context) -> Row | None:
    parts = ins.parts
    if parts[1:] == ("fence", "sync", "aligned"):
        return Row("wgmma_fence")
    if parts[1:] == ("commit_group", "sync", "aligned"):
        return Row("wgmma_commit")
    if parts[1:] == ("wait_group", "sync", "aligned"):
        return Row("wgmma_wait", numbers=[_immediate(ins.operands[0], "the number of groups", range(8))])
    if parts[1:4] != ("mma_async", "sync", "aligned"):
        return None
    return _lower_product(ins, [p for p in parts[4:] if p != "satfinite"], "satfinite" in parts)


def _lower_product(ins: Instruction, parts: Sequence[str], saturate: bool) -> Row:
    if len(parts) != 4 or parts[2] not in _KINDS:
        raise ValueError("not one of the shapes and types of wgmma.mma_async")
    shape, d_type, a_type, b_type = parts
    b_types, d_types, k = _KINDS[a_type]
    integer = d_type == "s32"
    if b_type not in b_types or d_type not in d_types or (saturate and not integer):
        raise ValueError(f"no wgmma.mma_async with types .{d_type}.{a_type}.{b_type}")
    n = _columns(shape, k, integer)
    d, a, b, scale_d, *immediates = ins.operands
    flags = _TYPES[a_type] | _TYPES[b_type] << 3 | _ACCUMULATORS[d_type] << 6 | n // 8 << 16
    accumulators = _registers(d, n // (4 if d_type == "f16" else 2), "D")
    fragments: list[Reg] = []
    if isinstance(a, Vector):
        fragments = _registers(a, 4, "A")
        flags |= A_REGISTERS
    flags |= SATURATE * saturate | _immediate_flags(immediates, integer, k == 16, bool(fragments))
    left: list[Source] = [*fragments] if fragments else [_descriptor(a), 0, 0, 0]
    scale = Const(int(scale_d.value != 0)) if isinstance(scale_d, Imm) else read(scale_d, "pred")
    return Row("wgmma", srcs=[*left, _descriptor(b), scale], flags=flags, side=[*accumulators, *fragments])


def _columns(shape: str, k: int, integer: bool) -> int:
    """Read n of ``m64nNkK``."""
    digits = shape.removeprefix("m64n").removesuffix(f"k{k}")
    if shape != f"m64n{digits}k{k}" or not digits.isdigit():
        raise ValueError(f"shape .{shape} does not go with these types (m64nNk{k})")
    n = int(digits)
    if not 8 <= n <= 256 or n % 8 or (integer and n not in _INTEGER_N):
        raise ValueError(f"n = {n} in shape .{shape}")
    return n


def _registers(operand: Operand, count: int, name: str) -> list[Reg]:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    registers = [x for x in items if isinstance(x, Reg) and not x.wide and x.type != "pred"]
    if len(registers) != count or len(items) != count:
        raise ValueError(f"{name} takes {count} 32-bit registers")
    if len(set(registers)) != count:
        raise ValueError(f"{name} names a register twice")
    return registers


def _descriptor(operand: Operand) -> Source:
    return read(operand, "b64")


def _immediate(operand: Operand, name: str, allowed: Sequence[int]) -> int:
    if not isinstance(operand, Imm) or operand.value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}")
    return operand.value


def _immediate_flags(immediates: Sequence[Operand], integer: bool, sixteen_bit: bool, a_in_registers: bool) -> int:
    """Read imm-scale-a and -b (not for integers), then imm-trans-a (A in memory) and -b (16-bit types only)."""
    names = [] if integer else ["imm-scale-a", "imm-scale-b"]
    if sixteen_bit:
        names += ["imm-trans-b"] if a_in_registers else ["imm-trans-a", "imm-trans-b"]
    if len(immediates) != len(names):
        raise ValueError(f"{len(immediates)} immediates behind scale-d instead of {len(names)} ({', '.join(names)})")
    flags = 0
    for operand, name in zip(immediates, names, strict=True):
        if name.startswith("imm-scale"):
            flags ^= NEGATIVE if _immediate(operand, name, (-1, 1)) == -1 else 0
        else:
            flags |= (A_MN_MAJOR if name == "imm-trans-a" else B_MN_MAJOR) * _immediate(operand, name, (0, 1))
    return flags

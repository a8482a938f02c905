"""The register of lowering rules: PTX opcode → rows.

A rule is a function ``rule(ins, context) -> Row | list[Row] | None`` registered for the first part of an opcode.
Several rules may serve one opcode (``cvt``, ``mov``); they are asked in order of registration, and ``None`` means
"not mine". An instruction that no rule takes is an `UnsupportedPTXError`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..ptx_types import WIDE_TYPES, Const, Imm, Instruction, Operand, Reg, Row, Sink, Source, Special

if TYPE_CHECKING:
    from .context import Context

Rule = Callable[[Instruction, "Context"], Row | list[Row] | None]

RULES: dict[str, list[Rule]] = {}


def rule(*opcodes: str) -> Callable[[Rule], Rule]:
    """Register a lowering rule for instructions whose opcode starts with one of ``opcodes``."""

    def register(function: Rule) -> Rule:
        for opcode in opcodes:
            RULES.setdefault(opcode, []).append(function)
        return function

    return register


def source(operand: Operand, type_name: str) -> Source:
    """Return an operand read as ``type_name``: a register, a special register, or a constant with the right bits."""
    if isinstance(operand, (Reg, Special)):
        return operand
    if isinstance(operand, Imm):
        return Const(immediate_bits(operand, type_name), type_name in WIDE_TYPES)
    raise ValueError(f"cannot read {operand!r} as .{type_name}")


_SIZES = ("8", "16", "32", "64")  # bits of a type


def immediate_bits(imm: Imm, type_name: str) -> int:
    """Return the bits of a literal in a slot of ``type_name`` (narrow integers zero extended)."""
    bits = 32
    if type_name[1:].isdigit():
        if type_name[1:] not in _SIZES:
            raise ValueError(f"there is no type .{type_name:.20}")
        bits = int(type_name[1:])
    if type_name == "pred":
        return int(imm.value != 0)
    if type_name == "f64" and imm.float_width == 32:
        raise ValueError("a 32-bit float literal where .f64 is expected")
    return imm.value & ((1 << bits) - 1)


def destination(operand: Operand) -> Reg | None:
    """Return a destination operand: a register, or ``None`` for the bit bucket."""
    if isinstance(operand, Reg):
        return operand
    if isinstance(operand, Sink):
        return None
    raise ValueError(f"cannot write to {operand!r}")


def policy_check(policy: Operand) -> Row:
    """Make the check of an instruction's cache policy: a row before that of the instruction."""
    return Row("cache_policy", srcs=[source(policy, "b64")])

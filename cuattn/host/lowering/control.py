"""Branches, exits, barriers, and instructions that need no handler."""

from __future__ import annotations

from ..ptx_types import Const, Imm, Instruction, Label, Negated, Row, Source
from .context import Context
from .rules import destination, rule, source

# c/control.c
BARRIER_SYNC, BARRIER_ARRIVE, BARRIER_RED_POPC, BARRIER_RED_AND, BARRIER_RED_OR = range(5)


@rule("bra")
def lower_bra(ins: Instruction, context: Context) -> Row | None:
    if ins.parts not in (("bra",), ("bra", "uni")) or not isinstance(ins.operands[0], Label):
        return None
    return Row("bra", srcs=[ins.operands[0]])


@rule("ret", "exit")
def lower_exit(ins: Instruction, context: Context) -> Row | None:
    return Row("exit") if ins.parts in (("ret",), ("ret", "uni"), ("exit",)) else None


@rule("trap", "brkpt")
def lower_trap(ins: Instruction, context: Context) -> Row:
    return Row("trap")


@rule("nanosleep", "prefetch", "prefetchu", "griddepcontrol", "setmaxnreg", "applypriority", "discard")
def lower_hint(ins: Instruction, context: Context) -> Row | None:
    """Hints about time and caches: no effect on what a kernel computes."""
    return None if ins.parts[0] == "discard" else Row("nop")


@rule("bar", "barrier")
def lower_barrier(ins: Instruction, context: Context) -> Row | None:
    parts = tuple(p for p in ins.parts[1:] if p not in ("aligned", "cta"))
    operands = ins.operands
    if parts == ("warp", "sync"):
        return Row("warp_sync", srcs=[source(operands[0], "b32")])
    if parts in (("sync",), ("arrive",)):
        kind = BARRIER_SYNC if parts[0] == "sync" else BARRIER_ARRIVE
        return Row("bar", srcs=_barrier_operands(operands), flags=kind)
    if len(parts) == 3 and parts[0] == "red":
        kinds = {"popc": BARRIER_RED_POPC, "and": BARRIER_RED_AND, "or": BARRIER_RED_OR}
        predicate = operands[-1]
        if isinstance(predicate, Negated):
            return None
        srcs = [*_barrier_operands(operands[1:-1]), source(predicate, "pred")]
        return Row("bar", [destination(operands[0])], srcs, flags=kinds[parts[1]])
    return None


def _barrier_operands(operands: tuple[object, ...]) -> list[Source]:
    number = source(operands[0], "b32")  # type: ignore[arg-type]
    count = source(operands[1], "b32") if len(operands) > 1 else Const(0)  # type: ignore[arg-type]
    return [number, count]


@rule("membar", "fence")
def lower_fence(ins: Instruction, context: Context) -> Row | None:
    if ins.parts[0] == "membar":
        return Row("fence") if ins.parts[1:] in (("gl",), ("cta",), ("sys",)) else None
    orders, scopes = {"sc", "acq_rel", "acquire", "release"}, {"cta", "gpu", "sys", "cluster"}
    if len(ins.parts) == 3 and ins.parts[1] in orders and ins.parts[2] in scopes:
        return Row("fence")
    return None


@rule("isspacep")
def lower_isspacep(ins: Instruction, context: Context) -> Row | None:
    spaces = {"global": 1, "shared": 2, "shared::cta": 2, "local": 3}
    if ins.parts[1] not in spaces or isinstance(ins.operands[1], Imm):
        return None
    srcs = [source(ins.operands[1], "b64")]
    return Row("isspacep", [destination(ins.operands[0])], srcs, flags=spaces[ins.parts[1]])

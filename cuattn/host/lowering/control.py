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


@rule("nanosleep", "prefetch", "prefetchu", "griddepcontrol", "applypriority", "discard")
def lower_hint(ins: Instruction, context: Context) -> Row | None:
    """Lower hints about time and caches to nothing: they have no effect on what a kernel computes."""
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


_PROXY_SPACES = ((), ("global",), ("shared::cta",), ("shared::cluster",))


@rule("membar", "fence")
def lower_fence(ins: Instruction, context: Context) -> Row | None:
    parts = ins.parts[1:]
    if ins.parts[0] == "membar":
        return Row("fence") if parts in (("gl",), ("cta",), ("sys",)) else None
    if parts[:2] == ("proxy", "async"):
        return Row("proxy_fence") if parts[2:] in _PROXY_SPACES else None
    if parts[0] == "proxy":
        # Between the generic proxy and tensor maps or virtual aliases: no effect on what is executed here.
        return Row("nop") if parts[1] in ("alias", "tensormap::generic") else None
    if parts == ("mbarrier_init", "release", "cluster"):
        return Row("mbarrier_fence")
    orders, scopes = {"sc", "acq_rel", "acquire", "release"}, {"cta", "gpu", "sys", "cluster"}
    if len(parts) == 2 and parts[0] in orders and parts[1] in scopes:
        return Row("fence")
    return None


@rule("setmaxnreg")
def lower_setmaxnreg(ins: Instruction, context: Context) -> Row | None:
    count = ins.operands[0]
    if len(ins.parts) != 5 or ins.parts[1] not in ("inc", "dec") or ins.parts[2:] != ("sync", "aligned", "u32"):
        return None
    if not isinstance(count, Imm) or not 24 <= count.value <= 256 or count.value % 8:
        raise ValueError("the number of registers must be a multiple of 8 from 24 to 256")
    if not context.entry_registers:
        raise ValueError("without launch bounds (or .maxnreg) the kernel's registers are unknown and ptxas ignores it")
    return Row("setmaxnreg", numbers=[count.value], flags=ins.parts[1] == "inc")


@rule("isspacep")
def lower_isspacep(ins: Instruction, context: Context) -> Row | None:
    spaces = {"global": 1, "shared": 2, "shared::cta": 2, "local": 3, "shared::cluster": 5}
    if ins.parts[1] not in spaces or isinstance(ins.operands[1], Imm):
        return None
    srcs = [source(ins.operands[1], "b64")]
    return Row("isspacep", [destination(ins.operands[0])], srcs, flags=spaces[ins.parts[1]])

"""mbarrier objects: phases of arrivals and of transaction bytes."""

from __future__ import annotations

from ..ptx_types import Const, Instruction, Operand, Row, Sink, Source
from .context import Context
from .memory import SPACES, address
from .rules import destination, rule, source

# c/mbarrier.c
EXPECT, COMPLETE, ARRIVE, DROP, NO_COMPLETE, RELAXED, CLUSTER, TOKEN, PARITY = (16 << k for k in range(9))

_SPACES = ("shared", "shared::cta", "shared::cluster")


def _modifiers(ins: Instruction, operations: tuple[str, ...]) -> tuple[set[str], int, int] | None:
    """Read an opcode: operations, flags, state space; None for a modifier that is not understood."""
    found, flags, space = set(), 0, 0
    if ins.parts[-1] != "b64":
        return None
    for part in ins.parts[1:-1]:
        if part in operations:
            found.add(part)
        elif part in _SPACES:
            space = SPACES["shared"]
            flags |= CLUSTER if part == "shared::cluster" else 0
        elif part == "relaxed":
            flags |= RELAXED
        elif part not in ("acquire", "release", "cta", "cluster"):
            return None
    return found, flags, space


def _place(operand: Operand, context: Context, space: int) -> tuple[list[Source], int]:
    slot, offset, wide = address(operand, context, space)
    return [slot, offset], wide | space


@rule("mbarrier")
def lower_mbarrier(ins: Instruction, context: Context) -> Row | None:
    if ins.parts == ("mbarrier", "pending_count", "b64"):
        return Row("mbarrier_pending_count", [destination(ins.operands[0])], [source(ins.operands[1], "b64")])
    operation = ins.parts[1]
    if operation in ("init", "inval"):
        modifiers = _modifiers(ins, ("init", "inval"))
        if modifiers is None:
            return None
        srcs, flags = _place(ins.operands[0], context, modifiers[2])
        if operation == "init":
            srcs.append(source(ins.operands[1], "u32"))
        return Row(f"mbarrier_{operation}", srcs=srcs, flags=flags)
    if operation in ("test_wait", "try_wait"):
        return _lower_wait(ins, context)
    return _lower_arrive(ins, context)


def _lower_wait(ins: Instruction, context: Context) -> Row | None:
    modifiers = _modifiers(ins, ("test_wait", "try_wait", "parity"))
    if modifiers is None or modifiers[1] & CLUSTER:
        return None
    operations, flags, space = modifiers
    srcs, where = _place(ins.operands[1], context, space)
    parity = "parity" in operations
    srcs.append(source(ins.operands[2], "u32" if parity else "b64"))
    return Row("mbarrier_wait", [destination(ins.operands[0])], srcs, flags=flags | where | (PARITY if parity else 0))


def _lower_arrive(ins: Instruction, context: Context) -> Row | None:
    modifiers = _modifiers(ins, ("arrive", "arrive_drop", "expect_tx", "complete_tx", "noComplete"))
    if modifiers is None:
        return None
    operations, flags, space = modifiers
    arrives = bool(operations & {"arrive", "arrive_drop"})
    has_token = arrives and not isinstance(ins.operands[0], Sink)
    operands = ins.operands[1:] if arrives else ins.operands
    expects = "expect_tx" in operations
    flags |= (ARRIVE if arrives else 0) | (DROP if "arrive_drop" in operations else 0) | (TOKEN if has_token else 0)
    flags |= (EXPECT if expects else 0) | (COMPLETE if "complete_tx" in operations else 0)
    flags |= NO_COMPLETE if "noComplete" in operations else 0
    if has_token and flags & CLUSTER:
        raise ValueError("an arrival at an mbarrier of another CTA returns no state")
    if space == 0:
        flags |= CLUSTER if not has_token else 0
    number = source(operands[1], "u32") if len(operands) > 1 else Const(1)
    counts = arrives and not expects
    srcs, where = _place(operands[0], context, space)
    srcs += [number, Const(0)] if counts else [Const(1), number]
    return Row("mbarrier_arrive", [destination(ins.operands[0])] if has_token else [], srcs, flags=flags | where)


NOINC = 16  # c/async.c


@rule("cp")
def lower_cp_async_arrive(ins: Instruction, context: Context) -> Row | None:
    """Lower an arrival that happens when the thread's earlier cp.async have landed."""
    if ins.parts[:4] != ("cp", "async", "mbarrier", "arrive") or ins.parts[-1] != "b64":
        return None
    flags, space = 0, 0
    for part in ins.parts[4:-1]:
        if part == "noinc":
            flags |= NOINC
        elif part in ("shared", "shared::cta"):
            space = SPACES["shared"]
        else:
            return None
    srcs, where = _place(ins.operands[0], context, space)
    return Row("cp_async_arrive", srcs=srcs, flags=flags | where)

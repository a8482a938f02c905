"""Clusters: addresses in the shared memory of other CTAs, and the barrier of all their threads."""

from __future__ import annotations

from ..ptx_types import Const, Instruction, Row, Source, Symbol
from .context import GENERIC_SHARED, Context
from .rules import destination, rule, source

WIDE, GENERIC = 1, 2  # c/cluster.c
ALIGNED, RELAXED = 1, 2


@rule("mapa", "getctarank")
def lower_mapa(ins: Instruction, context: Context) -> Row | None:
    *space, type_name = ins.parts[1:]
    if tuple(space) not in ((), ("shared::cluster",)) or type_name not in ("u32", "u64"):
        return None
    flags = (WIDE if type_name == "u64" else 0) | (0 if space else GENERIC)
    start = ins.operands[1]
    value: Source
    if isinstance(start, Symbol):
        base = context.shared[start.name] + (0 if space else GENERIC_SHARED)
        value = Const(base, type_name == "u64")
    else:
        value = source(start, type_name)
    if ins.parts[0] == "getctarank":
        return Row("getctarank", [destination(ins.operands[0])], [value], flags=flags)
    return Row("mapa", [destination(ins.operands[0])], [value, source(ins.operands[2], "u32")], flags=flags)


@rule("barrier")
def lower_cluster_barrier(ins: Instruction, context: Context) -> Row | None:
    parts = ins.parts[1:]
    if len(parts) < 2 or parts[0] != "cluster" or parts[1] not in ("arrive", "wait"):
        return None
    orders = ("release", "relaxed") if parts[1] == "arrive" else ("acquire", "relaxed")
    if any(part not in (*orders, "aligned") for part in parts[2:]):
        return None
    flags = (ALIGNED if "aligned" in parts else 0) | (RELAXED if "relaxed" in parts else 0)
    return Row(f"cluster_{parts[1]}", flags=flags)

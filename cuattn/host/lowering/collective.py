"""Warp-level instructions: shuffles, votes, matches, reductions."""

from __future__ import annotations

from ..ptx_types import Instruction, Negated, Operand, Pair, Reg, Row
from .context import Context
from .rules import destination, rule, source

_SHUFFLES = ("up", "down", "bfly", "idx")
_VOTES = ("all", "any", "uni", "ballot")
_REDUCTIONS = {
    ("add", "u32"): 0, ("add", "s32"): 0, ("min", "u32"): 1, ("max", "u32"): 2, ("min", "s32"): 3, ("max", "s32"): 4,
    ("and", "b32"): 5, ("or", "b32"): 6, ("xor", "b32"): 7,
}  # fmt: skip
WANT_PREDICATE = 8


def _pair(operand: Operand) -> tuple[Reg | None, Reg | None, int]:
    """Split ``d|p`` into its two destinations, and the flag that says whether the second is wanted."""
    if isinstance(operand, Pair):
        second = destination(operand.second)
        return destination(operand.first), second, WANT_PREDICATE if second else 0
    return destination(operand), None, 0


@rule("shfl")
def lower_shfl(ins: Instruction, context: Context) -> Row | None:
    if len(ins.parts) != 4 or ins.parts[1] != "sync" or ins.parts[2] not in _SHUFFLES or ins.parts[3] != "b32":
        return None
    dst, pred, want = _pair(ins.operands[0])
    srcs = [source(x, "b32") for x in ins.operands[1:]]
    return Row("shfl", [dst, pred], srcs, flags=_SHUFFLES.index(ins.parts[2]) | want)


@rule("vote")
def lower_vote(ins: Instruction, context: Context) -> Row | None:
    if len(ins.parts) != 4 or ins.parts[1] != "sync" or ins.parts[2] not in _VOTES:
        return None
    predicate = ins.operands[1]
    negated = isinstance(predicate, Negated)
    value = predicate.reg if isinstance(predicate, Negated) else source(predicate, "pred")
    flags = _VOTES.index(ins.parts[2]) | (8 if negated else 0)
    return Row("vote", [destination(ins.operands[0])], [value, source(ins.operands[2], "b32")], flags=flags)


@rule("match")
def lower_match(ins: Instruction, context: Context) -> Row | None:
    if len(ins.parts) != 4 or ins.parts[2] != "sync" or ins.parts[3] not in ("b32", "b64"):
        return None
    dst, pred, want = _pair(ins.operands[0])
    flags = (1 if ins.parts[1] == "all" else 0) | (2 if ins.parts[3] == "b64" else 0) | want
    srcs = [source(ins.operands[1], ins.parts[3]), source(ins.operands[2], "b32")]
    return Row("match", [dst, pred], srcs, flags=flags)


@rule("redux")
def lower_redux(ins: Instruction, context: Context) -> Row | None:
    if len(ins.parts) != 4 or (ins.parts[2], ins.parts[3]) not in _REDUCTIONS:
        return None
    srcs = [source(ins.operands[1], "b32"), source(ins.operands[2], "b32")]
    return Row("redux", [destination(ins.operands[0])], srcs, flags=_REDUCTIONS[ins.parts[2], ins.parts[3]])


@rule("activemask")
def lower_activemask(ins: Instruction, context: Context) -> Row:
    return Row("activemask", [destination(ins.operands[0])])


@rule("elect")
def lower_elect(ins: Instruction, context: Context) -> Row | None:
    operand = ins.operands[0]
    if not isinstance(operand, Pair):
        return None
    dst, pred = destination(operand.first), destination(operand.second)
    return Row("elect", [dst, pred], [source(ins.operands[1], "b32")], flags=8 if dst else 0)

"""Bulk copies by the TMA: cp.async.bulk, cp.reduce.async.bulk, their tensor forms, groups and hints."""

from __future__ import annotations

from ..ptx_types import Address, Const, Imm, Instruction, Operand, Row, Source, Vector
from .context import Context
from .memory import SPACES, address
from .rules import destination, policy_check, rule, source

# c/bulk_ops.c
WIDE_DST, WIDE_SRC, WIDE_MBARRIER, OWN_SHARED, REDUCES = 1, 2, 4, 8, 16
_OPERATIONS = {"add": 0, "min": 1, "max": 2, "and": 3, "or": 4, "xor": 5, "inc": 8, "dec": 9}
_TYPES = {"u32": 2, "b32": 2, "s32": 3, "u64": 4, "b64": 4, "s64": 5, "f16": 6, "f32": 7, "f64": 8, "bf16": 9}
_BITS, _HALVES = frozenset({"b32", "b64"}), frozenset({"f16", "bf16"})
_MINMAX = frozenset({"u32", "s32", "u64", "s64"}) | _HALVES
#: Element types of each operation on global memory (PTX ISA, cp.reduce.async.bulk); on shared memory there are fewer.
_GLOBAL_TYPES = {
    "add": frozenset({"u32", "s32", "u64", "f32", "f64"}) | _HALVES, "min": _MINMAX, "max": _MINMAX,
    "inc": frozenset({"u32"}), "dec": frozenset({"u32"}), "and": _BITS, "or": _BITS, "xor": _BITS,
}  # fmt: skip
_SHARED_TYPES = {
    "add": frozenset({"u32", "s32", "u64"}), "min": frozenset({"u32", "s32"}), "max": frozenset({"u32", "s32"}),
    "inc": frozenset({"u32"}), "dec": frozenset({"u32"}), "and": frozenset({"b32"}), "or": frozenset({"b32"}),
    "xor": frozenset({"b32"}),
}  # fmt: skip
#: What `createpolicy` makes of a whole access, as compilers write it out; op_cache_policy knows these words.
POLICIES = {
    "L2::evict_unchanged": 0x10F0 << 48, "L2::evict_first": 0x12F0 << 48, "L2::evict_last": 0x14F0 << 48,
    "L2::evict_normal": 0x16F0 << 48,
}  # fmt: skip
_DIMENSIONS = {f"{n}d": n for n in range(1, 6)}
_COMPLETES = "mbarrier::complete_tx::bytes"
_SHARED = ("shared::cluster", "shared::cta")


class _Parts:
    """The modifiers of an instruction, taken one after the other."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        self.parts = list(parts)

    def take(self, *allowed: str) -> str:
        """Take the next modifier, which must be one of ``allowed``."""
        if not self.parts or self.parts[0] not in allowed:
            found = self.parts[0] if self.parts else "nothing"
            raise ValueError(f"one of .{', .'.join(allowed)} expected, found {found}")
        return self.parts.pop(0)

    def optional(self, *allowed: str) -> bool:
        """Whether the next modifier is one of ``allowed``; if so it is taken."""
        if self.parts and self.parts[0] in allowed:
            self.parts.pop(0)
            return True
        return False

    def finish(self) -> None:
        if self.parts:
            raise ValueError(f"modifier .{self.parts[0]} is not supported here")


class _Operands:
    """Operands from the front, with the flags that their addresses bring."""

    def __init__(self, ins: Instruction, context: Context) -> None:
        self.items, self.context = list(ins.operands), context
        self.flags = 0
        self.policy: Operand | None = None

    def address(self, space: str, wide_flag: int) -> list[Source]:
        slot, offset, wide = address(self.items.pop(0), self.context, SPACES[space])
        self.flags |= wide_flag if wide else 0
        return [slot, offset]

    def number(self) -> Source:
        return source(self.items.pop(0), "b32")

    def tensor(self, rank: int, wide_flag: int) -> tuple[list[Source], list[Source]]:
        """Take ``[map, {coordinates}]``: the map's address, and the coordinates."""
        operand = self.items.pop(0)
        if not isinstance(operand, Address) or len(operand.extra) != 1 or not isinstance(operand.extra[0], Vector):
            raise ValueError("a tensor operand is [map, {coordinates}]")
        coordinates = operand.extra[0].items
        if len(coordinates) != rank:
            raise ValueError(f"{len(coordinates)} coordinates for {rank} dimensions")
        slot, offset, wide = address(Address(operand.base, operand.offset), self.context, SPACES["generic"])
        if not wide:
            raise ValueError("the address of a tensor map has 64 bits")
        self.flags |= wide_flag
        return [slot, offset], [source(x, "b32") for x in coordinates]

    def finish(self, has_hint: bool) -> None:
        """Take what is left: the cache policy."""
        if len(self.items) != int(has_hint):
            raise ValueError("wrong number of operands")
        self.policy = self.items.pop() if has_hint else None

    def checked(self, row: Row | None) -> Row | list[Row] | None:
        """Make the row, behind the check of its cache policy."""
        return [policy_check(self.policy), row] if row and self.policy else row


@rule("cp")
def lower_bulk(ins: Instruction, context: Context) -> Row | list[Row] | None:
    if ins.parts[1:3] != ("async", "bulk"):
        return None
    parts, operands = _Parts(ins.parts[3:]), _Operands(ins, context)
    return operands.checked(_bulk(parts, operands, ins))


def _bulk(parts: _Parts, operands: _Operands, ins: Instruction) -> Row | None:
    kind = parts.take("commit_group", "wait_group", "prefetch", "tensor", "global", *_SHARED)
    if kind == "commit_group":
        parts.finish()
        return Row("bulk_commit")
    if kind == "wait_group":
        only_reads = parts.optional("read")
        parts.finish()
        pending = ins.operands[0]
        return Row("bulk_wait", numbers=[pending.value], flags=int(only_reads)) if isinstance(pending, Imm) else None
    if kind == "prefetch":
        return _prefetch(parts, operands)
    if kind == "tensor":
        return _tensor(parts, operands)
    if kind == "global":
        parts.take("shared::cta")
        parts.take("bulk_group")
        return _store(parts, operands, 0)
    if parts.take("global", "shared::cta") == "global":
        return _load(parts, operands, OWN_SHARED if kind == "shared::cta" else 0)
    parts.take(_COMPLETES)
    return _copy(parts, operands, 0)


@rule("cp")
def lower_bulk_reduce(ins: Instruction, context: Context) -> Row | list[Row] | None:
    if ins.parts[1:4] != ("reduce", "async", "bulk"):
        return None
    parts, operands = _Parts(ins.parts[4:]), _Operands(ins, context)
    return operands.checked(_bulk_reduce(parts, operands))


def _bulk_reduce(parts: _Parts, operands: _Operands) -> Row:
    kind = parts.take("tensor", "global", "shared::cluster")
    if kind == "tensor":
        return _tensor_reduce(parts, operands)
    parts.take("shared::cta")
    parts.take("bulk_group" if kind == "global" else _COMPLETES)
    has_hint = kind == "global" and parts.optional("L2::cache_hint")
    operation = parts.take(*_OPERATIONS)
    no_flush = parts.optional("noftz")
    types = (_GLOBAL_TYPES if kind == "global" else _SHARED_TYPES)[operation]
    type_name = parts.take(*_TYPES)
    if type_name not in types and not (types & _BITS and "b" + type_name[1:] in types):
        raise ValueError(f".{operation} has no .{type_name}")
    if no_flush != (operation == "add" and type_name in _HALVES):
        raise ValueError(".noftz belongs to .add of .f16 and .bf16, and to nothing else")
    flags = REDUCES | _OPERATIONS[operation] << 8 | _TYPES[type_name] << 12
    if has_hint:
        parts.parts.append("L2::cache_hint")
    return _store(parts, operands, flags) if kind == "global" else _copy(parts, operands, flags)


def _load(parts: _Parts, operands: _Operands, flags: int) -> Row:
    parts.take(_COMPLETES)
    multicast = parts.optional("multicast::cluster")
    has_hint = parts.optional("L2::cache_hint")
    parts.finish()
    to, start = operands.address("shared", WIDE_DST), operands.address("global", WIDE_SRC)
    size = operands.number()
    mbarrier = operands.address("shared", WIDE_MBARRIER)
    mask = _mask(operands, multicast)
    operands.finish(has_hint)
    return Row("bulk_load", srcs=[*to, *start, *mbarrier, size, mask], flags=flags | operands.flags)


def _copy(parts: _Parts, operands: _Operands, flags: int) -> Row:
    parts.finish()
    to, start = operands.address("shared", WIDE_DST), operands.address("shared", WIDE_SRC)
    size = operands.number()
    mbarrier = operands.address("shared", WIDE_MBARRIER)
    operands.finish(False)
    return Row("bulk_copy", srcs=[*to, *start, *mbarrier, size], flags=flags | operands.flags)


def _store(parts: _Parts, operands: _Operands, flags: int) -> Row:
    has_hint = parts.optional("L2::cache_hint")
    parts.finish()
    to, start = operands.address("global", WIDE_DST), operands.address("shared", WIDE_SRC)
    size = operands.number()
    operands.finish(has_hint)
    return Row("bulk_store", srcs=[*to, *start, size], flags=flags | operands.flags)


def _tensor(parts: _Parts, operands: _Operands) -> Row:
    rank = _DIMENSIONS[parts.take(*_DIMENSIONS)]
    to_space = parts.take("global", *_SHARED)
    if to_space == "global":
        parts.take("shared::cta")
        _tile_mode(parts)
        parts.take("bulk_group")
        return _tensor_store(parts, operands, rank, 0)
    parts.take("global")
    _tile_mode(parts)
    parts.take(_COMPLETES)
    multicast = parts.optional("multicast::cluster")
    has_hint = parts.optional("L2::cache_hint")
    parts.finish()
    to = operands.address("shared", WIDE_DST)
    described, coordinates = operands.tensor(rank, WIDE_SRC)
    mbarrier = operands.address("shared", WIDE_MBARRIER)
    mask = _mask(operands, multicast)
    operands.finish(has_hint)
    flags = operands.flags | (OWN_SHARED if to_space == "shared::cta" else 0)
    return Row("bulk_tensor_load", srcs=[*to, *described, *mbarrier, mask, rank, *coordinates], flags=flags)


def _tensor_reduce(parts: _Parts, operands: _Operands) -> Row:
    rank = _DIMENSIONS[parts.take(*_DIMENSIONS)]
    parts.take("global")
    parts.take("shared::cta")
    operation = parts.take(*_OPERATIONS)
    _tile_mode(parts)
    parts.take("bulk_group")
    return _tensor_store(parts, operands, rank, REDUCES | _OPERATIONS[operation] << 8)


def _tensor_store(parts: _Parts, operands: _Operands, rank: int, flags: int) -> Row:
    has_hint = parts.optional("L2::cache_hint")
    parts.finish()
    described, coordinates = operands.tensor(rank, WIDE_DST)
    start = operands.address("shared", WIDE_SRC)
    operands.finish(has_hint)
    return Row("bulk_tensor_store", srcs=[*described, *start, rank, *coordinates], flags=flags | operands.flags)


def _prefetch(parts: _Parts, operands: _Operands) -> Row:
    if not parts.optional("tensor"):
        parts.take("L2")
        parts.take("global")
        has_hint = parts.optional("L2::cache_hint")
        parts.finish()
        start = operands.address("global", WIDE_SRC)
        size = operands.number()
        operands.finish(has_hint)
        return Row("bulk_prefetch", srcs=[*start, size], flags=operands.flags)
    rank = _DIMENSIONS[parts.take(*_DIMENSIONS)]
    parts.take("L2")
    parts.take("global")
    _tile_mode(parts)
    has_hint = parts.optional("L2::cache_hint")
    parts.finish()
    described, _ = operands.tensor(rank, WIDE_DST)
    operands.finish(has_hint)
    return Row("bulk_prefetch_map", srcs=[*described, rank], flags=operands.flags)


def _tile_mode(parts: _Parts) -> None:
    if parts.parts and parts.parts[0].startswith(("im2col", "tile::")):
        raise ValueError(f"mode .{parts.parts[0]} is not supported; .tile is")
    parts.optional("tile")


def _mask(operands: _Operands, multicast: bool) -> Source:
    return source(operands.items.pop(0), "b16") if multicast else -1


@rule("prefetch")
def lower_prefetch_tensormap(ins: Instruction, context: Context) -> Row | None:
    """Lower the prefetch of a tensor map: a hint, but it must be a tensor map that it names."""
    if ins.parts[-1] != "tensormap":
        return None
    slot, offset, wide = address(ins.operands[0], context, SPACES["generic"])
    return Row("bulk_prefetch_map", srcs=[slot, offset, 0], flags=WIDE_DST if wide else 0)


@rule("createpolicy")
def lower_createpolicy(ins: Instruction, context: Context) -> Row | None:
    """Lower createpolicy: a policy changes nothing here, but its word must be one that the hardware knows."""
    policy = destination(ins.operands[0])
    words = [POLICIES[part] for part in ins.parts if part in POLICIES]
    if policy is None or not policy.wide or ins.parts[-1] != "b64" or not words:
        return None
    return Row("mov_b64", [policy], [Const(words[0], True)])

"""Loads, stores, atomics, asynchronous copies, addresses."""

from __future__ import annotations

from ..ptx_types import Address, Const, Imm, Instruction, Operand, Reg, Row, Source, Special, Symbol, Vector
from .context import GENERIC_LOCAL, GENERIC_SHARED, Context
from .rules import destination, policy_check, rule, source

# c/memory_types.h
SPACES = {"generic": 0, "global": 1, "shared": 2, "shared::cta": 2, "local": 3, "param": 4, "const": 1,
          "shared::cluster": 5}  # fmt: skip
WIDE_ADDRESS, SIGNED, WIDE_REGISTER = 8, 64, 128
ACQUIRE, RELEASE, STRONG = 4096, 8192, 16384
SIZE_LOG2 = {"8": 0, "16": 1, "32": 2, "64": 3}

_CACHE_HINTS = {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1::evict_last", "L1::evict_first", "L1::no_allocate",
                "L1::evict_normal", "L1::evict_unchanged", "L2::64B", "L2::128B", "L2::256B",
                "L2::cache_hint"}  # fmt: skip
_SCOPES = {"cta", "cluster", "gpu", "sys"}


def address(operand: Operand, context: Context, space: int) -> tuple[Source, int, int]:
    """Read an address operand: its slot, its offset, and the flag that tells the slot's width."""
    if not isinstance(operand, Address) or operand.extra:
        raise ValueError(f"cannot address through {operand!r}")
    base = operand.base
    if isinstance(base, Reg):
        return base, operand.offset, WIDE_ADDRESS if base.wide else 0
    if isinstance(base, Imm):
        return Const(base.value + operand.offset & (1 << 64) - 1, True), 0, WIDE_ADDRESS
    if isinstance(base, Symbol):
        if base.name in context.shared and space in (0, 2, 5):
            value = context.shared[base.name] + (0 if space else GENERIC_SHARED)
            return Const(value, True), operand.offset, WIDE_ADDRESS
        if base.name in context.local and space in (0, 3):
            value = context.local[base.name] + (0 if space else GENERIC_LOCAL)
            return Const(value, True), operand.offset, WIDE_ADDRESS
        if base.name in context.module:
            return Const(0, True, base.name), operand.offset, WIDE_ADDRESS
    raise ValueError(f"cannot address through {operand!r}")


def _access(ins: Instruction) -> tuple[int, int, str, int] | None:
    """Read the opcode of an ld or st: space, flags, type, vector length; None for a modifier that is not understood."""
    parts = list(ins.parts[1:])
    type_name = parts.pop()
    space, flags, count = 0, 0, 1
    for part in parts:
        if part in SPACES:
            space = SPACES[part]
        elif part in ("v2", "v4", "v8"):
            count = int(part[1:])
        elif part == "relaxed":
            flags |= STRONG
        elif part == "acquire":
            flags |= STRONG | ACQUIRE
        elif part == "release":
            flags |= STRONG | RELEASE
        elif part not in _CACHE_HINTS and part not in _SCOPES and part not in ("weak", "volatile"):
            return None
    if type_name[1:] not in SIZE_LOG2:
        return None
    flags |= SIZE_LOG2[type_name[1:]] << 4 | count << 8 | (SIGNED if type_name[0] == "s" else 0)
    return space, flags, type_name, count


@rule("ld", "ldu")
def lower_ld(ins: Instruction, context: Context) -> Row | list[Row] | None:
    return _with_policy(ins, _load(ins, context))


def _with_policy(ins: Instruction, row: Row | None) -> Row | list[Row] | None:
    """Make the row of a load or store, behind the check of its cache policy."""
    has_policy = "L2::cache_hint" in ins.parts
    if row is None or has_policy != (len(ins.operands) == 3):
        return None
    return [policy_check(ins.operands[2]), row] if has_policy else row


def _load(ins: Instruction, context: Context) -> Row | None:
    access = _access(ins)
    if access is None:
        return None
    space, flags, type_name, count = access
    target = ins.operands[0]
    dsts = [destination(x) for x in (target.items if isinstance(target, Vector) else (target,))]
    if len(dsts) != count:
        return None
    widths = {reg.wide for reg in dsts if reg}
    if len(widths) > 1:
        return None
    wide = WIDE_REGISTER if True in widths else 0
    where = ins.operands[1]
    if space == SPACES["param"]:
        place = _param_offset(where, context)
        if place is not None:
            if place < 0 or place + (count << SIZE_LOG2[type_name[1:]]) > context.param_bytes:
                raise ValueError(f"it reads beyond the {context.param_bytes} bytes of parameters")
            return Row("ld_param", dsts, [place], flags=flags | wide)
        space = SPACES["global"]  # a computed address, of a parameter that is an array
    slot, offset, wide_address = address(where, context, space)
    return Row("ld", dsts, [slot, offset], flags=flags | wide | wide_address | space)


def _param_offset(where: Operand, context: Context) -> int | None:
    if not isinstance(where, Address):
        return None
    if isinstance(where.base, Symbol) and where.base.name in context.params:
        return context.params[where.base.name] + where.offset
    if isinstance(where.base, Reg) and where.base in context.param_registers:
        return context.param_registers[where.base] + where.offset
    return None


@rule("st")
def lower_st(ins: Instruction, context: Context) -> Row | list[Row] | None:
    return _with_policy(ins, _store(ins, context))


def _store(ins: Instruction, context: Context) -> Row | None:
    access = _access(ins)
    if access is None:
        return None
    space, flags, type_name, count = access
    value = ins.operands[1]
    items = value.items if isinstance(value, Vector) else (value,)
    if len(items) != count or space == SPACES["param"]:
        return None
    wide = any(isinstance(x, Reg) and x.wide for x in items) or type_name[1:] == "64"
    srcs = [source(x, "b64" if wide else "b" + type_name[1:]) for x in items]
    if wide and any(isinstance(x, Reg) and not x.wide for x in items):
        return None
    slot, offset, wide_address = address(ins.operands[0], context, space)
    flags |= (WIDE_REGISTER if wide else 0) | wide_address | space
    return Row("st", srcs=[slot, offset, *srcs], flags=flags)


_ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
_ATOMIC_TYPES = {"u32": 0, "b32": 0, "s32": 1, "u64": 2, "b64": 2, "s64": 3, "f32": 4, "f64": 5}


@rule("atom", "red")
def lower_atom(ins: Instruction, context: Context) -> Row | None:
    type_name = ins.parts[-1]
    space, flags, operation = 0, 0, None
    for part in ins.parts[1:-1]:
        if part in SPACES:
            space = SPACES[part]
        elif part in _ATOMICS:
            operation = _ATOMICS.index(part)
        elif part == "acq_rel":
            flags |= ACQUIRE | RELEASE
        elif part in ("acquire", "release"):
            flags |= ACQUIRE if part == "acquire" else RELEASE
        elif part not in _SCOPES and part != "relaxed":
            return None
    if operation is None or type_name not in _ATOMIC_TYPES:
        return None
    if type_name in ("f32", "f64") and operation != 0:
        return None
    has_dst = ins.parts[0] == "atom"
    operands = ins.operands[1:] if has_dst else ins.operands
    dsts = [destination(ins.operands[0])] if has_dst else []
    slot, offset, wide_address = address(operands[0], context, space)
    operand = source(operands[1], type_name)
    compare = source(operands[2], type_name) if len(operands) > 2 else Const(0, type_name[1:] == "64")
    flags |= SIZE_LOG2[type_name[1:]] << 4 | 1 << 8 | wide_address | space
    flags |= operation << 16 | _ATOMIC_TYPES[type_name] << 20 | has_dst << 24
    return Row("atom", dsts, [slot, offset, operand, compare], flags=flags)


@rule("cp")
def lower_cp_async(ins: Instruction, context: Context) -> Row | None:
    parts = ins.parts
    if parts == ("cp", "async", "commit_group"):
        return Row("cp_async_commit")
    if parts == ("cp", "async", "wait_all"):
        return Row("cp_async_wait", numbers=[0], flags=1)
    if parts == ("cp", "async", "wait_group"):
        pending = ins.operands[0]
        return Row("cp_async_wait", numbers=[pending.value]) if isinstance(pending, Imm) else None
    if parts[:2] != ("cp", "async") or "bulk" in parts or len(parts) < 5:
        return None
    if parts[2] not in ("ca", "cg") or parts[3] not in ("shared", "shared::cta") or parts[4] != "global":
        return None
    if any(hint not in _CACHE_HINTS for hint in parts[5:]):
        return None
    to, to_offset, wide = address(ins.operands[0], context, SPACES["shared"])
    start, from_offset, from_wide = address(ins.operands[1], context, SPACES["global"])
    size = ins.operands[2]
    if not isinstance(size, Imm) or not from_wide:
        return None
    src_size: Source = -1
    ignore: Source = -1
    if len(ins.operands) > 3:
        extra = ins.operands[3]
        if isinstance(extra, Reg) and extra.type == "pred":
            ignore = extra
        else:
            src_size = source(extra, "b32")
    return Row("cp_async", srcs=[to, to_offset, start, from_offset, size.value, src_size, ignore], flags=wide)


@rule("mov")
def lower_mov_symbol(ins: Instruction, context: Context) -> Row | list[Row] | None:
    """Lower ``mov`` of an address: of parameters, shared, local and module variables."""
    if len(ins.operands) != 2 or not isinstance(ins.operands[1], Symbol):
        return None
    name, reg = ins.operands[1].name, ins.operands[0]
    if not isinstance(reg, Reg):
        return None
    if name in context.params:
        context.param_registers[reg] = context.params[name]
        return Row("param_address", [reg], numbers=[context.params[name]])
    wide = reg.wide
    if name in context.shared:
        return _move(reg, Const(context.shared[name], wide))
    if name in context.local:
        return _move(reg, Const(context.local[name], wide))
    if name in context.module and wide:
        return _move(reg, Const(0, True, name))
    return None


@rule("cvta")
def lower_cvta(ins: Instruction, context: Context) -> Row | list[Row] | None:
    parts = ins.parts[1:]
    to_space = parts[0] == "to"
    space = parts[1] if to_space else parts[0]
    reg, operand = destination(ins.operands[0]), ins.operands[1]
    if reg is None or not reg.wide:
        return None
    if isinstance(operand, Symbol):
        if operand.name in context.shared:
            operand = Imm(context.shared[operand.name])
        elif operand.name in context.module:
            return _move(reg, Const(0, True, operand.name))
        else:
            return None
    value = source(operand, "b64")
    if space in ("global", "const"):
        return _move(reg, value)
    if space == "param":
        if isinstance(operand, Reg) and operand in context.param_registers:
            context.param_registers[reg] = context.param_registers[operand]
        return _move(reg, value)
    window = {"shared": GENERIC_SHARED, "shared::cta": GENERIC_SHARED, "local": GENERIC_LOCAL}.get(space)
    if window is None:
        return None
    if to_space:
        return Row("and_b64", [reg], [value, Const(window - 1, True)])
    return Row("or_b64", [reg], [value, Const(window, True)])


def _move(reg: Reg, value: Source) -> Row:
    assert not isinstance(value, Special)
    return Row("mov_b64" if reg.wide else "mov_b32", [reg], [value])

"""f32 and f64 arithmetic and the approximate functions."""

from __future__ import annotations

from ..ptx_types import Instruction, Row
from .context import Context
from .modifiers import FTZ, NAN, ROUNDING, SAT, XORSIGN, Opcode, expect, read, write
from .rules import rule

# The operations of `f32_modified` and `f64_rounded`, in the order of c/alu_float.c.
OPERATIONS = ("add", "sub", "mul", "fma", "div", "div_approx", "rcp", "sqrt", "rsqrt", "min", "max",
              "ex2", "lg2", "sin", "cos", "tanh", "abs", "neg")  # fmt: skip
SOURCES = {"fma": 3, "add": 2, "sub": 2, "mul": 2, "div": 2, "div_approx": 2, "min": 2, "max": 2}
ROUNDING_NAMES = ("rn", "rz", "rm", "rp")


def _arithmetic(ins: Instruction, operation: str, kind: str, rounding: str, flags: int) -> Row | None:
    """Lower the plain form to its handler, any other to the general one with operation, rounding and flags as data."""
    d, *sources = expect(ins, 1 + SOURCES.get(operation, 1))
    srcs = [read(operand, kind) for operand in sources]
    dsts = [write(d, kind)]
    if rounding == "rn" and not flags:
        return Row(f"{operation}_{kind}", dsts, srcs)
    if operation == "ex2" and flags == FTZ:
        return Row("ex2_ftz_f32", dsts, srcs)
    if kind == "f64" and flags:
        return None
    srcs += [srcs[0]] * (3 - len(srcs))
    numbers = [OPERATIONS.index(operation), ROUNDING[rounding]]
    name = "f32_modified" if kind == "f32" else "f64_rounded"
    return Row(name, dsts, srcs, numbers, flags)


@rule("add", "sub", "mul", "fma", "mad")
def lower_add(ins: Instruction, context: Context) -> Row | None:
    if ins.parts[-1] not in ("f32", "f64"):
        return None
    with Opcode(ins) as op:
        kind = op.last()
        rounding = op.take(*ROUNDING_NAMES, default="rn")
        flags = op.flags(ftz=FTZ, sat=SAT)
    return _arithmetic(ins, "fma" if ins.parts[0] == "mad" else ins.parts[0], kind, rounding, flags)


@rule("div", "rcp", "sqrt", "rsqrt")
def lower_div(ins: Instruction, context: Context) -> Row | None:
    """Lower div, rcp, sqrt, rsqrt: ``.full`` and ``.approx`` are rounded correctly, which lies within their bounds."""
    if ins.parts[-1] not in ("f32", "f64"):
        return None
    with Opcode(ins) as op:
        kind = op.last()
        mode = op.take(*ROUNDING_NAMES, "approx", "full")
        flags = op.flags(ftz=FTZ)
    base = ins.parts[0]
    if (base, mode, kind, flags) == ("rcp", "approx", "f64", FTZ):
        return _arithmetic(ins, "rcp_approx_ftz", kind, "rn", 0)
    exact = mode in ROUNDING_NAMES
    if not mode or (base == "rsqrt" and mode != "approx") or (mode == "full" and base != "div"):
        return None
    if (kind, mode, flags) == ("f64", "approx", FTZ) and base in ("rcp", "rsqrt"):
        d, a = expect(ins, 2)
        return Row(f"{base}_seed_f64", [write(d, kind)], [read(a, kind)])
    if kind == "f64" and not (exact or (base == "rsqrt" and not flags)):
        return None
    operation = "div_approx" if (base, mode) == ("div", "approx") else base
    return _arithmetic(ins, operation, kind, mode if exact else "rn", flags)


@rule("ex2", "lg2", "sin", "cos", "tanh")
def lower_special(ins: Instruction, context: Context) -> Row | None:
    if ins.parts[-1] != "f32":
        return None
    with Opcode(ins) as op:
        kind, approx, flags = op.last(), op.take("approx"), op.flags(ftz=FTZ)
    return _arithmetic(ins, ins.parts[0], kind, "rn", flags) if approx else None


@rule("min", "max")
def lower_min(ins: Instruction, context: Context) -> Row | None:
    if ins.parts[-1] not in ("f32", "f64"):
        return None
    with Opcode(ins) as op:
        kind = op.last()
        flags = op.flags(ftz=FTZ, NaN=NAN, xorsign=XORSIGN)
        absolute = op.take("abs")
    if bool(absolute) != bool(flags & XORSIGN):
        return None
    return _arithmetic(ins, ins.parts[0], kind, "rn", flags)


@rule("abs", "neg")
def lower_sign(ins: Instruction, context: Context) -> Row | None:
    if ins.parts[-1] not in ("f32", "f64"):
        return None
    with Opcode(ins) as op:
        kind, flags = op.last(), op.flags(ftz=FTZ)
    return _arithmetic(ins, ins.parts[0], kind, "rn", flags)


@rule("copysign")
def lower_copysign(ins: Instruction, context: Context) -> Row | None:
    with Opcode(ins) as op:
        kind = op.last()
    if kind not in ("f32", "f64"):
        return None
    d, a, b = expect(ins, 3)
    return Row(f"copysign_{kind}", [write(d, kind)], [read(a, kind), read(b, kind)])


@rule("testp")
def lower_testp(ins: Instruction, context: Context) -> Row | None:
    with Opcode(ins) as op:
        kind = op.last()
        test = op.take("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    if kind not in ("f32", "f64") or not test:
        return None
    p, a = expect(ins, 2)
    return Row(f"testp_{test}_{kind}", [write(p, "pred")], [read(a, kind)])

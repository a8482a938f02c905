"""f32 and f64 arithmetic with every rounding mode, .ftz and .sat; min, max, signs, tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cuattn.testing.instructions import exact
from cuattn.testing.instructions.case import Case, make
from cuattn.testing.instructions.exact import F32, F64, Format
from cuattn.testing.instructions.operands import WIDTH, floats, near_one, pairs

MODES = ("rn", "rz", "rm", "rp")
OPERATIONS: dict[str, tuple[int, Callable[..., int]]] = {
    "add": (2, exact.add),
    "sub": (2, exact.sub),
    "mul": (2, exact.mul),
    "fma": (3, exact.fma),
    "div": (2, exact.div),
    "rcp": (1, exact.rcp),
    "sqrt": (1, exact.sqrt),
}
SATURATES = ("add", "sub", "mul", "fma")


def arithmetic(
    fmt: Format, function: Callable[..., int], mode: str, *, ftz: bool = False, sat: bool = False, relu: bool = False
) -> Callable[..., int]:
    """Make the operation with its modifiers: flush operands, compute, round, flush, saturate."""

    def run(*operands: int) -> int:
        if ftz:
            operands = tuple(exact.flush(fmt, x) for x in operands)
        result = function(fmt, *operands, mode)
        result = fmt.nan if fmt.is_nan(result) else result
        if ftz:
            result = exact.flush(fmt, result)
        if sat:
            result = exact.saturate(fmt, result)
        return exact.relu(fmt, result) if relu else result

    return run


def lanes_of(name: str, count: int) -> list[tuple[int, ...]]:
    """Return operands: special values in all combinations, and numbers near one, where all of the rounding shows."""
    special = pairs(*[floats(name)] * count)
    ordinary = near_one(name, 120 * count)
    return [*special, *zip(*[iter(ordinary)] * count, strict=False)]


def cases() -> Iterator[Case]:
    for fmt in (F32, F64):
        for operation, (count, function) in OPERATIONS.items():
            yield from _operation(fmt, operation, count, function)
        yield from _min_max(fmt)
        yield from _signs(fmt)
    yield from _contracted()


def _operation(fmt: Format, operation: str, count: int, function: Callable[..., int]) -> Iterator[Case]:
    bits, lanes = WIDTH[fmt.name], lanes_of(fmt.name, count)
    for mode in MODES:
        for suffix in ("", ".ftz", ".sat", ".ftz.sat") if fmt is F32 else ("",):
            ftz, sat = "ftz" in suffix, "sat" in suffix
            if sat and operation not in SATURATES:
                continue
            yield make(
                f"{operation}.{mode}{suffix}.{fmt.name}", bits, (bits,) * count,
                arithmetic(fmt, function, mode, ftz=ftz, sat=sat), lanes, result=fmt.name, any_nan=fmt is F64,
            )  # fmt: skip


def _contracted() -> Iterator[Case]:
    """Make forms without a rounding mode, and mad as the other name of fma."""
    for fmt in (F32, F64):
        bits = WIDTH[fmt.name]
        options = {"result": fmt.name, "any_nan": fmt is F64}
        for operation in ("add", "sub", "mul"):
            function = arithmetic(fmt, OPERATIONS[operation][1], "rn")
            yield make(f"{operation}.{fmt.name}", bits, (bits, bits), function, lanes_of(fmt.name, 2), **options)
        yield make(
            f"mad.rn.{fmt.name}", bits, (bits,) * 3, arithmetic(fmt, exact.fma, "rn"), lanes_of(fmt.name, 3), **options
        )
    add = arithmetic(F32, exact.add, "rn")
    yield make(
        "add.f32 literal", 32, 32, lambda a: add(a, 0xC0490FDB), floats("f32"), body="add.f32 {d}, {a}, 0fC0490FDB;"
    )


def _min_max(fmt: Format) -> Iterator[Case]:
    bits = WIDTH[fmt.name]
    lanes = pairs(floats(fmt.name), floats(fmt.name))
    suffixes = ("", ".ftz", ".NaN", ".ftz.NaN", ".xorsign.abs", ".NaN.xorsign.abs") if fmt is F32 else ("",)
    for operation in ("min", "max"):
        for suffix in suffixes:
            yield make(
                f"{operation}{suffix}.{fmt.name}", bits, (bits, bits), min_max(fmt, operation, suffix), lanes,
                result=fmt.name, any_nan=fmt is F64, min_arch=86 if "xorsign" in suffix else 80,
            )  # fmt: skip


def min_max(fmt: Format, operation: str, suffix: str) -> Callable[[int, int], int]:
    """Make min or max with .ftz, .NaN and .xorsign.abs: the smaller magnitude under the product of the signs."""

    def run(a: int, b: int) -> int:
        if ".ftz" in suffix:
            a, b = exact.flush(fmt, a), exact.flush(fmt, b)
        sign = 0
        if ".xorsign" in suffix:
            sign = (a ^ b) & fmt.sign
            a, b = a & fmt.sign - 1, b & fmt.sign - 1
        result = exact.minimum(fmt, a, b, nan=".NaN" in suffix, largest=operation == "max")
        return fmt.nan if fmt.is_nan(result) else result | sign

    return run


def _signs(fmt: Format) -> Iterator[Case]:
    bits, name = WIDTH[fmt.name], fmt.name
    pool = floats(name)
    options = {"result": name, "any_nan": True}
    yield make(f"neg.{name}", bits, bits, lambda a: a ^ fmt.sign, pool, **options)
    yield make(f"abs.{name}", bits, bits, lambda a: a & fmt.sign - 1, pool, **options)
    if fmt is F32:
        yield make("neg.ftz.f32", 32, 32, lambda a: exact.flush(F32, a) ^ F32.sign, pool, **options)
        yield make("abs.ftz.f32", 32, 32, lambda a: exact.flush(F32, a) & F32.sign - 1, pool, **options)
    numbers = [x for x in pool if not fmt.is_nan(x)]
    yield make(
        f"copysign.{name}", bits, (bits, bits), lambda a, b: a & fmt.sign | b & fmt.sign - 1, pairs(numbers, numbers)
    )
    tests: dict[str, Callable[[int], bool]] = {
        "finite": lambda a: not fmt.is_nan(a) and not fmt.is_inf(a),
        "infinite": fmt.is_inf,
        "number": lambda a: not fmt.is_nan(a),
        "notanumber": fmt.is_nan,
        "normal": lambda a: not fmt.is_nan(a) and not fmt.is_inf(a) and not fmt.subnormal(a),  # zeros count as normal
        "subnormal": fmt.subnormal,
    }
    for test, function in tests.items():
        yield make(f"testp.{test}.{name}", 1, bits, lambda a, function=function: int(function(a)), pool)

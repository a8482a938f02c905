"""The .approx instructions: true values in float64, and how far a result may be from them.

Bounds are those of the PTX manual, or of a GPU's documented accuracy where the manual is silent; the host executor is
held to the same ones here, and to its own tighter ones in tests/host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from cuattn.testing.instructions import exact
from cuattn.testing.instructions.case import Case
from cuattn.testing.instructions.exact import BF16, F16, F32, F64, Format
from cuattn.testing.instructions.operands import FLOATS, WIDTH, near_one, noise

ANGLES = [0, 0x80000000, *(bits for bits in near_one("f32", 400) if abs(float(F32.value(bits))) < math.pi)]
F32_POOL = [*FLOATS["f32"], *noise(32, 60, 5), *near_one("f32", 200)]
EXPONENTS = [exact.encode(F32, exact.Fraction(k, 8)) for k in range(-1280, 1090, 9)]


def value(fmt: Format, bits: int) -> float:
    """Return the value of any bit pattern, as a float."""
    if fmt.is_nan(bits):
        return math.nan
    if fmt.is_inf(bits):
        return -math.inf if fmt.negative(bits) else math.inf
    return math.copysign(float(fmt.value(bits)), -1.0 if fmt.negative(bits) else 1.0)


def _exp2(x: float) -> float:
    return math.inf if x > 1000 else 0.0 if x < -1000 else 2.0**x if x == x else x


def _log2(x: float) -> float:
    return -math.inf if x == 0 else math.nan if x < 0 else math.log2(x) if x == x else x


def _reciprocal(x: float) -> float:
    return math.copysign(math.inf, x) if x == 0 else 1 / x


def _root(x: float) -> float:
    return math.nan if x < 0 else math.sqrt(x)


def _reciprocal_root(x: float) -> float:
    return math.copysign(math.inf, x) if x == 0 else math.nan if x < 0 else 1 / math.sqrt(x)


def _wave(function: Callable[[float], float]) -> Callable[[float], float]:
    return lambda x: math.nan if math.isinf(x) else function(x)


def approximate(
    opcode: str, fmt: Format, function: Callable[..., float], lanes: Iterable[int | tuple[int, ...]],
    *, ftz: bool = False, halves: int = 1, **options: object,
) -> Case:  # fmt: skip
    """Make a case judged against ``function`` of the operands' values."""
    listed = [lane if isinstance(lane, tuple) else (lane,) for lane in lanes]
    values = []
    for lane in listed:
        operands = [value(fmt, exact.flush(fmt, x) if ftz else x) for x in lane]
        result = function(*operands)
        tiny = float(fmt.value(1 << fmt.mantissa))
        values.append(math.copysign(0.0, result) if ftz and abs(result) < tiny else result)
    bits = WIDTH[fmt.name]
    return Case(
        opcode, (bits,), (bits,) * len(listed[0]), tuple(listed), exact_values=tuple(values), result=fmt.name,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip


def cases() -> Iterator[Case]:
    for suffix in ("", ".ftz"):
        ftz = bool(suffix)
        # Results of .ftz that are subnormal before rounding are left out: they may round up to the smallest normal.
        exponents = [x for x in EXPONENTS if not ftz or value(F32, x) >= -125]
        yield approximate(f"ex2.approx{suffix}.f32", F32, _exp2, [*F32_POOL, *exponents], ftz=ftz, max_ulp=2)
        yield approximate(f"lg2.approx{suffix}.f32", F32, _log2, F32_POOL, ftz=ftz, max_ulp=3, max_abs=2.0**-22)
        yield approximate(f"rcp.approx{suffix}.f32", F32, _reciprocal, F32_POOL, ftz=ftz, max_ulp=1)
        yield approximate(f"sqrt.approx{suffix}.f32", F32, _root, F32_POOL, ftz=ftz, max_ulp=2)
        yield approximate(f"rsqrt.approx{suffix}.f32", F32, _reciprocal_root, F32_POOL, ftz=ftz, max_ulp=2)
        yield approximate(f"sin.approx{suffix}.f32", F32, _wave(math.sin), ANGLES, ftz=ftz, max_ulp=1, max_abs=2.0**-20)
        yield approximate(f"cos.approx{suffix}.f32", F32, _wave(math.cos), ANGLES, ftz=ftz, max_ulp=1, max_abs=2.0**-20)
        quotients = list(zip(near_one("f32", 300), near_one("f32", 600)[300:], strict=True))
        yield approximate(f"div.approx{suffix}.f32", F32, lambda a, b: a / b, quotients, ftz=ftz, max_ulp=2)
        yield approximate(f"div.full{suffix}.f32", F32, lambda a, b: a / b, quotients, ftz=ftz, max_ulp=2)
    # Seeds of iterations: 20 bits or so.
    pool = [x for x in [*FLOATS["f64"], *near_one("f64", 200)] if F64.is_nan(x) or abs(value(F64, x)) < 2.0**1000]
    yield approximate("rcp.approx.ftz.f64", F64, _reciprocal, pool, ftz=True, max_ulp=2.0**34)
    yield approximate("rsqrt.approx.ftz.f64", F64, _reciprocal_root, pool, ftz=True, max_ulp=2.0**34)
    yield approximate("rsqrt.approx.f64", F64, _reciprocal_root, pool, max_ulp=2.0**34)
    infinite_waves = [0x7F800000, 0xFF800000, 0x7FC00000]
    yield approximate(
        "sin.approx.f32 of infinity", F32, _wave(math.sin), infinite_waves, body="sin.approx.f32 {d}, {a};"
    )
    yield approximate("tanh.approx.f32", F32, math.tanh, F32_POOL, max_ulp=2.0**13)
    # Divisors whose reciprocal would be subnormal give zero, and NaN under infinity.
    big = (0x7F000000, 0x7F000001, 0x7F7FFFFF, 0xFF000001, 0xFF7FFFFF)
    lanes = [(a, b) for a in (0x3F800000, 0x7F000000, 0xBF800000) for b in big[1:]]
    yield approximate("div.approx.f32 big", F32, lambda a, b: 0.0, lanes, body="div.approx.f32 {d}, {a}, {b};")
    lanes = [(0x7F800000, b) for b in big[1:]]
    yield approximate("div.approx.f32 inf/big", F32, lambda a, b: math.nan, lanes, body="div.approx.f32 {d}, {a}, {b};")
    for fmt, max_ulp, flag in ((F16, 2, ""), (BF16, 1, ".ftz")):
        pool = [*FLOATS[fmt.name], *noise(16, 300, 7)]
        safe = [x for x in pool if not flag or value(fmt, x) >= -125 or fmt.is_nan(x) or fmt.is_inf(x)]
        arch = 90 if fmt is BF16 else 80
        yield approximate(
            f"ex2.approx{flag}.{fmt.name}", fmt, _exp2, safe, ftz=bool(flag), max_ulp=max_ulp, min_arch=arch
        )
        yield approximate(f"tanh.approx.{fmt.name}", fmt, math.tanh, pool, max_ulp=2, min_arch=arch)

"""cvt: integers, floats, the narrow formats and their pairs, with every rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction

from cuattn.testing.instructions import exact
from cuattn.testing.instructions.case import MAX_LANES, Case, make
from cuattn.testing.instructions.exact import BF16, E4M3, E5M2, F16, F32, F64, FORMATS, TF32, Format
from cuattn.testing.instructions.operands import FLOATS, WIDTH, floats, ints, near_one, noise, number, pairs

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
FLOAT_TYPES = ("f16", "f32", "f64")
MODES = ("rn", "rz", "rm", "rp")
# Where integers and formats end, and numbers between: 0.5 steps, 2^k and its neighbours.
EDGES = [
    Fraction(sign * x)
    for k in (0, 1, 2, 7, 8, 11, 15, 16, 24, 31, 32, 53, 63, 64)
    for x in (
        2**k - 1,
        Fraction(2**k) - Fraction(1, 2),
        2**k,
        Fraction(2**k) + Fraction(1, 2),
        2**k + 1,
        Fraction(2**k, 3),
    )
    for sign in (1, -1)
]


def register_width(kind: str) -> int:
    """Return the bits of a type's registers: 8-bit types live in 16-bit ones."""
    return max(16, int(kind.lstrip("usbf")))


def limits(kind: str) -> tuple[int, int]:
    """Return the smallest and the largest value of an integer type."""
    bits = int(kind[1:])
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def around(fmt: Format) -> list[int]:
    """Return bits of the format near every edge, with both neighbours, and its special values."""
    found = set(floats(fmt.name))
    for edge in EDGES:
        bits = exact.encode(fmt, edge, "rz")
        found.update(x for x in (bits - 1, bits, bits + 1) if 0 <= x < 2**fmt.bits)
    return sorted(found)


def midpoints(narrow: Format, wide: Format) -> list[int]:
    """Return bits of the wide format at, just below and just above ties between neighbours of the narrow one."""
    step = wide.mantissa - narrow.mantissa
    found: set[int] = set()
    top, first_normal = narrow.max_finite, 1 << narrow.mantissa
    middle = narrow.infinity // 2
    listed = (0, 1, 2, 5, first_normal - 1, first_normal, middle, middle + 1, top - 1, top)
    for bits in (*listed, *(x % top for x in noise(16, 12, 3))):
        low, up = narrow.value(bits), Fraction(2) ** (max(bits >> narrow.mantissa, 1) - narrow.bias - narrow.mantissa)
        tie = exact.encode(wide, low + up / 2, "rz")
        found.update((tie, tie - 1, tie + 1, tie | wide.sign, tie + 1 | wide.sign, tie - 1 | wide.sign))
        found.add(exact.encode(wide, low + up / 4, "rz"))
    return sorted(x for x in found if step > 0 and not wide.is_nan(x & wide.sign - 1) and 0 <= x < 2**wide.bits)


def cases() -> Iterator[Case]:
    yield from _between_integers()
    yield from _float_to_integer()
    yield from _integer_to_float()
    yield from _float_to_float()
    yield from _to_integral_float()
    yield from _packed()
    yield from _tf32()
    yield from _fp8()


def _between_integers() -> Iterator[Case]:
    for source in INTEGERS:
        width = register_width(source)
        pool = ints(width)
        for target in INTEGERS:
            if source == target:
                continue
            out = register_width(target)
            yield make(
                f"cvt.{target}.{source}", out, width, lambda a, s=source, t=target: number(number(a, s), t), pool
            )
            (low, high), (least, most) = limits(target), limits(source)
            if low <= least and most <= high:
                continue  # .sat is not allowed where nothing can overflow
            yield make(
                f"cvt.sat.{target}.{source}", out, width,
                lambda a, s=source, low=low, high=high: min(max(number(a, s), low), high), pool,
            )  # fmt: skip
    # Into a wider register: signed types extend their sign, unsigned ones zeros.
    yield make("cvt.s8.s32 into 32", 32, 32, lambda a: number(a, "s8"), ints(32), body="cvt.s8.s32 {d}, {a};")
    yield make("cvt.u8.s32 into 32", 32, 32, lambda a: a & 0xFF, ints(32), body="cvt.u8.s32 {d}, {a};")
    yield make("cvt.u16.s8 into 32", 32, 32, lambda a: number(a, "s8") & 0xFFFF, ints(32), body="cvt.u16.s8 {d}, {a};")


def _float_to_integer() -> Iterator[Case]:
    for kind in ("f16", "bf16", "f32", "f64"):
        fmt, width = FORMATS[kind], WIDTH[kind]
        pool = around(fmt)
        for target in INTEGERS:
            if kind == "bf16" and target in ("u8", "s8"):
                continue
            bits, (low, high) = int(target[1:]), limits(target)
            # PTX: NaN gives 0, except with a 64-bit type on either side, where it gives the top bit alone.
            nan = 1 << bits - 1 if bits == 64 or kind == "f64" else 0
            lanes = pool if bits >= 32 or kind != "f64" else [x for x in pool if not fmt.is_nan(x)]
            for mode in MODES:
                yield make(
                    f"cvt.{mode}i.{target}.{kind}", register_width(target), width,
                    lambda a, fmt=fmt, low=low, high=high, mode=mode, nan=nan: (
                        exact.to_integer(fmt, a, low, high, mode, nan)
                    ),
                    lanes, min_arch=90 if kind == "bf16" else 80,
                )  # fmt: skip
    subnormals = (1, 0x007FFFFF, 0x80000001, 0x807FFFFF, 0x00800000)
    yield make("cvt.rpi.ftz.s32.f32", 32, 32, lambda a: int(a == 0x00800000), subnormals)


def _integer_to_float() -> Iterator[Case]:
    ties = [1 << k | 1 << k - 24 for k in range(24, 64)] + [(1 << k | 1 << k - 24) + 1 for k in range(26, 64)]
    far = [
        1 << 63 | 1 << 54 | 1,
        1 << 62 | 1 << 54 | 1,
        1 << 62 | 1 << 54,
        (1 << 62 | 1 << 54) - 1,
        (1 << 63) + 1024,
        (1 << 63) + 1025,
    ]
    for source in INTEGERS:
        width = register_width(source)
        bits = int(source[1:])
        pool = sorted({x & (1 << width) - 1 for x in (*ints(width), *ties, *(-x for x in ties), *far)})
        for target in ("f16", "bf16", "f32", "f64"):
            if target == "bf16" and bits == 8:
                continue
            fmt = FORMATS[target]
            for mode in MODES:
                yield make(
                    f"cvt.{mode}.{target}.{source}", WIDTH[target], width,
                    lambda a, fmt=fmt, source=source, mode=mode: exact.encode(fmt, Fraction(number(a, source)), mode),
                    pool, min_arch=90 if target == "bf16" else 80,
                )  # fmt: skip
        if bits == 32:
            yield make(
                f"cvt.rn.sat.f32.{source}", 32, width,
                lambda a, source=source: 0x3F800000 if number(a, source) > 0 else 0, pool,
            )  # fmt: skip


def _float_case(
    to: Format, source: Format, modifiers: str, lanes: Iterable[int], mode: str, min_arch: int = 80
) -> Case:
    """Make a cvt between two formats; flush, round, flush, saturate."""

    def run(a: int) -> int:
        a = exact.flush(source, a) if "ftz" in modifiers and source is F32 else a
        result = exact.convert(to, source, a, mode or "rn", satfinite="satfinite" in modifiers)
        result = exact.flush(to, result) if "ftz" in modifiers and to is F32 else result
        if ".sat" in modifiers and "satfinite" not in modifiers:
            result = exact.saturate(to, result)
        return exact.relu(to, result) if "relu" in modifiers else result

    prefix = f"cvt.{mode}" if mode else "cvt"
    # Conversions that widen, and those from f64, keep a payload on some GPUs.
    return make(
        f"{prefix}{modifiers}.{to.name}.{source.name}", WIDTH[to.name], WIDTH[source.name], run, lanes,
        result=to.name, any_nan=not mode or source is F64, min_arch=min_arch,
    )  # fmt: skip


def _float_to_float() -> Iterator[Case]:
    for to, source in ((F16, F32), (F16, F64), (F32, F64), (BF16, F32), (BF16, F64)):
        lanes = [*around(source), *midpoints(to, source)]
        arch = 90 if (to, source) == (BF16, F64) else 80
        for mode in MODES if to is not BF16 or source is F64 else ("rn", "rz"):
            yield _float_case(to, source, "", lanes, mode, arch)
        if to is not BF16:
            yield _float_case(to, source, ".sat", lanes, "rn")
    yield _float_case(F32, F64, ".ftz", [*around(F64), *midpoints(F32, F64)], "rn")
    yield _float_case(F16, F32, ".ftz", [*around(F32), *midpoints(F16, F32)], "rn")
    yield _float_case(F16, F32, ".relu", [*around(F32), *midpoints(F16, F32)], "rn")
    yield _float_case(BF16, F32, ".relu", [*around(F32), *midpoints(BF16, F32)], "rn")
    yield _float_case(F32, F32, ".sat", floats("f32"), "")
    yield _float_case(F32, F32, ".ftz", floats("f32"), "")
    yield _float_case(F64, F32, "", around(F32), "")
    yield _float_case(F64, F32, ".ftz", around(F32), "")
    every_half = [*FLOATS["f16"], *noise(16, 400, 11)]
    yield _float_case(F32, F16, "", every_half, "")
    yield _float_case(F64, F16, "", every_half, "")
    yield _float_case(F32, BF16, "", [*FLOATS["bf16"], *noise(16, 400, 12)], "")
    for mode in MODES:
        yield _float_case(BF16, F16, "", every_half, mode, 90)


def _to_integral_float() -> Iterator[Case]:
    """Make cvt.rni.f32.f32 and the like: an integer that stays a float; a zero keeps its sign."""
    for fmt in (F16, F32, F64):
        lanes = [*around(fmt), *near_one(fmt.name, 60)]
        for mode in MODES:

            def run(a: int, fmt: Format = fmt, mode: str = mode) -> int:
                if fmt.is_nan(a) or fmt.is_inf(a):
                    return fmt.nan if fmt.is_nan(a) else a
                whole = exact.round_integer(fmt.value(a), mode)
                return exact.encode(fmt, Fraction(whole), negative_zero=fmt.negative(a))

            width = WIDTH[fmt.name]
            yield make(f"cvt.{mode}i.{fmt.name}.{fmt.name}", width, width, run, lanes, result=fmt.name, any_nan=True)


def _packed() -> Iterator[Case]:
    for to in (F16, BF16):
        lanes = [
            *zip(around(F32), reversed(around(F32)), strict=True),
            *pairs(midpoints(to, F32)[::3], midpoints(to, F32)[1::5]),
        ]
        for modifiers in ("rn", "rz", "rn.relu", "rz.relu"):

            def run(a: int, b: int, to: Format = to, modifiers: str = modifiers) -> int:
                high, low = (exact.convert(to, F32, x, modifiers[:2]) for x in (a, b))
                if "relu" in modifiers:
                    high, low = exact.relu(to, high), exact.relu(to, low)
                return high << 16 | low

            yield make(f"cvt.{modifiers}.{to.name}x2.f32", 32, (32, 32), run, lanes[:MAX_LANES])


def _tf32() -> Iterator[Case]:
    """Make conversions to tf32: 10 mantissa bits in an f32 register."""
    lanes = [*around(F32), *midpoints(TF32, F32)]
    for modifiers, arch in (("rna", 80), ("rn", 90), ("rz", 90), ("rn.relu", 90), ("rz.relu", 90)):

        def run(a: int, modifiers: str = modifiers) -> int:
            result = exact.convert(TF32, F32, a, modifiers.partition(".")[0])
            result = exact.relu(TF32, result) if "relu" in modifiers else result
            return F32.nan if TF32.is_nan(result) else result << 13

        yield make(f"cvt.{modifiers}.tf32.f32", 32, 32, run, lanes, result="f32", any_nan=True, min_arch=arch)


def _fp8() -> Iterator[Case]:
    for fmt in (E4M3, E5M2):
        singles = [*around(F32), *midpoints(fmt, F32)]
        lanes = list(zip(singles, reversed(singles), strict=True))
        halves = sorted({*FLOATS["f16"], *midpoints(fmt, F16), *noise(16, 300, 13)})
        for relu in ("", ".relu"):

            def to_fp8(source: Format, a: int, b: int, fmt: Format = fmt, relu: str = relu) -> int:
                high, low = (exact.convert(fmt, source, x, "rn", satfinite=True) for x in (a, b))
                if relu:
                    high, low = exact.relu(fmt, high), exact.relu(fmt, low)
                return high << 8 | low

            yield make(
                f"cvt.rn.satfinite{relu}.{fmt.name}x2.f32", 16, (32, 32), lambda a, b, f=to_fp8: f(F32, a, b),
                lanes[:MAX_LANES], min_arch=89,
            )  # fmt: skip
            yield make(
                f"cvt.rn.satfinite{relu}.{fmt.name}x2.f16x2", 16, 32,
                lambda a, f=to_fp8: f(F16, a >> 16, a & 0xFFFF),
                [x << 16 | y for x, y in zip(halves, reversed(halves), strict=True)], min_arch=89,
            )  # fmt: skip

            def from_fp8(a: int, fmt: Format = fmt, relu: str = relu) -> int:
                high, low = (exact.convert(F16, fmt, x) for x in (a >> 8, a & 0xFF))
                if relu:
                    high, low = exact.relu(F16, high), exact.relu(F16, low)
                return high << 16 | low

            lanes8 = [x << 8 | 255 - x for x in range(256)]
            yield make(f"cvt.rn{relu}.f16x2.{fmt.name}x2", 32, 16, from_fp8, lanes8, min_arch=89)

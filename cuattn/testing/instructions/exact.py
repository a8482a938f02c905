"""Floating-point arithmetic on bit patterns, exactly: the oracle of the instruction table.

Values are fractions; every result is rounded once. Nothing here knows how the executor computes.

>>> hex(add(F32, 0x3F800000, 0x33800000, "rp"))  # 1 + 2^-24, rounded up
'0x3f800001'
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Rounding = Literal["rn", "rz", "rm", "rp", "rna"]


@dataclass(frozen=True)
class Format:
    """A binary floating-point format. ``nan`` is the NaN that the GPU's arithmetic returns."""

    name: str
    bits: int
    mantissa: int
    bias: int
    nan: int
    infinite: bool = True  # has infinities; e4m3 does not

    @property
    def sign(self) -> int:
        return 1 << self.bits - 1

    @property
    def infinity(self) -> int:
        return (self.sign - 1) >> self.mantissa << self.mantissa

    @property
    def max_finite(self) -> int:
        return self.infinity - 1 if self.infinite else self.nan - 1

    def is_nan(self, bits: int) -> bool:
        magnitude = bits & self.sign - 1
        return magnitude > self.infinity if self.infinite else magnitude == self.nan

    def is_inf(self, bits: int) -> bool:
        return self.infinite and bits & self.sign - 1 == self.infinity

    def negative(self, bits: int) -> bool:
        return bits & self.sign != 0

    def subnormal(self, bits: int) -> bool:
        return 0 < bits & self.sign - 1 < 1 << self.mantissa

    def value(self, bits: int) -> Fraction:
        """The value of a finite number."""
        exponent = (bits & self.sign - 1) >> self.mantissa
        fraction = bits & (1 << self.mantissa) - 1
        significand = fraction if exponent == 0 else fraction + (1 << self.mantissa)
        scale = Fraction(2) ** (max(exponent, 1) - self.bias - self.mantissa)
        return (-1 if self.negative(bits) else 1) * significand * scale


F16 = Format("f16", 16, 10, 15, 0x7FFF)
BF16 = Format("bf16", 16, 7, 127, 0x7FFF)
F32 = Format("f32", 32, 23, 127, 0x7FFFFFFF)
F64 = Format("f64", 64, 52, 1023, 0x7FF8000000000000)
E4M3 = Format("e4m3", 8, 3, 7, 0x7F, infinite=False)
E5M2 = Format("e5m2", 8, 2, 15, 0x7F)
TF32 = Format("tf32", 19, 10, 127, 0x3FFFF)
FORMATS = {f.name: f for f in (F16, BF16, F32, F64, E4M3, E5M2, TF32)}


def round_integer(x: Fraction, mode: str) -> int:
    """Round ``x`` to an integer: rn to even, rz to zero, rm down, rp up, rna ties away from zero."""
    if mode == "rn":
        return round(x)
    if mode == "rz":
        return math.trunc(x)
    if mode == "rm":
        return math.floor(x)
    if mode == "rp":
        return math.ceil(x)
    whole = math.floor(abs(x) + Fraction(1, 2))
    return whole if x >= 0 else -whole


def encode(fmt: Format, x: Fraction, mode: str = "rn", *, negative_zero: bool = False, satfinite: bool = False) -> int:
    """Return the bits of ``x`` rounded to ``fmt``. ``negative_zero``: the sign if ``x`` is zero."""
    if x == 0:
        return fmt.sign if negative_zero else 0
    sign = fmt.sign if x < 0 else 0
    exponent = 1 - fmt.bias
    magnitude = abs(x)
    top = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** top > magnitude:
        top -= 1
    exponent = max(exponent, top) - fmt.mantissa  # of the last place
    units = abs(round_integer(x / Fraction(2) ** exponent, mode))
    bits = units + (exponent + fmt.mantissa - (1 - fmt.bias) << fmt.mantissa)
    if bits <= fmt.max_finite:
        return sign | bits
    inward = mode == "rz" or (mode == "rm" and not sign) or (mode == "rp" and bool(sign))
    return sign | (fmt.max_finite if satfinite or inward else fmt.infinity)


def flush(fmt: Format, bits: int) -> int:
    """Do ``.ftz``: a subnormal becomes zero of its sign."""
    return bits & fmt.sign if fmt.subnormal(bits) else bits


def saturate(fmt: Format, bits: int) -> int:
    """Do ``.sat``: to [0, 1], NaN to +0."""
    if fmt.is_nan(bits) or fmt.negative(bits):
        return 0
    one = encode(fmt, Fraction(1))
    return min(bits, one)


def relu(fmt: Format, bits: int) -> int:
    """Do ``.relu``: negative results and -0 become +0; NaN is the canonical NaN."""
    if fmt.is_nan(bits):
        return fmt.nan
    return 0 if fmt.negative(bits) else bits


def fma(fmt: Format, a: int, b: int, c: int, mode: str = "rn") -> int:
    """Compute a * b + c with one rounding."""
    if fmt.is_nan(a) or fmt.is_nan(b) or fmt.is_nan(c):
        return fmt.nan
    negative = fmt.negative(a) != fmt.negative(b)
    zero = fmt.sign - 1
    if fmt.is_inf(a) or fmt.is_inf(b):
        if not a & zero or not b & zero or (fmt.is_inf(c) and fmt.negative(c) != negative):
            return fmt.nan
        return fmt.infinity | (fmt.sign if negative else 0)
    if fmt.is_inf(c):
        return c
    product = fmt.value(a) * fmt.value(b)
    total = product + fmt.value(c)
    # A zero: both terms zero of one sign keep it; else +0, and -0 when rounding down.
    same_sign = product == 0 and fmt.value(c) == 0 and negative == fmt.negative(c)
    return encode(fmt, total, mode, negative_zero=negative if same_sign else mode == "rm")


def add(fmt: Format, a: int, b: int, mode: str = "rn") -> int:
    return fma(fmt, encode(fmt, Fraction(1)), a, b, mode)


def sub(fmt: Format, a: int, b: int, mode: str = "rn") -> int:
    return add(fmt, a, b if fmt.is_nan(b) else b ^ fmt.sign, mode)


def mul(fmt: Format, a: int, b: int, mode: str = "rn") -> int:
    negative = fmt.negative(a) != fmt.negative(b)
    return fma(fmt, a, b, fmt.sign if negative else 0, mode)


def div(fmt: Format, a: int, b: int, mode: str = "rn") -> int:
    if fmt.is_nan(a) or fmt.is_nan(b) or (fmt.is_inf(a) and fmt.is_inf(b)):
        return fmt.nan
    zero = fmt.sign - 1
    negative = fmt.negative(a) != fmt.negative(b)
    if fmt.is_inf(a) or not b & zero:
        return fmt.nan if not a & zero else fmt.infinity | (fmt.sign if negative else 0)
    quotient = Fraction(0) if fmt.is_inf(b) else fmt.value(a) / fmt.value(b)
    return encode(fmt, quotient, mode, negative_zero=negative)


def rcp(fmt: Format, a: int, mode: str = "rn") -> int:
    return div(fmt, encode(fmt, Fraction(1)), a, mode)


def sqrt(fmt: Format, a: int, mode: str = "rn") -> int:
    if not a & fmt.sign - 1 or a == fmt.infinity:
        return a
    if fmt.is_nan(a) or fmt.negative(a):
        return fmt.nan
    x = fmt.value(a)
    # An integer root with 64 bits more than the format has; a sticky bit below stands for what is left.
    shift = 2 * (fmt.mantissa + 64) + 2 * fmt.bias
    shift += shift % 2
    scaled = x * Fraction(2) ** shift
    root = math.isqrt(scaled.numerator // scaled.denominator)
    exact = root * root == scaled
    fine = Fraction(2 * root + (0 if exact else 1), 2) / Fraction(2) ** (shift // 2)
    return encode(fmt, fine, mode)


def compare(fmt: Format, a: int, b: int) -> int | None:
    """Compare two numbers: -1, 0, 1, or None when unordered."""
    if fmt.is_nan(a) or fmt.is_nan(b):
        return None
    x, y = (_order(fmt, bits) for bits in (a, b))
    return (x > y) - (x < y)


def _order(fmt: Format, bits: int) -> int:
    magnitude = bits & fmt.sign - 1
    return -magnitude if fmt.negative(bits) else magnitude


def minimum(fmt: Format, a: int, b: int, *, nan: bool = False, largest: bool = False) -> int:
    """Take min or, if ``largest``, max; -0 < +0. ``nan``: a NaN operand gives NaN, else the other operand."""
    if fmt.is_nan(a) or fmt.is_nan(b):
        if nan or (fmt.is_nan(a) and fmt.is_nan(b)):
            return fmt.nan
        return b if fmt.is_nan(a) else a
    first = (_order(fmt, a), not fmt.negative(a)) <= (_order(fmt, b), not fmt.negative(b))
    return (b if first else a) if largest else (a if first else b)


def convert(to: Format, source: Format, bits: int, mode: str = "rn", *, satfinite: bool = False) -> int:
    """Convert float to float; NaN becomes the canonical one."""
    if source.is_nan(bits):
        return to.nan
    if source.is_inf(bits):
        sign = to.sign if source.negative(bits) else 0
        return sign | (to.max_finite if satfinite else to.infinity)
    return encode(to, source.value(bits), mode, negative_zero=source.negative(bits), satfinite=satfinite)


def to_integer(source: Format, bits: int, low: int, high: int, mode: str, nan: int) -> int:
    """Convert a float to an integer in [low, high], clamped."""
    if source.is_nan(bits):
        return nan
    if source.is_inf(bits):
        return low if source.negative(bits) else high
    return min(max(round_integer(source.value(bits), mode), low), high)


def ulp_distance(fmt: Format, bits: int, exact: float) -> float:
    """Return |value - exact| in units in the last place of ``fmt`` at ``exact``; infinite if one is NaN or infinite."""
    if math.isnan(exact):
        return 0.0 if fmt.is_nan(bits) else math.inf
    if fmt.is_nan(bits):
        return math.inf
    largest = float(fmt.value(fmt.max_finite))
    if fmt.is_inf(bits) or math.isinf(exact) or abs(exact) > largest:
        same = fmt.negative(bits) == (exact < 0)
        return (
            0.0
            if same and (fmt.is_inf(bits) or bits & fmt.sign - 1 == fmt.max_finite) and abs(exact) >= largest
            else math.inf
        )
    _, exponent = math.frexp(exact)
    exponent = max(exponent - 1, 1 - fmt.bias) if exact else 1 - fmt.bias
    return float(abs(fmt.value(bits) - Fraction(exact)) / Fraction(2) ** (exponent - fmt.mantissa))

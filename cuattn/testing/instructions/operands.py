"""Operand values worth trying, and what the case files share."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence

MAX_PAIRS = 600

INTEGERS = {
    16: (0, 1, 2, 7, 0x00FF, 0x0100, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0xFFFE, 0x1234, 0xBEEF),
    32: (
        0, 1, 2, 7, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFF, 0x10000, 0x12345678, 0xDEADBEEF,
    ),
    64: (
        0, 1, 3, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x100000000, (1 << 63) - 1, 1 << 63, (1 << 63) + 1,
        (1 << 64) - 1, (1 << 64) - 2, 0x123456789ABCDEF0, 0xDEADBEEF00C0FFEE,
    ),
}  # fmt: skip

# Zeros, subnormals, ones and neighbours, thirds, large, infinite, NaNs with and without a payload and a sign.
FLOATS = {
    "f16": (
        0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x8400, 0x3BFF, 0x3C00, 0x3C01, 0xBC00, 0x3555, 0x4000, 0x4248,
        0x63D0, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x7FFF, 0xFE01,
    ),
    "bf16": (
        0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x8080, 0x3F7F, 0x3F80, 0x3F81, 0xBF80, 0x3EAB, 0x4000, 0x4049,
        0x1F80, 0x9FAA, 0x5FC1, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0x7FFF, 0xFFC1,
    ),
    "f32": (
        0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x80800001, 0x3F7FFFFF, 0x3F800000,
        0x3F800001, 0xBF800000, 0x3EAAAAAB, 0x40490FDB, 0x4B7FFFFF, 0x1FC00003, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000,
        0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0xFFC12345,
    ),
    "f64": (
        0, 1 << 63, 1, (1 << 63) + 1, (1 << 52) - 1, 1 << 52, 0x3FEFFFFFFFFFFFFF, 0x3FF0000000000000,
        0x3FF0000000000001, 0xBFF0000000000000, 0x3FD5555555555555, 0x400921FB54442D18, 0x41DFFFFFFFC00000,
        0x36A0000000000001, 0x47EFFFFFF0000000, 0x7FEFFFFFFFFFFFFF, 0xFFEFFFFFFFFFFFFF, 0x7FF0000000000000,
        0xFFF0000000000000, 0x7FF8000000000000, 0xFFF8000000000123,
    ),
}  # fmt: skip
WIDTH = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}


def signed(x: int, bits: int) -> int:
    """Return the low ``bits`` of ``x`` as two's complement."""
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> bits - 1 else x


def number(x: int, kind: str) -> int:
    """Return the value of operand bits as a type such as ``s16`` or ``u64``."""
    bits = int(kind[1:])
    return signed(x, bits) if kind[0] == "s" else x & (1 << bits) - 1


def noise(bits: int, count: int, seed: int) -> list[int]:
    """Return random bit patterns, the same every time."""
    generator = random.Random(seed)
    return [generator.getrandbits(bits) for _ in range(count)]


def ints(bits: int) -> tuple[int, ...]:
    return (*INTEGERS[bits], *noise(bits, 10, bits))


def floats(name: str) -> tuple[int, ...]:
    return (*FLOATS[name], *near_one(name, 8))


def near_one(name: str, count: int) -> list[int]:
    """Return numbers between 2^-4 and 2^4 with all mantissa bits in play, where rounding shows."""
    bias, mantissa = {"f16": (15, 10), "bf16": (127, 7), "f32": (127, 23), "f64": (1023, 52)}[name]
    generator = random.Random(mantissa)
    return [
        generator.getrandbits(1) << WIDTH[name] - 1
        | bias + generator.randrange(-4, 4) << mantissa
        | generator.getrandbits(mantissa)
        for _ in range(count)
    ]


def pairs(*pools: Sequence[int]) -> list[tuple[int, ...]]:
    """Return all combinations of the pools, thinned evenly when there are too many for one kernel."""
    everything = list(itertools.product(*pools))
    if len(everything) <= MAX_PAIRS:
        return everything
    generator = random.Random(len(everything))
    return generator.sample(everything, MAX_PAIRS)


def packed(lanes: Iterable[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Pair lanes of 16-bit operands: each with its successor's operands in the upper halves."""
    listed = list(lanes)
    for low, high in zip(listed, [*listed[1:], listed[0]], strict=True):
        yield tuple(x | y << 16 for x, y in zip(low, high, strict=True))

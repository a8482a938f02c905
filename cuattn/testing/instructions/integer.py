"""Integer arithmetic: what Python's integers say, cut to the width of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cuattn.testing.instructions.case import Case, make
from cuattn.testing.instructions.operands import ints, number, pairs, signed

TYPES = ("s16", "u16", "s32", "u32", "s64", "u64")
TRUNCATING = ("add", "sub", "mul.lo")


def quotient(a: int, b: int) -> int:
    """Divide toward zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY: dict[str, Callable[[int, int, int], int]] = {
    "add": lambda a, b, bits: a + b,
    "sub": lambda a, b, bits: a - b,
    "mul.lo": lambda a, b, bits: a * b,
    "mul.hi": lambda a, b, bits: a * b >> bits,
    "min": lambda a, b, bits: min(a, b),
    "max": lambda a, b, bits: max(a, b),
    "div": lambda a, b, bits: quotient(a, b),
    "rem": lambda a, b, bits: a - b * quotient(a, b),
}


def cases() -> Iterator[Case]:
    for kind in TYPES:
        yield from _of_type(kind)
    yield from _saturating()
    yield from _mul24()
    yield from _dot_products()
    for bits in (32, 64):
        yield from _carry_chains(bits)
    yield from _immediates()


def _of_type(kind: str) -> Iterator[Case]:
    bits = int(kind[1:])
    pool = ints(bits)
    for operation, function in BINARY.items():
        lanes = pairs(pool, pool)
        if operation in ("div", "rem"):
            # Division by zero is unspecified, and so is INT_MIN / -1.
            lowest = 1 << bits - 1
            lanes = [(a, b) for a, b in lanes if b and not (kind[0] == "s" and a == lowest and signed(b, bits) == -1)]

        def binary(a: int, b: int, function: Callable[[int, int, int], int] = function) -> int:
            return function(number(a, kind), number(b, kind), bits)

        yield make(f"{operation}.{kind}", bits, (bits, bits), binary, lanes)
    triples = pairs(pool, pool, pool)
    for part, shift in (("lo", 0), ("hi", bits)):

        def multiply_add(a: int, b: int, c: int, shift: int = shift) -> int:
            return (number(a, kind) * number(b, kind) >> shift) + c

        yield make(f"mad.{part}.{kind}", bits, (bits,) * 3, multiply_add, triples)
    yield make(f"sad.{kind}", bits, (bits,) * 3, lambda a, b, c: c + abs(number(a, kind) - number(b, kind)), triples)
    if bits < 64:
        wide = 2 * bits
        product = make(
            f"mul.wide.{kind}", wide, (bits, bits), lambda a, b: number(a, kind) * number(b, kind), pairs(pool, pool)
        )
        yield product
        lanes = pairs(pool, pool, ints(wide))
        yield make(
            f"mad.wide.{kind}", wide, (bits, bits, wide), lambda a, b, c: number(a, kind) * number(b, kind) + c, lanes
        )
    if kind[0] == "s":
        yield make(f"neg.{kind}", bits, bits, lambda a: -a, pool)
        yield make(f"abs.{kind}", bits, bits, lambda a: abs(number(a, kind)), pool)


def _clamp(x: int) -> int:
    return min(max(x, -(1 << 31)), (1 << 31) - 1)


def _saturating() -> Iterator[Case]:
    pool = ints(32)
    lanes = pairs(pool, pool)
    yield make("add.sat.s32", 32, (32, 32), lambda a, b: _clamp(signed(a, 32) + signed(b, 32)), lanes)
    yield make("sub.sat.s32", 32, (32, 32), lambda a, b: _clamp(signed(a, 32) - signed(b, 32)), lanes)
    yield make(
        "mad.hi.sat.s32", 32, (32,) * 3, lambda a, b, c: _clamp((signed(a, 32) * signed(b, 32) >> 32) + signed(c, 32)),
        pairs(pool, pool, pool),
    )  # fmt: skip
    for kind, half in (("u16x2", "u16"), ("s16x2", "s16")):
        for operation in ("add", "min", "max"):

            def halves(a: int, b: int, half: str = half, operation: str = operation) -> int:
                low = BINARY[operation](number(a, half), number(b, half), 16)
                high = BINARY[operation](number(a >> 16, half), number(b >> 16, half), 16)
                return low & 0xFFFF | high << 16

            yield make(f"{operation}.{kind}", 32, (32, 32), halves, lanes, min_arch=90)


def _mul24() -> Iterator[Case]:
    pool = ints(32)
    for kind in ("s32", "u32"):

        def product(a: int, b: int, kind: str = kind) -> int:
            return number(a, f"{kind[0]}24") * number(b, f"{kind[0]}24")

        for part, shift in (("lo", 0), ("hi", 16)):
            yield make(
                f"mul24.{part}.{kind}", 32, (32, 32),
                lambda a, b, product=product, shift=shift: product(a, b) >> shift, pairs(pool, pool),
            )  # fmt: skip
            yield make(
                f"mad24.{part}.{kind}", 32, (32,) * 3,
                lambda a, b, c, product=product, shift=shift: (product(a, b) >> shift) + c, pairs(pool, pool, pool),
            )  # fmt: skip


def _dot_products() -> Iterator[Case]:
    triples = pairs(ints(32), ints(32), ints(32))
    for first in "su":
        for second in "su":

            def dot(a: int, b: int, c: int, size: int, shift: int, first: str = first, second: str = second) -> int:
                elements = 32 // size
                return c + sum(
                    number(a >> size * k, f"{first}{size}") * number(b >> 8 * k + shift, f"{second}8")
                    for k in range(elements)
                )

            types = f"{first}32.{second}32"
            yield make(f"dp4a.{types}", 32, (32,) * 3, lambda a, b, c, dot=dot: dot(a, b, c, 8, 0), triples)
            for half, shift in (("lo", 0), ("hi", 16)):
                yield make(
                    f"dp2a.{half}.{types}",
                    32,
                    (32,) * 3,
                    lambda a, b, c, dot=dot, shift=shift: dot(a, b, c, 16, shift),
                    triples,
                )


def _carry_chains(bits: int) -> Iterator[Case]:
    """Make two-word additions, subtractions and multiply-adds: the carry shows in the upper word."""
    pool = ints(bits)
    words = pairs(pool, pool, pool, pool)
    kind, wide = f"u{bits}", 1 << bits

    def split(x: int) -> tuple[int, int]:
        return x % wide, (x // wide) % wide

    for operation, sign in (("add", 1), ("sub", -1)):
        yield make(
            f"{operation}.cc.{kind} {operation}c", (bits, bits), (bits,) * 4,
            lambda a, b, c, f, sign=sign: split(a + wide * b + sign * (c + wide * f)), words,
            body=f"{operation}.cc.{kind} {{d}}, {{a}}, {{c}}; {operation}c.{kind} {{e}}, {{b}}, {{f}};",
        )  # fmt: skip
    yield make(
        f"addc.cc.{kind} carry", (bits, bits), (bits,) * 4,
        lambda a, b, c, f: split((a + wide * b + c + wide * f) // wide), words, declarations=f".reg .b{bits} %low;",
        body=f"add.cc.{kind} %low, {{a}}, {{c}}; addc.cc.{kind} {{d}}, {{b}}, {{f}}; addc.{kind} {{e}}, 0, 0;",
    )  # fmt: skip
    # A full product of two words plus two words: mad.lo.cc and madc.hi.
    yield make(
        f"mad.lo.cc.{kind} madc.hi", (bits, bits), (bits,) * 4, lambda a, b, c, f: split(a * b + c + wide * f), words,
        body=f"mad.lo.cc.{kind} {{d}}, {{a}}, {{b}}, {{c}}; madc.hi.{kind} {{e}}, {{a}}, {{b}}, {{f}};",
    )  # fmt: skip


def _immediates() -> Iterator[Case]:
    """Make literals as operands: negative ones in every width, hexadecimal, and beyond 32 bits."""
    for kind, literal in (("s16", -3), ("s32", -3), ("s64", -3), ("u32", 0xFFFFFFF0), ("u64", 0x123456789ABCDEF)):
        bits = int(kind[1:])
        yield make(
            f"add.{kind} immediate", bits, bits, lambda a, literal=literal: a + literal, ints(bits),
            body=f"add.{kind} {{d}}, {{a}}, {literal};",
        )  # fmt: skip
        yield make(
            f"max.{kind} immediate", bits, bits,
            lambda a, literal=literal, kind=kind: max(number(a, kind), literal), ints(bits),
            body=f"max.{kind} {{d}}, {{a}}, {literal};",
        )  # fmt: skip

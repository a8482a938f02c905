"""Arithmetic on f16, f16x2, bf16 and bf16x2."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cuattn.testing.instructions import exact
from cuattn.testing.instructions.case import Case, make
from cuattn.testing.instructions.exact import BF16, F16, Format
from cuattn.testing.instructions.floats import OPERATIONS, arithmetic, lanes_of, min_max
from cuattn.testing.instructions.operands import floats, packed, pairs

MODIFIERS = {
    ("f16", "add"): ("", ".ftz", ".sat", ".ftz.sat"),
    ("f16", "sub"): ("", ".ftz", ".sat"),
    ("f16", "mul"): ("", ".ftz", ".sat"),
    ("f16", "fma"): ("", ".ftz", ".sat", ".relu", ".ftz.relu"),
    ("bf16", "add"): ("",),
    ("bf16", "sub"): ("",),
    ("bf16", "mul"): ("",),
    ("bf16", "fma"): ("", ".relu"),
}


def in_pairs(function: Callable[..., int]) -> Callable[..., int]:
    """Make of a function of 16-bit operands one that is applied to both halves."""

    def run(*operands: int) -> int:
        return function(*(x & 0xFFFF for x in operands)) | function(*(x >> 16 for x in operands)) << 16

    return run


def both(
    opcode: str, fmt: Format, count: int, function: Callable[..., int], lanes: list[tuple[int, ...]], **options: object
) -> Iterator[Case]:
    """Make cases of the scalar instruction and its x2 form."""
    yield make(f"{opcode}.{fmt.name}", 16, (16,) * count, function, lanes, **options)
    yield make(f"{opcode}.{fmt.name}x2", 32, (32,) * count, in_pairs(function), packed(lanes), **options)


def hard_sums(fmt: Format) -> list[tuple[int, ...]]:
    """Return triples whose exact product is a tie, which only an addend far below can break, on either side.

    With m mantissa bits, (1 + i / 2^m)(1 + j / 2^m) is a tie when i * j is 2^(m - 1) modulo 2^m. Rounding the sum to
    f32, or to f64, before the format loses an addend that is small enough.
    """
    one, half = fmt.bias << fmt.mantissa, 1 << fmt.mantissa - 1
    factors = [(i, half // i) for i in (1, 2, 4, 8)] + [(3, half), (half + 1, half)]
    addends = [c | sign for c in (0, 1, 2, one // 4, one // 2) for sign in (0, fmt.sign)]
    lanes: list[tuple[int, ...]] = []
    for i, j in factors:
        for sign in (0, fmt.sign):
            lanes += [(one + i | sign, one + j, c) for c in addends]
            lanes += [(one - (4 << fmt.mantissa) + i | sign, one + j, c) for c in addends]
    return lanes


def cases() -> Iterator[Case]:
    for (name, operation), suffixes in MODIFIERS.items():
        fmt = exact.FORMATS[name]
        count, function = OPERATIONS[operation]
        lanes = lanes_of(name, count) + (hard_sums(fmt) if count == 3 else [])
        # bf16 had only fma before sm_90.
        arch = 90 if name == "bf16" and operation != "fma" else 80
        for suffix in suffixes:
            run = arithmetic(fmt, function, "rn", ftz=".ftz" in suffix, sat=".sat" in suffix, relu=".relu" in suffix)
            yield from both(f"{operation}.rn{suffix}", fmt, count, run, lanes, min_arch=arch)
    for fmt in (F16, BF16):
        lanes = pairs(floats(fmt.name), floats(fmt.name))
        for operation in ("min", "max"):
            for suffix in ("", ".NaN", ".xorsign.abs", ".NaN.xorsign.abs", *((".ftz",) if fmt is F16 else ())):
                arch = 86 if "xorsign" in suffix else 80
                yield from both(f"{operation}{suffix}", fmt, 2, min_max(fmt, operation, suffix), lanes, min_arch=arch)
        numbers: list[tuple[int, ...]] = [(x,) for x in floats(fmt.name) if not fmt.is_nan(x)]
        yield from both("neg", fmt, 1, lambda a, fmt=fmt: a ^ fmt.sign, numbers)
        yield from both("abs", fmt, 1, lambda a, fmt=fmt: a & fmt.sign - 1, numbers)

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
    """A function of 16-bit operands, applied to both halves."""

    def run(*operands: int) -> int:
        return function(*(x & 0xFFFF for x in operands)) | function(*(x >> 16 for x in operands)) << 16

    return run


def both(
    opcode: str, fmt: Format, count: int, function: Callable[..., int], lanes: list[tuple[int, ...]], **options: object
) -> Iterator[Case]:
    """The scalar instruction and its x2 form."""
    yield make(f"{opcode}.{fmt.name}", 16, (16,) * count, function, lanes, **options)
    yield make(f"{opcode}.{fmt.name}x2", 32, (32,) * count, in_pairs(function), packed(lanes), **options)


def hard_sums() -> list[tuple[int, ...]]:
    """Triples whose product ends on a tie that only the addend, far below, can break; and cancellations."""
    lanes: list[tuple[int, ...]] = []
    for a in (0x3F81, 0x3F83, 0x3F8F, 0x4003, 0x1F81, 0x0081):
        for b in (0x3F88, 0x3F90, 0x3F81, 0x3FFF, 0xBF88):
            for c in (0x0001, 0x8001, 0x0080, 0x3380, 0xB380, 0xBF8F, 0x3F80, 0x2B80):
                lanes.append((a, b, c))
    return lanes


def cases() -> Iterator[Case]:
    for (name, operation), suffixes in MODIFIERS.items():
        fmt = exact.FORMATS[name]
        count, function = OPERATIONS[operation]
        lanes = lanes_of(name, count) + (hard_sums() if count == 3 else [])
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

"""setp and set: every comparison on every type, boolean operands, two destinations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cuattn.testing.instructions import exact
from cuattn.testing.instructions.case import Case, make
from cuattn.testing.instructions.exact import FORMATS, Format
from cuattn.testing.instructions.operands import WIDTH, floats, ints, number, packed, pairs

# comparison → results for (less, equal, greater)
ORDER = {"eq": (0, 1, 0), "ne": (1, 0, 1), "lt": (1, 0, 0), "le": (1, 1, 0), "gt": (0, 0, 1), "ge": (0, 1, 1)}
UNSIGNED = {"lo": ORDER["lt"], "ls": ORDER["le"], "hi": ORDER["gt"], "hs": ORDER["ge"]}
BOOLEAN: dict[str, Callable[[int, int], int]] = {
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y,
}


def integer_test(comparison: str, kind: str) -> Callable[[int, int], int]:
    truth = (ORDER | UNSIGNED)[comparison]

    def run(a: int, b: int) -> int:
        x, y = number(a, kind.replace("b", "u")), number(b, kind.replace("b", "u"))
        return truth[(x > y) - (x < y) + 1]

    return run


def float_test(comparison: str, fmt: Format, ftz: bool = False) -> Callable[[int, int], int]:
    """Make a comparison of floats. The u forms are true for NaN, num is true without one, nan with one."""

    def run(a: int, b: int) -> int:
        if ftz:
            a, b = exact.flush(fmt, a), exact.flush(fmt, b)
        order = exact.compare(fmt, a, b)
        if comparison in ("num", "nan"):
            return int((order is None) == (comparison == "nan"))
        if order is None:
            return int(comparison.endswith("u"))
        return ORDER[comparison.removesuffix("u")][order + 1]

    return run


FLOAT_COMPARISONS = (*ORDER, *(f"{name}u" for name in ORDER), "num", "nan")


def cases() -> Iterator[Case]:
    for kind in ("b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64"):
        bits = int(kind[1:])
        names = {"b": ("eq", "ne"), "s": tuple(ORDER), "u": (*ORDER, *UNSIGNED)}[kind[0]]
        for name in names:
            yield make(f"setp.{name}.{kind}", 1, (bits, bits), integer_test(name, kind), pairs(ints(bits), ints(bits)))
    for kind in ("f32", "f64", "f16", "bf16"):
        fmt, bits = FORMATS[kind], WIDTH[kind]
        lanes = pairs(floats(kind), floats(kind))
        arch = 90 if kind == "bf16" else 80
        for name in FLOAT_COMPARISONS:
            yield make(f"setp.{name}.{kind}", 1, (bits, bits), float_test(name, fmt), lanes, min_arch=arch)
    lanes = pairs(floats("f32"), floats("f32"))
    for name in ("eq", "lt", "geu"):
        yield make(f"setp.{name}.ftz.f32", 1, (32, 32), float_test(name, FORMATS["f32"], ftz=True), lanes)
    yield from _with_booleans()
    yield from _packed()
    yield from _set()


def _with_booleans() -> Iterator[Case]:
    lanes = pairs(ints(32)[:14], ints(32)[:14], (0, 1))
    for name, combine in BOOLEAN.items():
        for prefix, flip in (("", 0), ("!", 1)):
            test = integer_test("lt", "s32")
            yield make(
                f"setp.lt.{name}.s32 {prefix}c", (1, 1), (32, 32, 1),
                lambda a, b, c, test=test, combine=combine, flip=flip: (
                    combine(test(a, b), c ^ flip), combine(1 - test(a, b), c ^ flip)
                ),
                lanes, body=f"setp.lt.{name}.s32 {{d}}|{{e}}, {{a}}, {{b}}, {prefix}{{c}};",
            )  # fmt: skip
    test = float_test("gtu", FORMATS["f32"])
    yield make(
        "setp.gtu.and.f32", 1, (32, 32, 1), lambda a, b, c: test(a, b) & c,
        pairs(floats("f32")[:16], floats("f32")[6:22], (0, 1)),
    )  # fmt: skip
    yield make(
        "setp.gtu.f32 both", (1, 1), (32, 32), lambda a, b: (test(a, b), 1 - test(a, b)),
        pairs(floats("f32"), floats("f32")), body="setp.gtu.f32 {d}|{e}, {a}, {b};",
    )  # fmt: skip


def _packed() -> Iterator[Case]:
    """Make x2 comparisons: the first destination for the lower halves, the second for the upper ones."""
    for kind in ("f16", "bf16"):
        lanes = list(packed(pairs(floats(kind), floats(kind))))
        arch = 90 if kind == "bf16" else 80
        for name in ("eq", "ltu", "ge"):
            test = float_test(name, FORMATS[kind])
            yield make(
                f"setp.{name}.{kind}x2", (1, 1), (32, 32),
                lambda a, b, test=test: (test(a & 0xFFFF, b & 0xFFFF), test(a >> 16, b >> 16)), lanes,
                body=f"setp.{name}.{kind}x2 {{d}}|{{e}}, {{a}}, {{b}};", min_arch=arch,
            )  # fmt: skip


def _set() -> Iterator[Case]:
    lanes = pairs(floats("f32"), floats("f32"))
    test = float_test("leu", FORMATS["f32"])
    yield make("set.leu.u32.f32", 32, (32, 32), lambda a, b: -test(a, b), lanes)
    yield make("set.leu.f32.f32", 32, (32, 32), lambda a, b: 0x3F800000 * test(a, b), lanes)
    flushed = float_test("eq", FORMATS["f32"], ftz=True)
    yield make("set.eq.ftz.s32.f32", 32, (32, 32), lambda a, b: -flushed(a, b), lanes)
    integer = integer_test("gt", "s64")
    wide = pairs(ints(64), ints(64), (0, 1))
    yield make("set.gt.or.u32.s64", 32, (64, 64, 1), lambda a, b, c: -(integer(a, b) | c), wide)
    yield make("set.gt.f32.s64", 32, (64, 64), lambda a, b: 0x3F800000 * integer(a, b), pairs(ints(64), ints(64)))
    for kind, one, arch in (("f16", 0x3C00, 80), ("bf16", 0x3F80, 90)):
        test = float_test("gt", FORMATS[kind])
        scalar = pairs(floats(kind), floats(kind))
        yield make(
            f"set.gt.{kind}.{kind}",
            16,
            (16, 16),
            lambda a, b, test=test, one=one: one * test(a, b),
            scalar,
            min_arch=arch,
        )
        yield make(f"set.gt.u32.{kind}", 32, (16, 16), lambda a, b, test=test: -test(a, b), scalar, min_arch=arch)

        def halves(a: int, b: int, true: int, test: Callable[[int, int], int] = test) -> int:
            return true * test(a & 0xFFFF, b & 0xFFFF) | true * test(a >> 16, b >> 16) << 16

        for result, true in ((f"{kind}x2", one), ("u32", 0xFFFF)):
            yield make(
                f"set.gt.{result}.{kind}x2", 32, (32, 32), lambda a, b, halves=halves, true=true: halves(a, b, true),
                packed(scalar), min_arch=arch,
            )  # fmt: skip

"""Logic, shifts, fields, permutations, counts, selections and moves."""

from __future__ import annotations

from collections.abc import Iterator

from cuattn.testing.instructions.case import Case, make
from cuattn.testing.instructions.operands import ints, noise, number, pairs

SHIFTS = (0, 1, 3, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 255, 256, 0x80000000, 0xFFFFFFFF)
TABLES = (0x00, 0xFF, 0x80, 0xFE, 0x96, 0xE8, 0xCA, 0xD8, 0x78, 0x1D, 0x40, 0xB4)


def cases() -> Iterator[Case]:
    for bits in (16, 32, 64):
        yield from _logic(bits)
        yield from _shifts(bits)
    yield from _predicates()
    yield from _funnel_shifts()
    yield from _lop3()
    yield from _permute()
    for bits in (32, 64):
        yield from _fields(bits)
        yield from _counts(bits)
    for bits in (16, 32, 64):
        yield from _selections(bits)
    yield from _moves()


def _logic(bits: int) -> Iterator[Case]:
    pool = ints(bits)
    lanes = pairs(pool, pool)
    yield make(f"and.b{bits}", bits, (bits, bits), lambda a, b: a & b, lanes)
    yield make(f"or.b{bits}", bits, (bits, bits), lambda a, b: a | b, lanes)
    yield make(f"xor.b{bits}", bits, (bits, bits), lambda a, b: a ^ b, lanes)
    yield make(f"not.b{bits}", bits, bits, lambda a: ~a, pool)
    yield make(f"cnot.b{bits}", bits, bits, lambda a: a == 0, pool)


def _predicates() -> Iterator[Case]:
    lanes = pairs((0, 1), (0, 1))
    yield make("and.pred", 1, (1, 1), lambda a, b: a & b, lanes)
    yield make("or.pred", 1, (1, 1), lambda a, b: a | b, lanes)
    yield make("xor.pred", 1, (1, 1), lambda a, b: a ^ b, lanes)
    yield make("not.pred", 1, 1, lambda a: 1 - a, (0, 1))
    yield make("mov.pred", 1, 1, lambda a: a, (0, 1))


def _shifts(bits: int) -> Iterator[Case]:
    lanes = pairs(ints(bits), SHIFTS)
    yield make(f"shl.b{bits}", bits, (bits, 32), lambda a, n: a << n if n < bits else 0, lanes)
    for kind in (f"u{bits}", f"s{bits}", f"b{bits}"):

        def shift_right(a: int, n: int, kind: str = kind) -> int:
            return number(a, kind.replace("b", "u")) >> min(n, bits)

        yield make(f"shr.{kind}", bits, (bits, 32), shift_right, lanes)


def _funnel_shifts() -> Iterator[Case]:
    lanes = pairs(ints(32)[:12], ints(32)[-8:], SHIFTS)
    for mode in ("wrap", "clamp"):

        def amount(n: int, mode: str = mode) -> int:
            return n & 31 if mode == "wrap" else min(n, 32)

        yield make(
            f"shf.l.{mode}.b32", 32, (32,) * 3, lambda a, b, n, amount=amount: (b << 32 | a) << amount(n) >> 32, lanes
        )
        yield make(f"shf.r.{mode}.b32", 32, (32,) * 3, lambda a, b, n, amount=amount: (b << 32 | a) >> amount(n), lanes)


def _lop3() -> Iterator[Case]:
    lanes = pairs(ints(32)[4:12], ints(32)[6:14], ints(32)[8:16])
    for table in TABLES:

        def logic(a: int, b: int, c: int, table: int = table) -> int:
            return sum((table >> ((a >> k & 1) << 2 | (b >> k & 1) << 1 | c >> k & 1) & 1) << k for k in range(32))

        yield make(
            f"lop3.b32 {table:#x}", 32, (32,) * 3, logic, lanes, body=f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};"
        )


# prmt modes, from the table of the PTX manual: bytes of d, most significant first, for selectors 0 to 3.
PERMUTE_MODES = {
    "f4e": ("3210", "4321", "5432", "6543"),
    "b4e": ("5670", "6701", "7012", "0123"),
    "rc8": ("0000", "1111", "2222", "3333"),
    "ecl": ("3210", "3211", "3222", "3333"),
    "ecr": ("0000", "1110", "2210", "3210"),
    "rc16": ("1010", "3232", "1010", "3232"),
}


def _permute() -> Iterator[Case]:
    def pick(a: int, b: int, selector: int) -> int:
        byte = (b << 32 | a) >> 8 * (selector & 7) & 0xFF
        return (0xFF if byte & 0x80 else 0) if selector & 8 else byte

    def permute(a: int, b: int, selector: int) -> int:
        return sum(pick(a, b, selector >> 4 * k & 15) << 8 * k for k in range(4))

    selectors = (
        0x3210,
        0x5410,
        0x7632,
        0x1032,
        0x7654,
        0x4567,
        0xBA98,
        0xFEDC,
        0x8888,
        0xF731,
        *noise(16, 6, 1),
        0xABCD5410,
    )
    lanes = pairs(ints(32)[8:], ints(32)[8:], selectors)
    yield make("prmt.b32", 32, (32,) * 3, permute, lanes)
    for selector in (0x5410, 0x7632, 0x3276, 0x0444):
        yield make(
            f"prmt.b32 {selector:#x}", 32, (32, 32), lambda a, b, selector=selector: permute(a, b, selector),
            pairs(ints(32), ints(32)), body=f"prmt.b32 {{d}}, {{a}}, {{b}}, {selector:#x};",
        )  # fmt: skip
    for mode, rows in PERMUTE_MODES.items():
        yield make(
            f"prmt.b32.{mode}", 32, (32,) * 3, lambda a, b, c, rows=rows: permute(a, b, int(rows[c & 3], 16)),
            pairs(ints(32)[8:], ints(32)[8:], (0, 1, 2, 3, 7, 0xFFFFFFFE)),
        )  # fmt: skip


def _fields(bits: int) -> Iterator[Case]:
    positions = (0, 1, 8, 31, 32, 33, 63, 64, 200, 0x107)
    lengths = (0, 1, 5, 16, 31, 32, 33, 64, 255, 0x104)
    lanes = pairs(ints(bits)[4:], positions, lengths)

    def extract(a: int, pos: int, length: int, is_signed: bool) -> int:
        # The pseudocode of the PTX manual, bit by bit.
        pos, length, top = pos & 0xFF, length & 0xFF, bits - 1
        fill = 0 if not is_signed or length == 0 else a >> min(pos + length - 1, top) & 1
        return sum((a >> pos + k & 1 if k < length and pos + k <= top else fill) << k for k in range(bits))

    for sign in "us":
        yield make(
            f"bfe.{sign}{bits}", bits, (bits, 32, 32), lambda a, p, n, sign=sign: extract(a, p, n, sign == "s"), lanes
        )

    def insert(a: int, b: int, pos: int, length: int) -> int:
        result, pos, length = b, pos & 0xFF, length & 0xFF
        for k in range(bits):
            if k < length and pos + k < bits:
                result = result & ~(1 << pos + k) | (a >> k & 1) << pos + k
        return result

    yield make(
        f"bfi.b{bits}", bits, (bits, bits, 32, 32), insert, pairs(ints(bits)[8:], ints(bits)[8:], positions, lengths)
    )


def _counts(bits: int) -> Iterator[Case]:
    pool = (*ints(bits), *(1 << k for k in range(bits)), *((1 << bits) - (1 << k) for k in range(bits)))
    yield make(f"popc.b{bits}", 32, bits, lambda a: a.bit_count(), pool)
    yield make(f"clz.b{bits}", 32, bits, lambda a: bits - a.bit_length(), pool)
    yield make(f"brev.b{bits}", bits, bits, lambda a: int(f"{a:0{bits}b}"[::-1], 2), pool)
    for sign in "us":

        def find(a: int, sign: str = sign) -> int:
            x = number(a, f"{sign}{bits}")
            return (~x if x < 0 else x).bit_length() - 1

        yield make(f"bfind.{sign}{bits}", 32, bits, find, pool)
        yield make(
            f"bfind.shiftamt.{sign}{bits}",
            32,
            bits,
            lambda a, find=find: bits - 1 - find(a) if find(a) >= 0 else -1,
            pool,
        )


def _selections(bits: int) -> Iterator[Case]:
    lanes = pairs(ints(bits)[:10], ints(bits)[5:15], (0, 1))
    for kind in "bsu" if bits == 16 else "bsuf":
        yield make(f"selp.{kind}{bits}", bits, (bits, bits, 1), lambda a, b, p: a if p else b, lanes)
    yield make(
        f"slct.b{bits}.s32", bits, (bits, bits, 32), lambda a, b, c: b if c >> 31 else a,
        pairs(ints(bits)[:10], ints(bits)[5:15], (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)),
    )  # fmt: skip
    # As a float: -0 is not negative, a NaN is not >= 0; .ftz turns a negative subnormal into -0.
    choosers = (0, 0x80000000, 0x3F800000, 0xBF800000, 0x7FC00000, 0xFFC00000, 0x7F800000, 0xFF800000, 1, 0x80000001)
    below = (0xBF800000, 0x7FC00000, 0xFFC00000, 0xFF800000)
    lanes = pairs(ints(bits)[:6], ints(bits)[5:11], choosers)
    yield make(
        f"slct.b{bits}.f32", bits, (bits, bits, 32), lambda a, b, c: b if c in (*below, 0x80000001) else a, lanes
    )
    yield make(f"slct.ftz.b{bits}.f32", bits, (bits, bits, 32), lambda a, b, c: b if c in below else a, lanes)


def _moves() -> Iterator[Case]:
    for bits in (16, 32, 64):
        yield make(f"mov.b{bits}", bits, bits, lambda a: a, ints(bits))
    yield make(
        "mov.b32 pack",
        32,
        (16, 16),
        lambda a, b: a | b << 16,
        pairs(ints(16), ints(16)),
        body="mov.b32 {d}, {{{a}, {b}}};",
    )
    yield make(
        "mov.b64 pack",
        64,
        (32, 32),
        lambda a, b: a | b << 32,
        pairs(ints(32), ints(32)),
        body="mov.b64 {d}, {{{a}, {b}}};",
    )
    yield make(
        "mov.b64 pack 4", 64, (16,) * 4, lambda a, b, c, f: a | b << 16 | c << 32 | f << 48,
        pairs(ints(16)[4:9], ints(16)[6:11], ints(16)[8:12], ints(16)[10:]),
        body="mov.b64 {d}, {{{a}, {b}, {c}, {f}}};",
    )  # fmt: skip
    yield make(
        "mov.b32 unpack", (16, 16), 32, lambda a: (a & 0xFFFF, a >> 16), ints(32), body="mov.b32 {{{d}, {e}}}, {a};"
    )
    yield make(
        "mov.b64 unpack", (32, 32), 64, lambda a: (a & 0xFFFFFFFF, a >> 32), ints(64), body="mov.b64 {{{d}, {e}}}, {a};"
    )
    yield make("mov.b32 upper half", 16, 32, lambda a: a >> 16, ints(32), body="mov.b32 {{_, {d}}}, {a};")
    yield make("mov.f32 literal", 32, 32, lambda a: 0x3FC00000, ints(32), body="mov.f32 {d}, 0f3FC00000;")
    yield make(
        "mov.f64 literal", 64, 64, lambda a: 0x3FF8000000000000, ints(64), body="mov.f64 {d}, 0d3FF8000000000000;"
    )

"""One row of the instruction table, the kernel it becomes, and the judgement of what came back.

A case is one instruction (or a short sequence, for carry chains) with many lanes of operands. `module_text` writes a
PTX module with a kernel a case: each thread loads its operands from 8-byte cells, executes the instruction once and
stores the results to 8-byte cells. Odd threads among the last 32 jump over the instruction and must find their
destinations as they were: a masked lane. The same module runs on the host executor and, loaded by the driver, on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cuattn.testing.instructions.exact import FORMATS, Format, ulp_distance

MAX_LANES = 960
MASKED_THREADS = 32
# The first .version with everything that the table has for a target.
PTX_VERSION = {80: "7.1", 86: "7.2", 89: "8.1", 90: "8.1"}

# type of an operand → (register type, load/store type)
_REGISTERS = {8: ("b16", "u8"), 16: ("b16", "b16"), 32: ("b32", "b32"), 64: ("b64", "b64")}


@dataclass(frozen=True)
class Case:
    """One instruction and its lanes.

    Parameters
    ----------
    opcode
        As PTX writes it, ``"add.sat.s32"``.
    dsts, srcs
        Register widths in bits, 1 for a predicate.
    lanes
        Operand bits of each lane, one integer a source.
    expected
        Result bits of each lane, one integer a destination.
    body
        The text of the instruction with ``{d}``, ``{e}`` for destinations and ``{a}``, ``{b}``, … for sources; by
        default the opcode with all of them in order.
    result
        Name of the floating-point format of the (only) destination, for the two looser judgements:
    any_nan
        Where a NaN is expected any NaN will do: PTX does not say which, or not for every GPU.
    exact_values, max_ulp, max_abs
        For approximate instructions: the true results, and how far off a result may be, in ulp or absolutely.
    min_arch
        First compute capability that has the instruction, times ten.
    """

    opcode: str
    dsts: tuple[int, ...]
    srcs: tuple[int, ...]
    lanes: tuple[tuple[int, ...], ...]
    expected: tuple[tuple[int, ...], ...] = ()
    body: str = ""
    result: str = ""
    any_nan: bool = False
    exact_values: tuple[float, ...] = ()
    max_ulp: float = 0.0
    max_abs: float = 0.0
    min_arch: int = 80
    declarations: str = ""
    note: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        results = len(self.exact_values) if self.exact_values else len(self.expected)
        if not self.lanes or results != len(self.lanes) or len(self.lanes) > MAX_LANES:
            raise ValueError(f"{self.opcode}: {len(self.lanes)} lanes, {results} results")

    @property
    def instruction(self) -> str:
        """The text between load and store, with the kernel's register names."""
        names = {
            **{"de"[k]: f"%d{k}" for k in range(len(self.dsts))},
            **{"abcf"[k]: f"%s{k}" for k in range(len(self.srcs))},
        }
        body = self.body or f"{{opcode}} {', '.join(f'{{{n}}}' for n in names)};"
        return body.format(opcode=self.opcode, **names)


def make(
    opcode: str,
    dsts: int | tuple[int, ...],
    srcs: int | tuple[int, ...],
    function: Callable[..., int | tuple[int, ...]],
    lanes: Iterable[int | tuple[int, ...]],
    **options: object,
) -> Case:
    """Make a case whose expected bits are ``function(*operands)`` lane by lane."""
    dsts = (dsts,) if isinstance(dsts, int) else dsts
    srcs = (srcs,) if isinstance(srcs, int) else srcs
    inputs = [lane if isinstance(lane, tuple) else (lane,) for lane in lanes]
    results = [function(*lane) for lane in inputs]
    expected = [r if isinstance(r, tuple) else (r,) for r in results]
    masked = [tuple(x & (1 << bits) - 1 for x, bits in zip(r, dsts, strict=True)) for r in expected]
    return Case(opcode, dsts, srcs, tuple(inputs), tuple(masked), **options)  # type: ignore[arg-type]


def num_threads(case: Case) -> int:
    """Return the number of threads of a launch: every lane of the case, a whole warp at least, and the masked ones."""
    return max(40, len(case.lanes)) + MASKED_THREADS


def is_masked(thread: int, threads: int) -> bool:
    """Whether that thread jumps over the instruction."""
    return thread >= threads - MASKED_THREADS and thread % 2 == 1


def operands(case: Case) -> NDArray[np.uint64]:
    """Return the operand cells, uint64 [max(1, sources), threads]."""
    index = np.arange(num_threads(case)) % len(case.lanes)
    cells = np.array(case.lanes, dtype=np.uint64).reshape(len(case.lanes), -1)[index].T
    return np.ascontiguousarray(cells)


def module_text(cases: Sequence[Case], arch: int) -> str:
    """Write the PTX of a module with a kernel ``case_0``, ``case_1``, … for each case."""
    lines = [f".version {PTX_VERSION[arch]}", f".target sm_{arch}", ".address_size 64"]
    for number, case in enumerate(cases):
        lines += _kernel(f"case_{number}", case)
    return "\n".join(lines) + "\n"


def untouched(bits: int) -> int:
    """Return what a destination of that width holds before the instruction."""
    return 1 if bits == 1 else 0x5A5A5A5A5A5A5A5A & (1 << bits) - 1


def _kernel(name: str, case: Case) -> list[str]:
    lines = [
        f".visible .entry {name}(.param .u64 {name}_in, .param .u64 {name}_out, .param .u32 {name}_n)",
        "{",
        ".reg .pred %outside, %skip;",
        ".reg .b32 %lane, %count, %odd, %last;",
        ".reg .b64 %in, %out, %step, %offset;",
        case.declarations,
    ]
    for prefix, widths in (("s", case.srcs), ("d", case.dsts)):
        for k, bits in enumerate(widths):
            if bits == 1:
                lines += [f".reg .pred %{prefix}{k};", f".reg .b32 %{prefix}{k}_bits;"]
            else:
                lines.append(f".reg .{_REGISTERS[bits][0]} %{prefix}{k};")
    lines += [
        f"ld.param.u64 %in, [{name}_in];",
        f"ld.param.u64 %out, [{name}_out];",
        f"ld.param.u32 %count, [{name}_n];",
        "mov.u32 %lane, %tid.x;",
        "setp.ge.u32 %outside, %lane, %count;",
        "@%outside bra DONE;",
        "mul.wide.u32 %offset, %lane, 8;",
        "mul.wide.u32 %step, %count, 8;",
        "add.s64 %in, %in, %offset;",
        "add.s64 %out, %out, %offset;",
    ]
    for k, bits in enumerate(case.srcs):
        if bits == 1:
            lines += [f"ld.global.b32 %s{k}_bits, [%in];", f"setp.ne.s32 %s{k}, %s{k}_bits, 0;"]
        else:
            lines.append(f"ld.global.{_REGISTERS[bits][1]} %s{k}, [%in];")
        lines.append("add.s64 %in, %in, %step;")
    for k, bits in enumerate(case.dsts):
        lines.append(f"setp.eq.s32 %d{k}, %lane, %lane;" if bits == 1 else f"mov.b{bits} %d{k}, {untouched(bits):#x};")
    lines += [
        "and.b32 %odd, %lane, 1;",
        f"sub.s32 %last, %count, {MASKED_THREADS};",
        "setp.ge.u32 %skip, %lane, %last;",
        "selp.b32 %odd, %odd, 0, %skip;",
        "setp.ne.s32 %skip, %odd, 0;",
        "@%skip bra AFTER;",
        case.instruction,
        "AFTER:",
    ]
    for k, bits in enumerate(case.dsts):
        if bits == 1:
            lines += [f"selp.b32 %d{k}_bits, 1, 0, %d{k};", f"st.global.b32 [%out], %d{k}_bits;"]
        else:
            lines.append(f"st.global.{_REGISTERS[bits][1]} [%out], %d{k};")
        lines.append("add.s64 %out, %out, %step;")
    return [line for line in (*lines, "DONE:", "ret;", "}") if line]


def mismatches(case: Case, results: NDArray[np.uint64]) -> list[str]:
    """List what is wrong with the results, uint64 [destinations, threads]; empty when all is right."""
    found = []
    fmt = FORMATS[case.result] if case.result else None
    threads = results.shape[1]
    kept = tuple(untouched(bits) for bits in case.dsts)
    for thread in range(threads):
        lane = thread % len(case.lanes)
        got = tuple(int(x) for x in results[:, thread])
        if is_masked(thread, threads):
            if got != kept:
                found.append(f"{case.opcode}: masked thread {thread} got {', '.join(map(hex, got))}")
            continue
        problem = _judge(case, lane, got, fmt)
        if problem:
            inputs = ", ".join(f"{x:#x}" for x in case.lanes[lane])
            found.append(f"{case.opcode} lane {lane} ({inputs}): got {', '.join(map(hex, got))}, {problem}")
    return found


def _judge(case: Case, lane: int, got: tuple[int, ...], fmt: Format | None) -> str:
    if not case.exact_values:
        want = case.expected[lane]
        if got == want or (case.any_nan and fmt and fmt.is_nan(got[0]) and fmt.is_nan(want[0])):
            return ""
        return f"expected {', '.join(map(hex, want))}"
    assert fmt is not None
    exact = case.exact_values[lane]
    error = ulp_distance(fmt, got[0], exact)
    if error <= case.max_ulp:
        return ""
    if (
        case.max_abs
        and not fmt.is_nan(got[0])
        and not fmt.is_inf(got[0])
        and abs(float(fmt.value(got[0])) - exact) <= case.max_abs
    ):
        return ""
    return f"{error:.3g} ulp from {exact!r}, allowed {case.max_ulp:g}"

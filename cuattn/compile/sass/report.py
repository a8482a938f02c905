"""What there is to say about the machine code of a kernel: its loops, what they need, and what must not be in it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from cuattn.compile import arch as archs
from cuattn.compile.builder import Binary, on_disk
from cuattn.compile.ptxas_notes import Note, notes
from cuattn.compile.resources import Resources
from cuattn.compile.sass import graph, kinds
from cuattn.compile.sass.bound import CLOCK_GHZ, NUM_SMS, Bound, bound
from cuattn.compile.sass.code import Function, Instruction, parse
from cuattn.compile.sass.nvdisasm import disassemble

#: Whose rates the bounds are of.
BOUND_CAPABILITY = (9, 0)
#: What a loop may be there for, the first that the kernel has.
WORK = ("matrix products", "multiply-adds", "global memory", "instructions")


@dataclass(frozen=True, slots=True)
class LoopReport:
    """One iteration of a loop, for one warp.

    Attributes
    ----------
    first, last : int
        Addresses of the first and the last instruction of the iteration.
    instructions : int
        How many there are.
    counts : dict
        Kind (`kinds.KINDS`) to number.
    matrix : dict
        Opcode of a matrix product to number.
    matrix_groups, matrix_waits : int
        How often a group of wgmma is closed, and how often one is waited for. As many as there are wgmma: they run one
        at a time.
    global_bytes : float
        What the warp itself moves from and to global memory.
    bound : Bound or None
        None for architectures whose rates are not known here.
    """

    first: int
    last: int
    instructions: int
    counts: dict[str, int]
    matrix: dict[str, int]
    matrix_groups: int
    matrix_waits: int
    global_bytes: float
    bound: Bound | None


@dataclass(frozen=True, slots=True)
class KernelReport:
    """The machine code of one kernel.

    Attributes
    ----------
    entry, arch : str
        Of the kernel.
    resources : Resources or None
        ptxas's figures.
    notes : tuple of Note
        What ptxas says about speed: none is as it should be.
    instructions : int
        Of the whole kernel.
    bulk : dict
        Opcode of a bulk copy to how often it stands in the code.
    setmaxnreg : dict
        ``"increase"`` and ``"decrease"`` to the registers that are asked for.
    local_accesses : int
        Loads and stores of local memory: spills, or arrays that are not in registers.
    work : str
        What the loops below were chosen by, of `WORK`.
    loops : tuple of LoopReport
        Those that do this work, the main loop first; where no loop does, the whole kernel.
    looped : bool
        Whether `loops` are loops.
    """

    entry: str
    arch: str
    resources: Resources | None
    notes: tuple[Note, ...]
    instructions: int
    bulk: dict[str, int]
    setmaxnreg: dict[str, tuple[int, ...]]
    local_accesses: int
    work: str
    loops: tuple[LoopReport, ...]
    looped: bool

    @property
    def main(self) -> LoopReport:
        return self.loops[0]

    def to_dict(self) -> dict[str, Any]:
        """Convert the report to nested dicts and lists, for JSON."""
        return dataclasses.asdict(self)


def inspect(binary: Binary, *, clock_ghz: float = CLOCK_GHZ, num_sms: int = NUM_SMS) -> dict[str, KernelReport]:
    """Report on every kernel of a CUBIN, by entry name.

    Parameters
    ----------
    binary : Binary
        Of `cuattn.compile.build` with ``kind="cubin"``.
    clock_ghz : float
        Clock that the bounds are for.
    num_sms : int
        Multiprocessors that the bounds are for.

    Raises
    ------
    NvdisasmNotFoundError, DisassemblyError
        As for `disassemble`.
    """
    found = notes(binary.log)
    known = archs.capability(binary.arch) == BOUND_CAPABILITY

    def loop_report(instructions: list[Instruction]) -> LoopReport:
        limits = bound(instructions, clock_ghz=clock_ghz, num_sms=num_sms) if known else None
        return _loop_report(instructions, limits)

    result = {}
    for function in parse(disassemble(on_disk(binary))):
        if function.instructions:
            about = tuple(note for note in found if note.function in ("", function.name))
            result[function.name] = _kernel_report(
                function, binary.arch, binary.resources.get(function.name), about, loop_report
            )
    return result


def _kernel_report(
    function: Function,
    arch: str,
    resources: Resources | None,
    about: tuple[Note, ...],
    loop_report: Callable[[list[Instruction]], LoopReport],
) -> KernelReport:
    code = function.instructions
    work, measure = _work(code)
    iterations = _iterations(function, measure)
    looped = bool(iterations)
    if not looped:
        blocks = graph.blocks_of(function)
        iterations = [graph.straight(blocks, graph.loops_of(blocks), _weigh(measure))]
    return KernelReport(
        entry=function.name,
        arch=arch,
        resources=resources,
        notes=about,
        instructions=sum(item.base != "NOP" for item in code),
        bulk=dict(Counter(item.opcode for item in code if item.base in kinds.BULK)),
        setmaxnreg=_setmaxnreg(code),
        local_accesses=sum(kinds.kind(item) == "local" for item in code),
        work=work,
        loops=tuple(map(loop_report, iterations)),
        looped=looped,
    )


def _work(code: Iterable[Instruction]) -> tuple[str, Callable[[Iterable[Instruction]], float]]:
    """What the loops of a kernel are for, and how much of it some instructions do."""
    code = tuple(code)
    measures: tuple[Callable[[Iterable[Instruction]], float], ...] = (
        kinds.matrix_fma,
        kinds.vector_fma,
        kinds.global_bytes,
        lambda items: float(sum(1 for _ in items)),
    )
    return next((name, measure) for name, measure in zip(WORK, measures, strict=True) if measure(code))


def _weigh(measure: Callable[[Iterable[Instruction]], float]) -> Callable[[Iterable[Instruction]], graph.Weight]:
    def weigh(instructions: Iterable[Instruction]) -> graph.Weight:
        instructions = tuple(instructions)
        return measure(instructions), -float(len(instructions))

    return weigh


def _iterations(function: Function, measure: Callable[[Iterable[Instruction]], float]) -> list[list[Instruction]]:
    """An iteration of each innermost loop that does the work: the most work first, and of equals the shortest.

    Loops around them begin and end a tile: their products are the first and the last of the loop inside.
    """
    blocks = graph.blocks_of(function)
    loops = graph.loops_of(blocks)

    def works(loop: graph.Loop) -> bool:
        return any(measure(blocks[block].instructions) for block in loop.blocks)

    innermost = [loop for loop in loops if works(loop) and not any(works(other) for other in loop.inner)]
    found = [graph.iteration(blocks, loop, _weigh(measure)) for loop in innermost]
    return sorted(found, key=lambda instructions: (-measure(instructions), len(instructions)))


def _loop_report(instructions: list[Instruction], limits: Bound | None) -> LoopReport:
    return LoopReport(
        first=min(item.address for item in instructions),
        last=max(item.address for item in instructions),
        instructions=len(instructions),
        counts=kinds.count(instructions),
        matrix=dict(Counter(item.opcode for item in instructions if kinds.shape(item) is not None)),
        matrix_groups=sum("gsb0" in item.operands for item in instructions if item.base in kinds.WGMMA),
        matrix_waits=sum(item.base == "WARPGROUP" and item.has("DEPBAR") for item in instructions),
        global_bytes=kinds.global_bytes(instructions),
        bound=limits,
    )


def _setmaxnreg(code: Iterable[Instruction]) -> dict[str, tuple[int, ...]]:
    found: dict[str, list[int]] = {"increase": [], "decrease": []}
    for item in code:
        if item.base == "USETMAXREG":
            registers = int(item.operands.split(",")[-1], 0)
            found["decrease" if item.has("DEALLOC") else "increase"].append(registers)
    return {way: tuple(registers) for way, registers in found.items()}

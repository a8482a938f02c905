"""How fast a loop could be at best on an H200: its instructions against the rates of the units that execute them.

The rates are those of public documents, not measured here: multiprocessors, clock and matrix rates of the data sheet
and the architecture white paper (H100 and H200 have the same multiprocessor); the others of the table "Throughput of
Native Arithmetic Instructions" of the CUDA guides, compute capability 9.0; which unit executes what as the Nsight
Compute documentation has it; `MMA_SYNC_FRACTION` of published microbenchmarks. docs/inspection.md says what the model
leaves out.

A multiprocessor is four partitions with a warp scheduler and units of their own. A warp stays on one of them, and the
four warps of a warpgroup are on all four. So a loop is counted for one warp on one partition; how many warps take turns
does not matter to a bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from cuattn.compile.sass import kinds
from cuattn.compile.sass.code import Instruction

PARTITIONS = 4
#: At which the data sheet's 989 TFLOP/s in 16 bit hold: 132 × 2048 × 2 × 1.83e9.
CLOCK_GHZ = 1.83
NUM_SMS = 132

#: Multiply-adds that a multiprocessor does in a cycle, dense, by type of the operands.
MATRIX_RATES: Mapping[str, int] = MappingProxyType({"16 bit": 2048, "tf32": 1024, "8 bit": 4096, "fp64": 128})
#: The part of these rates that mma.sync reaches on Hopper, at most, whatever surrounds it.
MMA_SYNC_FRACTION = 0.63
#: Results that a multiprocessor produces in a cycle, by unit.
UNIT_RATES: Mapping[str, int] = MappingProxyType(
    {"special": 16, "fp32": 128, "fp64": 64, "imad": 64, "alu": 64, "shuffle": 32}
)
SHARED_BYTES_PER_CYCLE = 128

#: Kind of instruction to the unit that executes it. Every kind takes a slot of the scheduler as well.
UNIT_OF: Mapping[str, str] = MappingProxyType(
    {
        "exp2": "special",
        "special": "special",
        "convert": "special",
        **dict.fromkeys(("ffma", "fmul", "fadd", "half"), "fp32"),
        "double": "fp64",
        "imad": "imad",
        **dict.fromkeys(("integer", "fmnmx", "fcompare", "pack"), "alu"),
        **dict.fromkeys(("shuffle", "vote"), "shuffle"),
    }
)


@dataclass(frozen=True, slots=True)
class Bound:
    """The least time of one iteration, and the speed that follows.

    Attributes
    ----------
    cycles : dict
        Unit to the cycles that it is busy for one warp and iteration: ``matrix``, ``special``, ``fp32``, ``alu``, ...,
        ``shared`` memory, and ``issue``, the scheduler.
    flop : float
        Floating-point operations of one warp and iteration: of the matrix products, a multiply-add being two; without
        matrix products, of the multiply-adds in FP32 and FP64.
    limit : str
        The unit with the most cycles.
    tflop_per_s : float or None
        With everything overlapped: only `limit` counts. None where `flop` is 0.
    tflop_per_s_alone : float or None
        Without overlap: matrix products and everything else take turns on the whole multiprocessor. None where there
        are no matrix products.
    tb_per_s : float or None
        What the loop's own loads and stores could ask global memory for, if memory were no limit: a loop for which this
        is less than the memory's bandwidth does not keep it busy. None where there are none.
    """

    cycles: dict[str, float]
    flop: float
    limit: str
    tflop_per_s: float | None
    tflop_per_s_alone: float | None
    tb_per_s: float | None


def bound(instructions: Sequence[Instruction], *, clock_ghz: float = CLOCK_GHZ, num_sms: int = NUM_SMS) -> Bound:
    """The bound of a loop with these instructions an iteration, for so many multiprocessors and that clock."""
    cycles = unit_cycles(instructions)
    limit = max(cycles, key=cycles.__getitem__)
    per_second = PARTITIONS * num_sms * clock_ghz * 1e-3  # from what a warp does in a cycle, to tera
    matrix_flop = 2 * kinds.matrix_fma(instructions)
    flop = matrix_flop or 2 * kinds.vector_fma(instructions)
    moved = kinds.global_bytes(instructions)
    return Bound(
        cycles,
        flop,
        limit,
        tflop_per_s=flop / cycles[limit] * per_second if flop else None,
        tflop_per_s_alone=flop / _cycles_alone(instructions, cycles) * per_second if matrix_flop else None,
        tb_per_s=moved / cycles[limit] * per_second if moved else None,
    )


def _cycles_alone(instructions: Sequence[Instruction], cycles: Mapping[str, float]) -> float:
    """Return the cycles of the matrix products, with what they read from shared memory, and those of all the rest."""
    operands = kinds.wgmma_shared_bytes(instructions) * PARTITIONS / SHARED_BYTES_PER_CYCLE
    rest = {name: value for name, value in cycles.items() if name != "matrix"}
    rest["shared"] = cycles.get("shared", 0.0) - operands
    return max(cycles["matrix"], operands) + max(rest.values())


def unit_cycles(instructions: Sequence[Instruction]) -> dict[str, float]:
    """Return the cycles of each unit for one warp; units that are not used are left out."""
    cycles = dict.fromkeys(("matrix", *UNIT_RATES, "shared"), 0.0)
    for instruction in instructions:
        shape = kinds.shape(instruction)
        if shape is not None:
            cycles["matrix"] += shape.fma_per_warp * PARTITIONS / matrix_rate(instruction)
    for name, number in kinds.count(instructions).items():
        if unit := UNIT_OF.get(name):
            cycles[unit] += number * kinds.WARP_SIZE * PARTITIONS / UNIT_RATES[unit]
    moved = kinds.shared_bytes(instructions) + kinds.wgmma_shared_bytes(instructions)
    cycles["shared"] = moved * PARTITIONS / SHARED_BYTES_PER_CYCLE
    cycles["issue"] = float(len(instructions))
    return {name: value for name, value in cycles.items() if value}


def matrix_rate(instruction: Instruction) -> float:
    """Multiply-adds that a multiprocessor does in a cycle with this instruction."""
    if instruction.base == "DMMA":
        kind = "fp64"
    elif instruction.has("TF32"):
        kind = "tf32"
    elif instruction.base in ("HGMMA", "HMMA"):
        kind = "16 bit"
    else:
        kind = "8 bit"
    return MATRIX_RATES[kind] * (1.0 if instruction.base in kinds.WGMMA else MMA_SYNC_FRACTION)

"""What an instruction is for, and the work it does: by its opcode."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from cuattn.compile.sass.code import Instruction

WARP_SIZE = 32
WARPS_PER_WARPGROUP = 4

#: Matrix products of a warpgroup (wgmma) and of a warp (mma.sync).
WGMMA = frozenset({"HGMMA", "QGMMA", "IGMMA", "BGMMA"})
MMA = frozenset({"HMMA", "QMMA", "OMMA", "IMMA", "BMMA", "DMMA"})
#: Copies and reductions of whole tiles by the copy engine: cp.async.bulk and its kin.
BULK = frozenset({"UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED"})

#: Kind to the opcodes it stands for, in the order of tables. MUFU.EX2 is taken out of "special" in `kind`.
KINDS: dict[str, frozenset[str]] = {
    "wgmma": WGMMA,
    "mma": MMA,
    "exp2": frozenset(),
    "special": frozenset({"MUFU"}),
    "ffma": frozenset({"FFMA", "FFMA2", "FFMA32I"}),
    "fmul": frozenset({"FMUL", "FMUL2", "FMUL32I"}),
    "fadd": frozenset({"FADD", "FADD2", "FADD32I"}),
    "fmnmx": frozenset({"FMNMX", "FMNMX3"}),
    "fcompare": frozenset({"FSETP", "FSET", "FSEL", "FCHK", "FSWZADD"}),
    "half": frozenset({"HFMA2", "HADD2", "HMUL2", "HSETP2", "HSET2", "HMNMX2", "VHMNMX", "HADD2_32I", "HFMA2_32I"}),
    "double": frozenset({"DFMA", "DADD", "DMUL", "DSETP", "DMNMX"}),
    "pack": frozenset({"F2FP", "I2FP", "F2IP", "I2IP"}),
    "convert": frozenset({"F2F", "F2I", "I2F", "I2I", "FRND"}),
    "imad": frozenset({"IMAD", "IMUL", "IDP", "IDP4A", "IMAD32I"}),
    "integer": frozenset(
        {
            *("IADD", "IADD3", "IADD32I", "VIADD", "VIADDMNMX", "IMNMX", "VIMNMX", "VIMNMX3", "IABS", "LEA", "LOP3"),
            *("LOP32I", "SHF", "SHL", "SHR", "SGXT", "BMSK", "PRMT", "SEL", "ISETP", "ISET", "ICMP", "PLOP3", "P2R"),
            *("R2P", "MOV", "MOV32I", "CS2R", "VABSDIFF", "VABSDIFF4", "PSETP", "PSET", "BREV", "FLO", "POPC", "LOP"),
        }
    ),
    "shuffle": frozenset({"SHFL"}),
    "vote": frozenset({"VOTE", "VOTEU", "MATCH", "REDUX", "CREDUX", "ELECT"}),
    "ldmatrix": frozenset({"LDSM"}),
    "stmatrix": frozenset({"STSM"}),
    "load_shared": frozenset({"LDS", "ATOMS"}),
    "store_shared": frozenset({"STS"}),
    "load_global": frozenset({"LDG", "LD"}),
    "store_global": frozenset({"STG", "ST", "RED", "REDG", "ATOM", "ATOMG"}),
    "copy_async": frozenset({"LDGSTS"}),
    "local": frozenset({"LDL", "STL"}),
    "bulk": BULK,
    "barrier": frozenset(
        {
            *("BAR", "SYNCS", "WARPSYNC", "WARPGROUP", "WARPGROUPSET", "DEPBAR", "LDGDEPBAR", "ARRIVES", "MEMBAR"),
            *("FENCE", "ERRBAR", "CCTL", "CCTLL", "NANOSLEEP", "UCGABAR_ARV", "UCGABAR_WAIT", "UTMACMDFLUSH", "UTMAPF"),
            *("UTMACCTL", "UBLKPF", "ACQBULK", "PREEXIT", "USETMAXREG", "CGAERRBAR", "B2R", "R2B", "ENDCOLLECTIVE"),
        }
    ),
    "control": frozenset(
        {
            *("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU", "CALL", "RET", "EXIT", "BSSY", "BSYNC", "BREAK", "BMOV"),
            *("YIELD", "KILL", "NOP", "RPCMOV", "BPT", "LEPC"),
        }
    ),
    "constant": frozenset({"LDC", "LDCU", "S2R", "R2UR", "S2UR", "PMTRIG"}),
    "uniform": frozenset(),
    "other": frozenset(),
}
_KIND_OF = {opcode: name for name, opcodes in KINDS.items() for opcode in opcodes}

_WGMMA_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")
_MMA_SHAPE = re.compile(r"\.(8|16)8(\d+)\b")
_WGMMA_OPERAND_BYTES = 32  # of a row of either matrix in one instruction, whatever the type


@dataclass(frozen=True, slots=True)
class Shape:
    """Extents of one matrix product, ``m`` by ``k`` times ``k`` by ``n``, and who does it: a warp or four."""

    m: int
    n: int
    k: int
    warps: int

    @property
    def fma_per_warp(self) -> float:
        return self.m * self.n * self.k / self.warps


def kind(instruction: Instruction) -> str:
    """Return what an instruction is for: a key of `KINDS`."""
    return _kind(instruction.opcode)


@cache
def _kind(opcode: str) -> str:
    base, _, modifiers = opcode.partition(".")
    if base == "MUFU" and modifiers.startswith("EX2"):
        return "exp2"
    if base in _KIND_OF:
        return _KIND_OF[base]
    return "uniform" if base.startswith("U") else "other"


def count(instructions: Iterable[Instruction]) -> dict[str, int]:
    """Count instructions of each kind, in the order of `KINDS`, without zeros."""
    found = Counter(map(kind, instructions))
    return {name: found[name] for name in KINDS if found[name]}


def shape(instruction: Instruction) -> Shape | None:
    """Return the shape of a matrix product; None for anything else."""
    return _shape(instruction.opcode)


@cache
def _shape(opcode: str) -> Shape | None:
    base = opcode.partition(".")[0]
    if base in WGMMA and (match := _WGMMA_SHAPE.search(opcode)):
        return Shape(int(match[1]), int(match[2]), int(match[3]), WARPS_PER_WARPGROUP)
    if base in MMA and (match := _MMA_SHAPE.search(opcode)):
        return Shape(int(match[1]), 8, int(match[2]), 1)
    return None


def matrix_fma(instructions: Iterable[Instruction]) -> float:
    """Multiply-adds of the matrix products, the share of one warp."""
    return sum(found.fma_per_warp for found in map(shape, instructions) if found is not None)


def vector_fma(instructions: Iterable[Instruction]) -> float:
    """Multiply-adds of a warp in FP32 and FP64."""
    return float(sum(WARP_SIZE for item in instructions if item.base in ("FFMA", "DFMA", "FFMA32I", "FFMA2")))


def wgmma_shared_bytes(instructions: Iterable[Instruction]) -> float:
    """Bytes that wgmma reads from shared memory for its operands, the share of one warp.

    The right one always, the left one where the instruction does not name a register for it.
    """
    total = 0.0
    for instruction in instructions:
        found = shape(instruction)
        if found is not None and found.warps > 1:
            left = instruction.operands.split(",")[1]
            rows = found.n + (found.m if "gdesc" in left else 0)
            total += rows * _WGMMA_OPERAND_BYTES / found.warps
    return total


def shared_bytes(instructions: Iterable[Instruction]) -> float:
    """Bytes that a warp itself moves to and from shared memory, without bank conflicts; loads of one address for all
    lanes (a broadcast, which the opcode does not tell) take no less than one bank row.
    """
    total = 0.0
    for instruction in instructions:
        found = kind(instruction)
        if found in ("ldmatrix", "stmatrix"):
            total += 128 * (4 if instruction.opcode.endswith(".4") else 2 if instruction.opcode.endswith(".2") else 1)
        elif found == "load_shared":
            total += 128
        elif found == "store_shared" or found == "copy_async":
            total += WARP_SIZE * access_bytes(instruction)
    return total


def global_bytes(instructions: Iterable[Instruction]) -> float:
    """Bytes that a warp asks global memory for, or writes there, with all lanes active; bulk copies are not in it."""
    moved = ("load_global", "store_global", "copy_async")
    return float(sum(WARP_SIZE * access_bytes(item) for item in instructions if kind(item) in moved))


def access_bytes(instruction: Instruction) -> int:
    """Bytes of one lane of a load or store."""
    for modifier in instruction.opcode.split(".")[1:]:
        if modifier in _WIDTHS:
            return _WIDTHS[modifier]
    return 4


_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "32": 4, "64": 8, "128": 16, "256": 32}

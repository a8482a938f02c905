"""A parsed kernel → the table that the C interpreter runs.

The table holds no addresses: constants that are addresses of module variables are patched at load. So it can be
kept in the cache beside the PTX.
"""

from __future__ import annotations

import importlib
import itertools
from array import array
from dataclasses import dataclass, field

import numpy as np

from ..errors import UnsupportedPTXError
from . import lowering  # noqa: F401  (the rules register themselves)
from .lowering.context import LOCAL_BASE, SHARED_BASE, Context
from .lowering.rules import RULES
from .lowering.targets import arch_specific_targets, oldest_target
from .ptx_module import Entry, Module, Parameter, Variable
from .ptx_types import Address, Const, Imm, Instruction, Label, Operand, Reg, Row, Special, Symbol, Vector
from .registers import LoweredRow, allocate

MAX_OPERANDS = 20  # executor.h
ROW_INTS = 6 + MAX_OPERANDS
NUM_SPECIALS = 48
MAX_THREADS = 1024  # of a CTA
SPECIALS = {
    name: number
    for number, name in enumerate(
        (
            "%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z",
            "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid", "%lanemask_eq",
            "%lanemask_le", "%lanemask_lt", "%lanemask_ge", "%lanemask_gt", "%clock", "%dynamic_smem_size",
            "%total_smem_size", "%cluster_ctaid.x", "%cluster_ctaid.y", "%cluster_ctaid.z", "%cluster_nctaid.x",
            "%cluster_nctaid.y", "%cluster_nctaid.z", "%clusterid.x", "%clusterid.y", "%clusterid.z", "%nclusterid.x",
            "%nclusterid.y", "%nclusterid.z", "%cluster_ctarank", "%cluster_nctarank", "%is_explicit_cluster",
        )
    )
}  # fmt: skip


@dataclass(slots=True)
class Table:
    """One kernel, ready to run. ``rows`` is int32 [rows, ROW_INTS], the layout of ``Row`` in executor.h."""

    name: str
    rows: np.ndarray
    side: np.ndarray  # int32: register slots of the rows that have too many for their own operands
    slots_init: np.ndarray  # uint8: constants, then zeros for the special registers
    reg_bytes: int
    specials: np.ndarray  # int32 [NUM_SPECIALS]: slot of each special register, -1 unused
    relocations: list[tuple[int, str]]  # (offset in slots_init, module variable)
    op_names: list[str]  # handler of each row
    locations: list[str]  # source line of each row, with where it was inlined
    texts: list[str]  # the PTX instruction of each row
    params: list[Parameter]
    param_bytes: int
    static_smem_bytes: int
    dynamic_smem_gap: int  # bytes between the static variables and the dynamic array
    param_place: int  # where the block of parameters begins, modulo PARAM_LINE
    local_bytes: int
    smem_granule_log2: int
    max_threads: int
    cluster: tuple[int, int, int] | None  # extents that the kernel was compiled for, in CTAs
    entry_registers: int  # registers a thread starts with; 0 where the launch bounds do not tell
    module_variables: list[Variable] = field(default_factory=list)


def build_table(module: Module, entry: Entry) -> Table:
    """Lower, allocate and encode one kernel. Raises `UnsupportedPTXError` for an instruction without a rule."""
    static_smem, dynamic_gap, shared = _place_shared(module, entry)
    local, local_bytes = _place_local(entry)
    variables = [v for v in module.variables if v.space in ("global", "const")]
    params = {p.name: p.offset for p in entry.params}
    max_threads = 1
    for extent in entry.directives.get("maxntid", ()) or entry.directives.get("reqntid", ()) or (1024,):
        max_threads = min(max_threads * extent, MAX_THREADS)
    entry_registers = _entry_registers(entry, max_threads)
    module_names = {v.name: v.space for v in variables}
    context = Context(params, shared, local, module_names, entry_registers, entry.param_bytes)
    entry.find_pointers()
    rows, labels = _lower(module, entry, context)
    encoder = _Encoder()
    encoder.collect(rows)
    slots, top = allocate(rows, labels, encoder.top)
    table, reg_bytes = encoder.encode(rows, labels, slots, top)
    return Table(
        name=entry.name,
        rows=table,
        side=np.array(encoder.side, np.int32),
        slots_init=encoder.initial(),
        reg_bytes=reg_bytes,
        specials=encoder.specials,
        relocations=encoder.relocations,
        op_names=[r.row.op for r in rows],
        locations=_Locations(module).of(rows),
        texts=[r.text for r in rows],
        params=entry.params,
        param_bytes=entry.param_bytes,
        static_smem_bytes=static_smem,
        dynamic_smem_gap=dynamic_gap,
        param_place=_place_params(entry),
        local_bytes=local_bytes,
        smem_granule_log2=_shared_granule(rows),
        max_threads=max_threads,
        cluster=_cluster(entry),
        entry_registers=entry_registers,
        module_variables=variables,
    )


def _cluster(entry: Entry) -> tuple[int, int, int] | None:
    extents = entry.directives.get("reqnctapercluster")
    return (*extents, 1, 1)[:3] if extents else None  # type: ignore[return-value]


REGISTER_FILE, REGISTER_STEP, MAX_REGISTERS = 65536, 8, 255


def _entry_registers(entry: Entry, max_threads: int) -> int:
    """Return the registers a thread starts with when setmaxnreg is used: what launch bounds leave, in steps of 8."""
    ceiling = entry.directives.get("maxnreg", (MAX_REGISTERS,))[0]
    if "maxntid" in entry.directives or "reqntid" in entry.directives:
        ctas = entry.directives.get("minnctapersm", (1,))[0]
        share = REGISTER_FILE // (max(1, ctas) * max_threads)
        return min(ceiling, share) // REGISTER_STEP * REGISTER_STEP
    return ceiling // REGISTER_STEP * REGISTER_STEP if "maxnreg" in entry.directives else 0


class _Locations:
    """Descriptions of source locations, each made once."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.known: dict[int, str] = {}

    def of(self, rows: list[LoweredRow]) -> list[str]:
        for row in rows:
            if row.location not in self.known:
                self.known[row.location] = self.module.describe(row.location)
        return [self.known[row.location] for row in rows]


def _place_shared(module: Module, entry: Entry) -> tuple[int, int, dict[str, int]]:
    """Place shared memory: the static variables that the kernel names, then the dynamic array.

    The dynamic array is aligned as it is declared and no better: whatever lies before it on a GPU is not the kernel's.
    """
    named = {x.name for ins in entry.body for x in _symbols(ins)}
    places: dict[str, int] = {}
    top = 0
    align = 16
    dynamic = []
    for variable in [*module.variables, *entry.variables]:
        if variable.space != "shared" or (variable not in entry.variables and variable.name not in named):
            continue
        if variable.extern:
            dynamic.append(variable.name)
            align = max(align, variable.align)
            continue
        top = -(-top // variable.align) * variable.align
        places[variable.name] = SHARED_BASE + top
        top += variable.size
    static = -(-top // align) * align if dynamic else top
    gap = align if dynamic and (SHARED_BASE + static) % (2 * align) == 0 else 0
    for name in dynamic:
        places[name] = SHARED_BASE + static + gap
    return static, gap, places


PARAM_LINE = 128  # bytes: more than any parameter is aligned to


def _place_params(entry: Entry) -> int:
    """Find a place at which parameters are aligned as they are declared and, as far as that can be, no better."""
    align = max([8, *(p.align for p in entry.params)])

    def over_aligned(place: int) -> int:
        return sum((place + p.offset) % (2 * p.align) == 0 for p in entry.params if p.size > 8)

    return min(range(align % PARAM_LINE, PARAM_LINE, 2 * align), key=over_aligned, default=0)


def _symbols(ins: Instruction) -> list[Symbol]:
    found: list[Symbol] = []
    stack: list[Operand] = [x for x in ins.operands if type(x) is not Reg and type(x) is not Imm]
    while stack:
        operand = stack.pop()
        if isinstance(operand, Symbol):
            found.append(operand)
        elif isinstance(operand, Address):
            stack.append(operand.base)
        elif isinstance(operand, Vector):
            stack.extend(operand.items)
    return found


def _place_local(entry: Entry) -> tuple[dict[str, int], int]:
    places: dict[str, int] = {}
    top = 0
    for variable in entry.variables:
        if variable.space == "local":
            top = -(-top // variable.align) * variable.align
            places[variable.name] = LOCAL_BASE + top
            top += variable.size
    return places, -(-top // 16) * 16


def _lower(module: Module, entry: Entry, context: Context) -> tuple[list[LoweredRow], dict[str, int]]:
    rows: list[LoweredRow] = []
    starts: list[int] = []
    for ins in entry.body:
        starts.append(len(rows))
        lowered = _apply_rules(ins, context, module, entry)
        for row in lowered:
            rows.append(LoweredRow(row, ins.guard, ins.guard_negated, ins.location, ins.text))
    starts.append(len(rows))
    ends = len(entry.body) in entry.labels.values()  # a label behind the last instruction
    if not rows or rows[-1].row.op != "exit" or rows[-1].guard or ends:
        rows.append(LoweredRow(Row("exit"), None, False, -1, "end of the kernel"))
    return rows, {label: starts[index] for label, index in entry.labels.items()}


def _check_target(ins: Instruction, target: str) -> None:
    """Refuse what the target has not got, as ptxas would: NVRTC passes inline assembly on unseen."""
    oldest = oldest_target(ins.parts)
    if int(target[3:].rstrip("af")) < oldest:
        raise UnsupportedPTXError(f"{ins.text!r} needs sm_{oldest} or newer; the module is compiled for {target}")
    only = arch_specific_targets(ins.parts)
    if only and target not in only:
        raise UnsupportedPTXError(f"{ins.text!r} needs {' or '.join(only)}; the module is compiled for {target}")


def _apply_rules(ins: Instruction, context: Context, module: Module, entry: Entry) -> list[Row]:
    _check_target(ins, module.target)
    reason = ""
    for rule in RULES.get(ins.parts[0], ()):
        try:
            result = rule(ins, context)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError) as error:
            reason = f" ({error})"
            continue
        if result is not None:
            return result if isinstance(result, list) else [result]
    where = module.describe(ins.location)
    raise UnsupportedPTXError(
        f"kernel {entry.name}: the host executor does not know the instruction {ins.text!r}{reason} "
        f"(PTX line {ins.line}, {where})"
    )


def _shared_granule(rows: list[LoweredRow]) -> int:
    """Return log2 of the smallest shared access: the granule at which races in shared memory are seen."""
    granule = 2
    for lowered in rows:
        if lowered.row.op in ("ld", "st", "atom") and lowered.row.flags & 7 in (0, 2):
            granule = min(granule, lowered.row.flags >> 4 & 3)
    return granule


class _Encoder:
    """Gives constants and special registers their slots, and writes rows as integers."""

    def __init__(self) -> None:
        self.constants: dict[Const, int] = {}
        self.special_slots: dict[str, int] = {}
        self.specials = np.full(NUM_SPECIALS, -1, np.int32)
        self.relocations: list[tuple[int, str]] = []
        self.side: list[int] = []
        self.top = 0

    def collect(self, rows: list[LoweredRow]) -> None:
        for lowered in rows:
            for x in lowered.row.srcs:
                if type(x) is Const and x not in self.constants:
                    self.constants[x] = self.top
                    if x.symbol:
                        self.relocations.append((self.top, x.symbol))
                    self.top += 256 if x.wide else 128
                elif type(x) is Special and x.name not in self.special_slots:
                    if x.name not in SPECIALS:
                        raise UnsupportedPTXError(f"special register {x.name} ({lowered.text!r})")
                    self.special_slots[x.name] = self.top
                    self.specials[SPECIALS[x.name]] = self.top
                    self.top += 128

    def initial(self) -> np.ndarray:
        init = np.zeros(self.top, np.uint8)
        for constant, offset in self.constants.items():
            if constant.wide:
                init[offset : offset + 256].view(np.uint64)[:] = constant.bits & (1 << 64) - 1
            else:
                init[offset : offset + 128].view(np.uint32)[:] = constant.bits & (1 << 32) - 1
        return init

    def encode(
        self, rows: list[LoweredRow], labels: dict[str, int], slots: dict[Reg, int], top: int
    ) -> tuple[np.ndarray, int]:
        op_index = _op_index()
        sink = top  # results that nobody wants
        encoded: list[list[int]] = []
        own = {reg for lowered in rows for reg in lowered.row.side}
        for lowered in rows:
            row = lowered.row
            operands: list[int] = []
            for dst in row.dsts:
                operands.append(sink if dst is None else slots[dst])
            for x in row.srcs:
                if isinstance(x, Reg):
                    operands.append(slots[x])
                elif isinstance(x, Const):
                    operands.append(self.constants[x])
                elif isinstance(x, Special):
                    operands.append(self.special_slots[x.name])
                elif isinstance(x, Label):
                    operands.append(labels[x.name])
                else:
                    operands.append(x)
            operands += row.numbers
            if row.side:
                operands += (len(self.side), len(row.side))
                self.side += [slots[reg] for reg in row.side]
            if len(operands) > MAX_OPERANDS or row.op not in op_index:
                raise UnsupportedPTXError(f"no handler {row.op!r} for {lowered.text!r}")
            guard = -1 if lowered.guard is None else slots[lowered.guard]
            encoded.append(
                [op_index[row.op], guard, int(lowered.guard_negated), row.flags, *_side_bits(row, own), *operands]
                + [0] * (MAX_OPERANDS - len(operands))
            )
        return _int32(encoded, rows).reshape(-1, ROW_INTS), top + 256


def _int32(encoded: list[list[int]], rows: list[LoweredRow]) -> np.ndarray:
    try:
        return np.frombuffer(array("i", itertools.chain.from_iterable(encoded)), np.int32)
    except OverflowError as error:
        bad = next(i for i, row in enumerate(encoded) if not all(-(1 << 31) <= x < 1 << 31 for x in row))
        raise UnsupportedPTXError(f"a number in {rows[bad].text!r} does not fit 32 bits") from error


def _side_bits(row: Row, own: set[Reg]) -> tuple[int, int]:
    """Compute ``Row.reads`` and ``Row.writes``: which operands are registers that some row has in its ``side``."""
    if not own:
        return 0, 0
    writes = sum(1 << k for k, x in enumerate(row.dsts) if x in own)
    reads = sum(1 << k for k, x in enumerate(row.srcs, len(row.dsts)) if x in own)
    return reads, writes


def _op_index() -> dict[str, int]:
    library = importlib.import_module(".library", __package__)
    return library.op_index()

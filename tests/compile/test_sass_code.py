"""Machine code: parsing, loops, kinds, bounds, ptxas's remarks, on listings and kernels that are counted by hand."""

from __future__ import annotations

import pytest

from cuattn.compile.sass import graph, kinds
from cuattn.compile.sass.bound import bound, matrix_rate
from cuattn.compile.sass.code import Function, Instruction, parse


def listing(*lines: str, name: str = "k") -> str:
    """What nvdisasm would print: lines that end in a colon are labels."""
    text, address = [f".text.{name}:"], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{address:04x}*/  {line} ;")
            address += 16
    return "\n".join(text)


def function(*lines: str) -> Function:
    (found,) = parse(listing(*lines))
    return found


def weigh(instructions) -> graph.Weight:
    instructions = tuple(instructions)
    return kinds.matrix_fma(instructions), -float(len(instructions))


def iterations(*lines: str) -> list[list[str]]:
    """Opcodes of an iteration of each loop, outer loops first."""
    blocks = graph.blocks_of(function(*lines))
    return [[item.opcode for item in graph.iteration(blocks, loop, weigh)] for loop in graph.loops_of(blocks)]


def instruction(text: str) -> Instruction:
    return function(text).instructions[0]


# --- parsing --------------------------------------------------------------------------------------------------------


def test_parsing():
    text = "\n".join(
        (
            '\t.headerflags\t@"EF_CUDA_SM90"',
            "//--------------------- .text.first --------------------------",
            '\t.section\t.text.first,"ax",@progbits',
            "        .global         first",
            "first:",
            ".text.first:",
            "        /*0000*/                   LDC R1, c[0x0][0x28] ;",
            ".L_x_0:",
            "        /*0010*/              @!UP0 UIADD3.X UR4, UR4, -0x1, URZ, UP1, !UPT ;",
            "        /*0020*/                   BRA `(.L_x_0);",
            ".L_x_1:",
            listing("EXIT", name="second"),
        )
    )
    first, second = parse(text)
    assert (first.name, second.name) == ("first", "second")
    assert [item.address for item in first.instructions] == [0, 16, 32]
    assert first.labels == {".L_x_0": 1, ".L_x_1": 3}
    add, jump = first.instructions[1:]
    assert (add.predicate, add.opcode, add.base, add.operands) == (
        *("!UP0", "UIADD3.X", "UIADD3"),
        "UR4, UR4, -0x1, URZ, UP1, !UPT",
    )
    assert add.has("X") and not add.has("X", "MOV")
    assert jump.targets == (".L_x_0",) and add.targets == ()
    assert [item.opcode for item in second.instructions] == ["EXIT"]
    assert parse("") == []


def test_labels_that_are_no_targets():
    assert instruction("BSSY.RECONVERGENT B0, `(.L_x_9)").targets == ()
    assert instruction("CALL.REL.NOINC `(.L_x_9)").targets == ()
    assert instruction('BRX R4 -0x60 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)').targets == (".L_x_1", ".L_x_2")


@pytest.mark.parametrize(
    ("last", "successors"),
    [
        ("BRA `(.L_2)", (2,)),
        ("@P0 BRA `(.L_2)", (2, 1)),
        ("@PT BRA `(.L_2)", (2,)),
        ("BRA P1, `(.L_2)", (2, 1)),
        ("BRA.U UP0, `(.L_2)", (2, 1)),
        ("BRA.DIV UR4, `(.L_2)", (2, 1)),
        ("EXIT", ()),
        ("@!P3 EXIT", (1,)),
        ("RET.REL.NODEC R14 `(k)", ()),
        ('BRX R4 -0x60 (*"BRANCH_TARGETS .L_2"*)', (2,)),
    ],
)
def test_what_follows_a_block(last, successors):
    blocks = graph.blocks_of(function("MOV R1, R2", last, "MOV R2, R3", ".L_2:", "EXIT"))
    assert blocks[0].successors == successors
    assert len(blocks[0].instructions) == 2


# --- loops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [(), ("IADD3 R5, R5, 0x1, RZ",)], ids=["at its head", "inside"])
def test_a_loop_with_a_wait(before):
    """The wait counts once, however often it asks; where it begins the loop, both are one loop with two jumps back."""
    outer, *inner = iterations(
        "MOV R0, RZ",
        ".L_loop:",
        *before,
        ".L_wait:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0",
        "@!P0 BRA `(.L_wait)",
        "HMMA.16816.F32 R4, R8, R12, R4",
        "@P2 EXIT",
        "FADD R1, R1, R2",
        "@P1 BRA `(.L_loop)",
        "EXIT",
    )
    wait = ["SYNCS.PHASECHK.TRANS64.TRYWAIT", "BRA"]
    assert outer == [*(["IADD3"] if before else []), *wait, "HMMA.16816.F32", "EXIT", "FADD", "BRA"]
    assert inner == ([wait] if before else [])


def test_of_two_branches_the_one_with_more_matrix_work_counts_and_of_equals_the_shorter():
    lines = (
        ".L_loop:",
        "@P0 BRA `(.L_masked)",
        "FADD R1, R1, R2",
        "BRA `(.L_join)",
        ".L_masked:",
        "FADD R1, R1, R2",
        "FADD R1, R1, R2",
        "FADD R1, R1, R2",
        "{}",
        ".L_join:",
        "@P1 BRA `(.L_loop)",
        "EXIT",
    )
    (short,) = iterations(*(line.format("FADD R1, R1, R2") for line in lines))
    assert short == ["BRA", "FADD", "BRA", "BRA"]
    (heavy,) = iterations(*(line.format("HMMA.16816.F32 R4, R8, R12, R4") for line in lines))
    assert heavy == ["BRA", "FADD", "FADD", "FADD", "HMMA.16816.F32", "BRA"]


def test_an_inner_loop_that_tests_at_its_head_counts_once():
    outer, inner = iterations(
        ".L_outer:",
        "MOV R1, RZ",
        ".L_inner:",
        "@P0 BRA `(.L_done)",
        "HMMA.16816.F32 R4, R8, R12, R4",
        "BRA `(.L_inner)",
        ".L_done:",
        "FADD R1, R1, R2",
        "@P1 BRA `(.L_outer)",
        "EXIT",
    )
    assert outer == ["MOV", "BRA", "HMMA.16816.F32", "BRA", "FADD", "BRA"]
    assert inner == ["BRA", "HMMA.16816.F32", "BRA"]


def test_cold_code_behind_the_end_belongs_to_the_loop_but_not_to_its_iteration():
    (found,) = iterations(
        ".L_loop:",
        "BRA.DIV UR4, `(.L_cold)",
        "SHFL.BFLY PT, R1, R2, 0x1, 0x1f",
        ".L_back:",
        "@P1 BRA `(.L_loop)",
        "EXIT",
        ".L_cold:",
        "FADD R1, R1, R2",
        "FADD R1, R1, R2",
        "BRA `(.L_back)",
    )
    assert found == ["BRA.DIV", "SHFL.BFLY", "BRA"]


def test_unreachable_and_irreducible_code_is_no_trap():
    blocks = graph.blocks_of(
        function(
            "@P0 BRA `(.L_b)",
            ".L_a:",
            "FADD R1, R1, R2",
            ".L_b:",
            "FMUL R1, R1, R2",
            "@P1 BRA `(.L_a)",
            "EXIT",
            ".L_never:",
            "BRA `(.L_never)",
        )
    )
    assert graph.loops_of(blocks) == []  # a loop that can be entered at two places has no header
    path = graph.straight(blocks, [], weigh)
    assert [item.opcode for item in path] == ["BRA", "FMUL", "BRA", "EXIT"]
    assert graph.straight([], [], weigh) == []


# --- kinds and bounds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("MUFU.EX2", "exp2"),
        ("MUFU.EX2.F16", "exp2"),
        ("MUFU.RCP", "special"),
        ("HGMMA.64x8x16.F16", "wgmma"),
        ("HMMA.16816.F32", "mma"),
        ("FMNMX", "fmnmx"),
        ("F2FP.BF16.F32.PACK_AB", "pack"),
        ("F2F.F64.F32", "convert"),
        ("UIADD3", "uniform"),
        ("UTMALDG.4D", "bulk"),
        ("USETMAXREG.DEALLOC.CTAPOOL", "barrier"),
        ("STL.64", "local"),
        ("QUUX", "other"),
    ],
)
def test_kinds(opcode, kind):
    assert kinds.kind(instruction(f"{opcode} R0, R1, R2")) == kind


@pytest.mark.parametrize(
    ("opcode", "fma_per_warp", "rate"),
    [
        ("HGMMA.64x176x16.F32.BF16", 64 * 176 * 16 / 4, 2048),
        ("HGMMA.64x96x8.F32.TF32", 64 * 96 * 8 / 4, 1024),
        ("QGMMA.64x256x32.F32.E4M3.E4M3", 64 * 256 * 32 / 4, 4096),
        ("IGMMA.64x8x32.S8.U8", 64 * 8 * 32 / 4, 4096),
        ("HMMA.16816.F32.BF16", 16 * 8 * 16, 2048 * 0.63),
        ("HMMA.1688.F32.TF32", 16 * 8 * 8, 1024 * 0.63),
        ("IMMA.16832.S8.S8", 16 * 8 * 32, 4096 * 0.63),
        ("DMMA.884", 8 * 8 * 4, 128 * 0.63),
    ],
)
def test_matrix_products(opcode, fma_per_warp, rate):
    product = instruction(f"{opcode} R24, R4, R8, R24")
    assert kinds.matrix_fma([product]) == fma_per_warp
    assert matrix_rate(product) == pytest.approx(rate)


def test_bytes():
    wide = [instruction("HGMMA.64x128x16.F32 R24, gdesc[UR4], R24"), instruction("FADD R1, R2, R3")]
    assert kinds.wgmma_shared_bytes(wide) == (64 + 128) * 32 / 4
    from_registers = [instruction("HGMMA.64x128x16.F32 R24, R4, gdesc[UR4].tnspB, R24, gsb0")]
    assert kinds.wgmma_shared_bytes(from_registers) == 128 * 32 / 4
    assert kinds.shared_bytes([instruction("LDSM.16.MT88.4 R4, [R0]")]) == 512
    assert kinds.shared_bytes([instruction("LDS.128 R4, [R0]")]) == 128  # it may be a broadcast
    assert kinds.shared_bytes([instruction("STS.64 [R0], R4")]) == 256
    for text, size in (("LDG.E.128.CONSTANT R4, [R0]", 16), ("STG.E.U16 [R0], R4", 2), ("LDG.E R4, [R0]", 4)):
        assert kinds.global_bytes([instruction(text)]) == 32 * size
    assert kinds.global_bytes([instruction("LDS R4, [R0]")]) == 0


def test_a_bound_worked_out_by_hand():
    """A tile of 64 queries and 128 keys at D = E = 128: 8 + 8 products of 64 cycles, 64 exponentials of 8."""
    code = [
        *[instruction("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24")] * 8,
        *[instruction("HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4].tnspB, R24")] * 8,
        *[instruction("MUFU.EX2 R0, R1")] * 64,
        *[instruction("FFMA R0, R1, R2, R3")] * 100,
        *[instruction("FMNMX R0, R1, R2, !PT")] * 70,
    ]
    found = bound(code)
    assert found.cycles == {
        "matrix": 16 * 64,
        "special": 64 * 8,
        "fp32": 100,
        "alu": 140,
        "shared": 8 * (192 * 32) / 128 + 8 * (128 * 32) / 128,
        "issue": 250,
    }
    assert found.flop == 2 * 2 * 64 * 128 * 128 / 4
    assert found.limit == "matrix"
    assert found.tflop_per_s == pytest.approx(989.4, abs=0.1)  # the data sheet's
    assert found.tflop_per_s_alone == pytest.approx(989.4 * 1024 / (1024 + 512), abs=0.1)
    assert found.tb_per_s is None
    half = bound(code, clock_ghz=1.83 / 2, num_sms=66)
    assert half.tflop_per_s == pytest.approx(found.tflop_per_s / 4)


def test_bounds_without_matrix_products():
    found = bound([instruction("FFMA R0, R1, R2, R3")] * 3 + [instruction("LDG.E.128 R4, [R0]")])
    assert (found.limit, found.flop, found.tflop_per_s_alone) == ("issue", 192, None)
    assert found.tflop_per_s == pytest.approx(192 / 4 * 4 * 132 * 1.83e-3)
    assert found.tb_per_s == pytest.approx(512 / 4 * 4 * 132 * 1.83e-3)
    assert bound([instruction("NOP")]).tflop_per_s is None

"""The machine code of the kernels, on sm_90a: what a row is fast by, as far as that can be seen without a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from resource_cases import sampled

from cuattn import compile
from cuattn.benchmark import inspected
from cuattn.compile import sass
from cuattn.compile.sass import KernelReport
from cuattn.errors import ArgumentError
from cuattn.ops.attention.forward.hopper_config import HOPPER_ALTERNATIVES, HOPPER_FWD_CONFIGS, HopperFwdConfig
from cuattn.ops.attention.forward.hopper_listed import HOPPER_LISTED_CONFIGS
from cuattn.ops.attention.variants import PLAIN
from cuattn.ops.registry import Variant

ARCH = "sm_90a"
ENOUGH_TFLOP_PER_S = 800  # of the 989 of the data sheet: at d128, in 16 bit
MEMORY_TB_PER_S = 4.8  # of the data sheet of an H200


@cache
def report(one: Variant) -> KernelReport:
    """Of a file with one kernel."""
    (found,) = sass.inspect(compile.build(one.kernel, one.constants, arch=ARCH, kind="cubin")).values()
    return found


def rows(*patterns: str) -> list[Variant]:
    return inspected.choose(patterns)


# --- the Hopper kernel ----------------------------------------------------------------------------------------------

HOPPER = rows("attention_forward_hopper")
DENSE_ROWS = (*HOPPER_FWD_CONFIGS, *HOPPER_ALTERNATIVES)
OPTIONS = {"BOUND_LEFT", "BOUND_RIGHT", "SOFTCAP", "ALIBI", "BIAS", "MASK", "DROPOUT", "CHUNK", "PACKED"}


def config_of(one: Variant) -> HopperFwdConfig:
    """The row of the table that these constants come from."""
    listed = one.constants["TILE_LIST"]
    for row in HOPPER_LISTED_CONFIGS if listed else DENSE_ROWS:
        options = replace(PLAIN, chunk=one.constants["CHUNK"])
        mine = row.constants("bfloat16", row.max_head_dim, row.max_head_dim_v, options, listed=listed)
        if all(one.constants[name] == mine[name] for name in mine if name.isupper() and name not in OPTIONS):
            return row
    raise AssertionError(one.name)


def is_tested(one: Variant) -> bool:
    """Of the rows that calls take: without options, and with everything; at d128 causal, with chunks, and 8 bit too.

    Rows over lists of tiles are looked at in test_hopper_listed_config.py.
    """
    if one.constants["TILE_LIST"] or config_of(one) not in HOPPER_FWD_CONFIGS:
        return False
    large = "_d128_e128_128x" in one.row
    everything = one.row.endswith("_packed") and (large or one.row.startswith("bfloat16"))
    return one.row.endswith("_plain") or everything or (large and one.row.endswith(("_causal", "_chunk")))


TAKEN = list(filter(is_tested, HOPPER))


LARGE = [(one,) for one in TAKEN if "_d128_" in one.row and "_chunk" not in one.row]
OTHERS = [(one,) for one in TAKEN if (one,) not in LARGE]


@pytest.mark.slow
@pytest.mark.parametrize("one", [*sampled(LARGE, one_in=3), *sampled(OTHERS, one_in=12)], ids=lambda one: one.row)
def test_a_hopper_row(one):
    found, row = report(one), config_of(one)
    # Nothing is spilled, and ptxas has kept what it was asked for: setmaxnreg, wgmma that overlap.
    assert found.notes == ()
    assert (found.resources.spill_stores, found.resources.spill_loads, found.resources.stack_bytes) == (0, 0, 0)
    assert found.local_accesses == 0
    assert found.resources.registers * row.num_threads <= 65536
    assert found.setmaxnreg == {"increase": (row.consumer_registers,), "decrease": (row.producer_registers,)}
    # Tiles come by bulk copies, products are of warpgroups, and a group of them runs while the softmax is computed.
    assert sum(number for opcode, number in found.bulk.items() if opcode.startswith("UTMALDG")) >= 3
    main = found.main
    assert (found.work, found.looped) == ("matrix products", True)
    assert "mma" not in main.counts
    assert main.matrix_groups == main.matrix_waits == 2 < main.counts["wgmma"]
    # One iteration is one tile: its products, one exponential a score, two more to rescale what was there before.
    d, e, n = (one.constants[name] for name in ("HEAD_DIM", "HEAD_DIM_V", "BLOCK_N"))
    bound = main.bound
    assert bound.flop == 2 * 16 * n * (d + e)
    step = 32 // row.itemsize
    assert main.counts["wgmma"] == -(-d // step) + n // step
    if one.constants["SOFTCAP"]:
        return
    assert main.counts["exp2"] == n // 2 + 2
    # The products limit it, but for d64, where exponentials take about as long, and for e4m3, whose products do not.
    assert bound.tflop_per_s >= ENOUGH_TFLOP_PER_S
    if d > 64 and row.itemsize == 2:
        assert bound.limit == "matrix"


def test_every_hopper_row_is_inspected():
    for listed, expected in ((False, DENSE_ROWS), (True, HOPPER_LISTED_CONFIGS)):
        assert {config_of(one) for one in HOPPER if one.constants["TILE_LIST"] == listed} == set(expected)


# --- portable kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", rows("attention_forward/float16*_plain"), ids=lambda one: one.row)
def test_portable_rows_multiply_on_tensor_cores(one):
    found = report(one)
    constants = one.constants
    assert (found.work, found.looped, found.local_accesses, found.notes) == ("matrix products", True, 0, ())
    main = found.main
    assert "wgmma" not in main.counts
    # The rows of a warp, times the keys of a tile, times both head dims.
    m, n = constants["BLOCK_M"] // constants["NUM_WARPS"], constants["BLOCK_N"]
    assert main.bound.flop == 2 * m * n * (constants["HEAD_DIM"] + constants["HEAD_DIM_V"])
    assert m * n // 32 <= main.counts["exp2"] <= m * n // 32 + m // 4
    assert main.bound.limit in ("matrix", "shared")


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("attention_forward_fma/float32_d64_64x64_w8_s1_plain", "multiply-adds"),
        ("attention_backward/dq_float16_d64_128x32_w4_s2_plain", "matrix products"),
        ("attention_decode/float16_float16_d128_16x64_w1x4_s2_plain", "matrix products"),
        ("copy_pages/default", "global memory"),
    ],
)
def test_what_loops_are_there_for(name, work):
    (one,) = rows(name)
    found = report(one)
    assert (found.work, found.looped) == (work, True)
    assert (found.main.bound.tflop_per_s is None) == (work == "global memory")


@pytest.mark.parametrize("name", ["copy_pages/default", "rope/default"])
def test_kernels_that_move_memory_can_ask_for_more_than_it_gives(name):
    (one,) = rows(name)
    assert report(one).main.bound.tb_per_s > 2 * MEMORY_TB_PER_S


# --- names ----------------------------------------------------------------------------------------------------------


def test_every_kernel_has_rows_whose_names_differ():
    names = [one.name for one in inspected.everything()]
    assert {one.kernel for one in inspected.everything()} == set(compile.kernel_names())
    assert len(set(names)) == len(names)


def test_choosing():
    assert {one.kernel for one in rows("rope", "softmax")} == {"rope", "softmax"}
    assert len(rows("rope", "rope/default", "rop*/def*")) == 1
    with pytest.raises(ArgumentError, match="no kernel is called 'ropes': kernels are append_kv, "):
        rows("ropes")
    with pytest.raises(ArgumentError, match="the rows of rope are default"):
        rows("rope/other")

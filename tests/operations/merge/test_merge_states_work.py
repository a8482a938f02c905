"""merge_states: how its kernel is launched, what it moves, and offsets beyond 32 bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from merge_parts import F16, F32, lses_of, outs_of

import cuattn
from cuattn import compile as kernel_compiler
from cuattn import host
from cuattn.ops.merge import launch as merge_launch
from cuattn.runtime.executor import executor_for
from cuattn.runtime.structs import struct_layout
from cuattn.testing.merging import assert_merge_close
from cuattn.testing.strategies import examples


@pytest.mark.parametrize("arch", ("sm_80", "sm_90a"))
def test_no_variant_spills(arch):
    for constants in merge_launch.variants():
        binary = kernel_compiler.build("merge_states", constants, arch=arch, kind="cubin")
        for used in binary.resources.values():
            assert used.spill_stores == used.spill_loads == used.stack_bytes == 0, (constants, used)


@examples(30)
@given(data=st.data())
def test_block_shapes_are_legal(data):
    """And no thread of a CTA is without columns, as long as a row has as many packs as lanes."""
    num_rows = data.draw(st.one_of(st.integers(1, 300), st.integers(1, 2**40)))
    num_parts, head_dim = data.draw(st.integers(0, 1000)), data.draw(st.integers(0, 2000))
    shape = merge_launch.block_shape(num_rows=num_rows, num_parts=num_parts, head_dim=head_dim, pack=8)
    assert 1 <= shape.lanes * shape.groups * shape.rows <= merge_launch.NUM_THREADS
    assert shape.rows <= min(64, num_rows)
    assert shape.groups <= max(1, num_parts)
    assert (shape.lanes - 1) * 8 < max(1, head_dim)


def test_many_parts_of_few_rows_have_several_groups(executor):
    """Which add up to the same as one, within rounding; each part is counted once."""
    assert merge_launch.block_shape(num_rows=6, num_parts=130, head_dim=64, pack=4).groups > 1
    rng = np.random.default_rng(2)
    lses = lses_of(rng, (130, 2, 3), F32, 2.0)
    outs = outs_of(rng, lses, 64, F32)
    assert_merge_close(cuattn.merge_states(executor.array(outs), executor.array(lses)), outs, lses)


@pytest.mark.parametrize("num_parts", (3, 20))
def test_same_bits_every_time(executor, num_parts):
    rng = np.random.default_rng(3)
    lses = lses_of(rng, (num_parts, 3, 7), F32, 2.0)
    arrays = executor.array(outs_of(rng, lses, 200, F32)), executor.array(lses)
    first = [executor.numpy(x) for x in cuattn.merge_states(*arrays)]
    for seed in range(2):
        with executor.active(asynchrony="random" if executor.name == "host" else "late", seed=seed):
            for x, y in zip(cuattn.merge_states(*arrays), first, strict=True):
                np.testing.assert_array_equal(executor.numpy(x), y)


def test_more_rows_than_the_grid(executor, monkeypatch):
    """CTAs take turns."""
    monkeypatch.setattr(merge_launch, "MAX_GRID_X", 2)
    rng = np.random.default_rng(4)
    lses = lses_of(rng, (2, 3, 70), F32, 2.0)
    outs = outs_of(rng, lses, 64, F32)
    assert_merge_close(cuattn.merge_states(executor.array(outs), executor.array(lses)), outs, lses)


def test_rows_beyond_32_bits():
    """Nothing has so many rows here: the function that places them is run by itself."""
    probe = """
    extern "C" __global__ void probe(const long long* g_rows, long long* g_positions, const MergeLayout layout) {
        const RowPosition position = row_position(g_rows[threadIdx.x], layout);
        g_positions[threadIdx.x * 3] = position.batch_idx;
        g_positions[threadIdx.x * 3 + 1] = position.head_idx;
        g_positions[threadIdx.x * 3 + 2] = position.seq_idx;
    }
    """
    text = kernel_compiler.source("merge_states", merge_launch.constants("float16", "float16", True)) + probe
    binary = kernel_compiler.build_source(text, name="/probe.cu", arch="sm_80", kind="ptx")
    kernel = host.RawModule(path=str(binary.path)).get_function("probe")
    for shape in ((2, 3, 100), (2, 3, 2**30), (2**20, 2**20, 2**20), (2, 2**31 - 1, 2**30), (2**40, 7, 11)):
        num_rows = math.prod(shape)
        rows = np.array([0, 1, shape[2] - 1, shape[2], 2**32 - 1, 2**32, num_rows // 3, num_rows - 1], np.int64)
        rows = rows[rows < num_rows]
        layout = np.zeros(1, struct_layout("merge_states", "MergeLayout").dtype)
        layout["num_rows"], layout["num_heads"], layout["seqlen"] = num_rows, shape[1], shape[2]
        positions = np.zeros((len(rows), 3), np.int64)
        kernel((1,), (len(rows),), (rows, positions, np.void(layout.tobytes())))
        np.testing.assert_array_equal(positions.T, np.unravel_index(rows, shape))


def test_parts_in_reverse(executor):
    """Negative strides from part to part, and from row to row."""
    rng = np.random.default_rng(6)
    lses = lses_of(rng, (4, 3, 7), F32, 2.0)
    outs = outs_of(rng, lses, 40, F32)
    x, y = executor.array(outs), executor.array(lses)
    assert_merge_close(cuattn.merge_states(x[::-1], y[::-1]), outs[::-1], lses[::-1])
    turned = np.s_[:, ::-1, ::-1], np.s_[:, ::-1, ::-1]
    assert_merge_close(cuattn.merge_states(x[turned[0]], y[turned[1]]), outs[turned[0]], lses[turned[1]])


@pytest.mark.parametrize(("dtype", "num_parts", "seqlen"), [(F16, 2, 64), (F32, 2, 64), (F32, 64, 1)], ids=str)
def test_bytes(dtype, num_parts, seqlen):
    """Every out is read once, 16 bytes a lane, and every lse twice by each lane of its row and group."""
    rng = np.random.default_rng(7)
    lses = rng.standard_normal((num_parts, 3, seqlen)).astype(F32)
    outs = outs_of(rng, lses, 64, dtype)
    pack = 16 // dtype.itemsize
    shape = merge_launch.block_shape(num_rows=3 * seqlen, num_parts=num_parts, head_dim=64, pack=pack)
    with host.profile() as profile:
        out, lse = cuattn.merge_states(outs, lses)
    assert profile.launches == 1
    assert profile.bytes["global"]["write"] == out.nbytes + lse.nbytes
    assert profile.bytes["global"]["read"] == outs.nbytes + 2 * shape.lanes * lses.nbytes
    # Whole warps load, so that their loads can be counted: packs of the outs, and single lse.
    assert shape.lanes * shape.groups * shape.rows % 32 == 0
    loads = {opcode: count for opcode, count in profile.opcodes.items() if opcode.startswith("ld.global")}
    wide = sum(count for opcode, count in loads.items() if ".v4" in opcode)
    assert wide == outs.nbytes // (16 * 32)
    assert sum(loads.values()) == wide + 2 * shape.lanes * lses.size // 32


def far(x: np.ndarray, axis: int) -> np.ndarray:
    """`x`, of two entries along an axis, with more than 2^31 elements between them. Only the ends are ever touched."""
    buffer = np.zeros(2**31 + 16, x.dtype)
    strides = [x.itemsize * 8] * x.ndim
    strides[-1] = x.itemsize
    strides[axis] = x.itemsize * (2**31 + 8)
    view = np.lib.stride_tricks.as_strided(buffer, x.shape, strides)
    view[...] = x
    return view


@pytest.mark.parametrize("axis", (1, 2, 3))
def test_offsets_beyond_32_bits(axis):
    """Of batch, sequence and head."""
    rng = np.random.default_rng(5)
    shape = [2, 1, 1, 1, 8]
    shape[axis] = 2
    lses = rng.standard_normal((2, shape[1], shape[3], shape[2])).astype(F32)
    outs = outs_of(rng, lses, 8, F16)
    lse_axis = (0, 1, 3, 2)[axis]
    with host.check("mem"):  # the others keep a record for every byte
        for pairs in (
            (far(outs[0], axis - 1), lses[0], outs[1], lses[1]),
            (outs[0], lses[0], far(outs[1], axis - 1), lses[1]),
            (outs[0], far(lses[0], lse_axis - 1), outs[1], lses[1]),
            (outs[0], lses[0], outs[1], far(lses[1], lse_axis - 1)),
        ):
            assert_merge_close(cuattn.merge_states(*pairs), outs, lses)
        target = far(outs[0], axis - 1), far(lses[0], lse_axis - 1)
        assert_merge_close(cuattn.merge_states(outs, lses, out=target), outs, lses)


def test_parts_beyond_32_bits():
    """The steps that the kernel itself takes, from the second part to the third."""
    rng = np.random.default_rng(8)
    lses = rng.standard_normal((3, 1, 1)).astype(F32)
    outs = outs_of(rng, lses, 8, F16)
    first, result = (outs[0], lses[0]), (np.empty_like(outs[0]), np.empty_like(lses[0]))
    executor = executor_for(outs=outs)
    with host.check("mem"):
        for rest in ((far(outs[1:], 0), lses[1:]), (outs[1:], far(lses[1:], 0))):
            merge_launch.launch(executor, first, rest, 3, None, result)
            assert_merge_close(result, outs, lses)

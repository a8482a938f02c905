"""merge_states: how its kernel is launched, what it moves, and offsets beyond 32 bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from merge_parts import F16, F32, lses_of, outs_of

import cuattn
from cuattn import compile as kernel_compiler
from cuattn import host, merge_launch
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
    lanes_a_load = shape.lanes * shape.groups * shape.rows
    assert lanes_a_load % 32 == 0  # whole warps, so that their loads can be counted
    wide = sum(count for opcode, count in profile.opcodes.items() if opcode.startswith("ld.global.v4"))
    assert wide == outs.nbytes // (16 * 32)


@pytest.mark.parametrize("axis", range(4))
def test_offsets_beyond_32_bits(axis):
    """Entries along an axis, more than 2^31 elements apart. The buffer is sparse: a few pages of it are touched."""
    rng = np.random.default_rng(5)
    shape = [1] * 4 + [8]
    shape[axis] = 2 if axis else 3  # the kernel takes steps between the parts from the second on
    lses = rng.standard_normal((shape[0], shape[1], shape[3], shape[2])).astype(F32)
    outs = outs_of(rng, lses, 8, F16)

    def far(x: np.ndarray, axis: int) -> np.ndarray:
        buffer = np.zeros((x.shape[axis] - 1) * (2**31 + 8) + 8, x.dtype)
        strides = [x.itemsize * 8] * x.ndim
        strides[-1] = x.itemsize
        strides[axis] = x.itemsize * (2**31 + 8)
        view = np.lib.stride_tricks.as_strided(buffer, x.shape, strides)
        view[...] = x
        return view

    with host.check("mem"):  # the others keep a record for every byte
        lse_axis = (0, 1, 3, 2)[axis]
        assert_merge_close(cuattn.merge_states(far(outs, axis), lses), outs, lses)
        assert_merge_close(cuattn.merge_states(outs[:2], far(lses[:2], lse_axis)), outs[:2], lses[:2])
        if axis > 0:
            target = far(outs[0], axis - 1), far(lses[0], lse_axis - 1)
            assert_merge_close(cuattn.merge_states(outs, lses, out=target), outs, lses)

"""padding_plan, remove_padding and restore_padding against the mask itself: any pattern, row, dtype and strides."""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import compile as kernel_compiler
from cuattn import host, reference
from cuattn.ops.padding import rows as padding_rows
from cuattn.ops.padding import scan as padding_scan
from cuattn.testing.arrays import Layout, place
from cuattn.testing.strategies import examples

DTYPES = tuple(
    np.dtype(t)
    for t in (np.float16, np.bool_, ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, np.float32, np.int64, np.complex128)
)
MASK_DTYPES = tuple(np.dtype(t) for t in (np.bool_, np.int64, np.uint8, np.int16, np.uint32, np.int8))
KINDS = ("random", "left_aligned", "right_aligned", "full", "empty", "first", "last", "alternating")


def make_mask(batch: int, seqlen: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Booleans [batch, seqlen]."""
    position = np.arange(seqlen)
    lengths = rng.integers(0, seqlen + 1, (batch, 1))
    mask = {
        "random": rng.random((batch, seqlen)) < rng.random(),
        "left_aligned": position < lengths,
        "right_aligned": position >= seqlen - lengths,
        "full": position >= 0,
        "empty": position < 0,
        "first": position == 0,
        "last": position == seqlen - 1,
        "alternating": position % 2 == lengths % 2,
    }[kind]
    return np.array(np.broadcast_to(mask, (batch, seqlen)))


@st.composite
def masks(draw: st.DrawFn, max_slots: int = 6000) -> np.ndarray:
    batch = draw(st.sampled_from((1, 2, 3, 7, 33)))
    seqlen = draw(st.sampled_from([n for n in (1, 2, 5, 31, 32, 33, 64, 255, 256, 257, 1000) if n * batch < max_slots]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return make_mask(batch, seqlen, draw(st.sampled_from(KINDS)), rng)


def assert_plan(executor, plan: cuattn.PaddingPlan, mask: np.ndarray) -> None:
    indices, cu_seqlens, max_seqlen = reference.padding_plan(mask)
    for name, expected in (
        ("indices", indices),
        ("padding", np.flatnonzero(mask == 0)),
        ("cu_seqlens", cu_seqlens),
    ):
        found = executor.numpy(getattr(plan, name))
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected, err_msg=name)
    assert (plan.num_tokens, plan.max_seqlen) == (len(indices), max_seqlen)
    assert (plan.batch, plan.seqlen) == mask.shape


# --- the plan --------------------------------------------------------------------------------------------------------


@examples(40)
@given(mask=masks(), data=st.data())
def test_plan_of_any_pattern(executor, mask, data):
    dtype = data.draw(st.sampled_from(MASK_DTYPES))
    values = mask.astype(dtype)
    layout = data.draw(
        st.sampled_from((Layout(), Layout(order=(1, 0)), Layout(pad=(1, 3), offset=1), Layout((1, 0), pad=(2, 1))))
    )
    assert_plan(executor, cuattn.padding_plan(executor.array(place(values, layout))), mask)


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_any_number_but_zero_is_a_token(executor, dtype):
    """Each bit alone."""
    bits = np.zeros((8 * dtype.itemsize if dtype.kind != "b" else 1, 2), dtype)
    bits[:, 0] = np.uint64(1) << np.arange(len(bits), dtype=np.uint64)
    assert_plan(executor, cuattn.padding_plan(executor.array(bits)), np.array([[True, False]] * len(bits)))


@pytest.mark.parametrize("slots", [1024, 1025, 4096 + 255])
def test_several_chunks(executor, slots):
    """Sequences that begin and end inside of chunks, and at their edges."""
    rng = np.random.default_rng(slots)
    for batch in (1, 4, slots):
        mask = rng.random((batch, slots // batch)) < 0.5
        assert_plan(executor, cuattn.padding_plan(executor.array(mask)), mask)


def test_more_chunks_than_threads(executor, monkeypatch):
    """The counts of all chunks are added up by the threads of one CTA, several each; and chunks grow with the mask."""
    monkeypatch.setattr(padding_scan, "MIN_CHUNK_SLOTS", 1)
    mask = np.random.default_rng(0).random((3, 256 * 100 + 7)) < 0.3
    assert_plan(executor, cuattn.padding_plan(executor.array(mask)), mask)
    monkeypatch.setattr(padding_scan, "MAX_CHUNKS", 3)
    assert_plan(executor, cuattn.padding_plan(executor.array(mask)), mask)


def test_strided_and_reversed_masks(executor):
    mask = np.random.default_rng(1).random((6, 70)) < 0.5
    x = executor.array(mask)
    for view in (np.s_[::-1], np.s_[:, ::-1], np.s_[::2, 1::3], np.s_[2:3]):
        assert_plan(executor, cuattn.padding_plan(x[view]), mask[view])
    broadcast = executor.xp.broadcast_to(x[:1], (4, 70))
    assert_plan(executor, cuattn.padding_plan(broadcast), np.broadcast_to(mask[:1], (4, 70)))


def test_plan_in_any_order_of_threads(executor):
    mask = np.random.default_rng(2).random((5, 700)) < 0.5
    for seed in range(3):
        with executor.active(asynchrony="random" if executor.name == "host" else "late", seed=seed):
            assert_plan(executor, cuattn.padding_plan(executor.array(mask)), mask)


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """A mask, and values for its slots in some layout."""

    mask: np.ndarray
    values: np.ndarray
    layout: Layout
    packed_layout: Layout

    def __repr__(self) -> str:
        return f"Rows({self.mask.shape}, {self.values.dtype} {self.values.shape}, {self.layout}, {self.packed_layout})"


def _layouts(ndim: int) -> st.SearchStrategy[Layout]:
    """Layouts of arrays [.., rows]: contiguous, padded, at odd addresses, and the trailing axes in another order."""
    choices = [
        Layout(),
        Layout(pad=(8,) * ndim, offset=8),
        Layout(pad=(1,) * ndim, offset=1),
        Layout(pad=(0,) * (ndim - 1) + (2,), offset=4),
        Layout(order=(ndim - 1, *range(ndim - 1))),
    ]
    if ndim > 2:
        choices.append(Layout(order=(*range(ndim - 3), ndim - 2, ndim - 3, ndim - 1)))
    return st.sampled_from(choices)


@st.composite
def rows_of(draw: st.DrawFn, dtype: np.dtype) -> Rows:
    mask = draw(masks(max_slots=200))
    trailing = draw(st.sampled_from(((), (1,), (8,), (64,), (3, 32), (5, 7), (2, 3, 4), (2, 1, 40), (300,), (4200,))))
    if len(trailing) == 1 and trailing[0] > 1000:
        mask = mask[:2, :9]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (*mask.shape, *trailing, dtype.itemsize)
    if dtype == np.bool_:
        values = rng.integers(0, 2, shape, np.uint8).view(dtype)[..., 0]
    else:  # any bits: NaN of every kind among them
        values = rng.integers(0, 256, shape, np.uint8).view(dtype)[..., 0]
    return Rows(mask, values, draw(_layouts(values.ndim)), draw(_layouts(values.ndim - 1)))


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    np.testing.assert_array_equal(*(np.ascontiguousarray(x).view(np.uint8) for x in (actual, expected)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back(executor, dtype):
    """restore(remove(x)) is x where the mask is, else 0; remove(restore(y)) is y: bit for bit."""
    if executor.name == "cuda" and dtype == ml_dtypes.float8_e4m3fn:
        pytest.skip("CuPy has no 8-bit floats")

    @examples(20)
    @given(rows=rows_of(dtype))
    def check(rows):
        plan = cuattn.padding_plan(executor.array(rows.mask))
        packed_values = reference.remove_padding(rows.values, rows.mask)
        packed = executor.guarded(packed_values.shape, dtype, rows.packed_layout)
        result = cuattn.remove_padding(executor.array(place(rows.values, rows.layout)), plan, out=packed.array)
        assert result is packed.array
        packed.check()
        assert_same_bits(executor.numpy(result), packed_values)

        padded = executor.guarded(rows.values.shape, dtype, rows.layout)
        result = cuattn.restore_padding(packed.array, plan, out=padded.array)
        assert result is padded.array
        padded.check()
        assert_same_bits(executor.numpy(result), reference.restore_padding(packed_values, rows.mask))

        again = cuattn.remove_padding(cuattn.restore_padding(packed.array, plan), plan)
        assert_same_bits(executor.numpy(again), packed_values)

    check()


FOREIGN = (np.dtype(">f4"), np.dtype("M8[s]"), np.dtype("S4"), np.dtype([("a", "u2"), ("b", ">u2")]))


@pytest.mark.parametrize("dtype", FOREIGN, ids=str)
def test_dtypes_that_no_kernel_reads_are_moved_all_the_same(dtype):
    mask = np.array([[1, 0, 1], [0, 1, 1]], np.bool_)
    values = np.arange(2 * 3 * 5 * dtype.itemsize, dtype=np.uint8).view(dtype).reshape(2, 3, 5)
    plan = cuattn.padding_plan(mask)
    packed = cuattn.remove_padding(values, plan)
    assert_same_bits(packed, values[mask])
    restored = cuattn.restore_padding(packed, plan)
    assert_same_bits(restored[mask], values[mask])
    assert not restored[~mask].view(np.uint8).any()
    pages = values.copy()
    cuattn.copy_pages(pages, [0], [1])
    assert_same_bits(pages[1], values[0])


def test_padding_is_never_read(executor):
    """Padding slots that nothing has written: the init checker would say so."""
    mask = np.array([[True, False, True], [False, False, True]])
    plan = cuattn.padding_plan(executor.array(mask))
    tokens = executor.array(np.arange(3 * 24, dtype=np.float32).reshape(3, 24))
    x = host.empty((2, 3, 24), np.float32) if executor.name == "host" else executor.xp.full((2, 3, 24), np.nan, "f4")
    nowhere = replace(plan, padding=executor.array(np.array([6, 2**31 - 1, -1], np.int32)))
    cuattn.restore_padding(tokens, nowhere, out=x)  # so that a kernel writes the tokens, and nothing else
    np.testing.assert_array_equal(executor.numpy(cuattn.remove_padding(x, plan)), executor.numpy(tokens))


def test_a_damaged_plan_touches_no_foreign_memory(executor):
    """Slots that are not there: read as zeros, not written."""
    mask = np.ones((2, 4), bool)
    plan = cuattn.padding_plan(executor.array(mask))
    slots = np.array([0, 8, -1, 2**31 - 1, -(2**31), 5, 6, 7], np.int32)
    damaged = replace(plan, indices=executor.array(slots))
    values = np.random.default_rng(10).standard_normal((2, 4, 40)).astype(np.float32)
    out = executor.guarded((8, 40), np.float32)
    cuattn.remove_padding(executor.array(place(values)), damaged, out=out.array)
    out.check()
    known = (slots >= 0) & (slots < 8)
    expected = np.where(known[:, None], values.reshape(8, 40)[np.where(known, slots, 0)], 0)
    np.testing.assert_array_equal(executor.numpy(out.array), expected)

    padded = executor.guarded((2, 4, 40), np.float32)
    cuattn.restore_padding(executor.array(values.reshape(8, 40)), damaged, out=padded.array)
    padded.check()
    restored = executor.numpy(padded.array).reshape(8, 40)
    np.testing.assert_array_equal(restored[slots[known]], values.reshape(8, 40)[known])
    assert np.isnan(np.delete(restored, slots[known], axis=0)).all()  # the poison that was there


def test_head_major_rows_are_not_copied(executor):
    """[B, H, N, D] through its transposed view: segments of one head each."""
    mask = np.random.default_rng(3).random((2, 9)) < 0.6
    values = np.random.default_rng(4).standard_normal((2, 3, 9, 40)).astype(np.float16)
    padded, packed = executor.array(values).swapaxes(1, 2), executor.xp.empty((int(mask.sum()), 3, 40), np.float16)
    movement = padding_rows.fold(padded, packed)
    assert (movement.num_segments, movement.unit_bytes) == (3, 16)
    plan = cuattn.padding_plan(executor.array(mask))
    result = cuattn.remove_padding(padded, plan, out=packed)
    assert_same_bits(executor.numpy(result), values.swapaxes(1, 2)[mask])


@pytest.mark.parametrize(
    ("offset", "width", "unit"), [(0, 64, 16), (4, 64, 8), (2, 64, 4), (1, 64, 2), (0, 20, 8), (0, 6, 4), (0, 5, 2)]
)
def test_units_are_as_wide_as_addresses_allow(executor, offset, width, unit):
    x = executor.array(place(np.zeros((2, 3, width), np.float16), Layout(offset=offset)))
    assert padding_rows.fold(x, executor.xp.zeros((4, width), np.float16)).unit_bytes == unit


def test_more_segments_than_the_grid(executor, monkeypatch):
    """CTAs take turns."""
    monkeypatch.setattr(padding_rows, "MAX_GRID_Y", 2)
    mask = np.random.default_rng(5).random((2, 5)) < 0.5
    values = np.random.default_rng(6).standard_normal((2, 5, 7, 8)).astype(np.float32)
    x = executor.array(place(values, Layout(order=(0, 2, 1, 3))))
    plan = cuattn.padding_plan(executor.array(mask))
    packed = cuattn.remove_padding(x, plan)
    assert_same_bits(executor.numpy(packed), values[mask])
    assert_same_bits(executor.numpy(cuattn.restore_padding(packed, plan)), np.where(mask[..., None, None], values, 0))


@pytest.mark.parametrize("axis", (0, 1, 2))
def test_offsets_beyond_32_bits(axis):
    """Two entries along an axis, more than 2^32 bytes apart. The buffer is sparse: only its ends are touched."""
    shape = [1, 1, 1, 8]
    shape[axis] = 2
    values = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    plan = cuattn.padding_plan(np.ones(shape[:2], bool))

    def far(shape, axis):
        strides = [32] * len(shape)
        strides[axis], strides[-1] = 2**32 + 64, 4
        return np.lib.stride_tricks.as_strided(np.zeros(2**30 + 32, np.float32), shape, strides)

    x = far(shape, axis)
    x[...] = values
    packed_shape = (shape[0] * shape[1], *shape[2:])
    packed = far(packed_shape, max(axis - 1, 0))
    with host.check("mem"):  # the others keep a record for every byte
        cuattn.remove_padding(x, plan, out=packed)
        np.testing.assert_array_equal(packed, values.reshape(packed_shape))
        x[...] = 0
        cuattn.restore_padding(packed, plan, out=x)
        np.testing.assert_array_equal(x, values)


# --- the kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["padding_plan", "padding_rows"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_spills(arch, source):
    binary = kernel_compiler.build(source, {"NUM_THREADS": padding_rows.NUM_THREADS}, arch=arch, kind="cubin")
    for entry, used in binary.resources.items():
        assert used.spill_stores == used.spill_loads == used.stack_bytes == 0, (entry, used)


@pytest.mark.parametrize("trailing", [(64,), (3, 40)])
def test_every_byte_moves_once(trailing):
    """Rows once in and once out, and the slots; the whole padded array in one pass."""
    mask = np.random.default_rng(8).random((4, 50)) < 0.6
    plan = cuattn.padding_plan(mask)
    x = np.ones((*mask.shape, *trailing), np.float16)
    with host.profile() as profile:
        packed = cuattn.remove_padding(x, plan)
    threads = padding_rows.fold(x, packed).block[0]
    assert profile.launches == 1
    assert profile.bytes["global"] == {"read": packed.nbytes + threads * 4 * plan.num_tokens, "write": packed.nbytes}
    with host.profile() as profile:
        cuattn.restore_padding(packed, plan)
    assert profile.launches == 1
    assert profile.bytes["global"] == {"read": packed.nbytes + threads * 4 * mask.size, "write": x.nbytes}


def test_bytes_of_a_plan():
    """The mask twice, the counts, and one number a slot."""
    mask = np.random.default_rng(9).random((8, 700)) < 0.6
    with host.profile() as profile:
        cuattn.padding_plan(mask)
    num_chunks = -(-mask.size // padding_scan.MIN_CHUNK_SLOTS)
    assert profile.launches == 2
    written = num_chunks * 4 + mask.size * 4 + (len(mask) + 1) * 4
    assert profile.bytes["global"]["write"] == written
    scanned = num_chunks * num_chunks * 4
    assert 2 * mask.nbytes + scanned <= profile.bytes["global"]["read"] <= 2 * mask.nbytes + 2 * scanned

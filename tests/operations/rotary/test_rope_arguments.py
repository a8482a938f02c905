"""rope: out=, empty arrays, positions from anywhere, and what is refused before anything is launched."""

from __future__ import annotations

import numpy as np
import pytest

import cuattn
from cuattn import errors
from cuattn.testing import kernels
from cuattn.testing.arrays import Layout, place
from cuattn.testing.rotary_tolerance import assert_rope_close

POSITIONS = np.array([3, 1, 4])


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def tables(rows=8, columns=4, dtype=np.float32):
    return {name: normal(rows, columns, dtype=dtype) for name in ("cos", "sin")}


# --- out= ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [Layout(), Layout(pad=(1, 0, 3), offset=1), Layout(order=(1, 0, 2))], ids=str)
@pytest.mark.parametrize("rotary_dim", [32, 16])
def test_in_place(executor, layout, rotary_dim):
    """The same bits as elsewhere, and what is not turned stays."""
    values = normal(3, 5, 32)
    expected = executor.numpy(cuattn.rope(executor.array(values), POSITIONS, rotary_dim=rotary_dim))
    x = executor.array(place(values, layout))
    assert cuattn.rope(x, POSITIONS, rotary_dim=rotary_dim, out=x[...]).shape == x.shape
    np.testing.assert_array_equal(executor.numpy(x), expected)


def test_in_place_where_the_last_axis_is_not_contiguous(executor):
    values = normal(3, 2, 8)
    x = executor.array(np.asfortranarray(values))
    assert cuattn.rope(x, POSITIONS, out=x) is x
    assert_rope_close(executor.numpy(x), values, POSITIONS)


def test_out_with_a_strided_last_axis(executor):
    values = normal(3, 2, 8)
    guarded = executor.guarded((3, 2, 8), np.float32, Layout(order=(2, 0, 1), pad=(1, 0, 1)))
    assert cuattn.rope(executor.array(values), POSITIONS, out=guarded.array) is guarded.array
    guarded.check()
    assert_rope_close(executor.numpy(guarded.array), values, POSITIONS)


def test_broadcast_input(executor):
    """Stride 0: one token at several positions."""
    x = executor.xp.broadcast_to(executor.array(normal(1, 2, 8)), (3, 2, 8))
    assert_rope_close(executor.numpy(cuattn.rope(x, POSITIONS)), np.broadcast_to(normal(1, 2, 8), (3, 2, 8)), POSITIONS)


def test_unaligned_elements(executor):
    """Elements and positions at odd addresses: through aligned copies."""
    if executor.name != "host":
        pytest.skip("CuPy arrays are aligned to their elements")
    base = np.zeros((3, 2, 8), np.dtype([("byte", np.uint8), ("number", np.float32)]))
    base["number"] = values = normal(3, 2, 8)
    places = np.zeros(3, np.dtype([("byte", np.uint8), ("number", np.int32)]))
    places["number"] = POSITIONS
    cuattn.rope(base["number"], places["number"], out=base["number"])
    assert_rope_close(np.ascontiguousarray(base["number"]), values, POSITIONS)
    assert (base["byte"] == 0).all()


def test_overlap_is_refused(executor):
    base = executor.array(normal(6, 4, 8))
    before = executor.numpy(base).copy()
    for x, out in ((base[:3], base[1:4]), (base[:3], base[2::-1]), (base[:3, :2], base[:3, 1:3])):
        with pytest.raises(errors.OverlapError, match=r"out .* of x"):
            cuattn.rope(x, POSITIONS, out=out)
    itself = np.lib.stride_tricks.as_strided(np.zeros(48, np.float32), (3, 4, 8), (32, 0, 4))
    if executor.name == "host":
        with pytest.raises(errors.OverlapError, match="share memory"):
            cuattn.rope(base[:3], POSITIONS, out=itself)
    np.testing.assert_array_equal(executor.numpy(base), before)


def test_out_in_the_memory_of_positions_or_tables():
    """Of the host, where one buffer can hold both."""
    memory = np.zeros(3 * 8, np.float32)
    out, x = memory.reshape(3, 1, 8), normal(3, 1, 8)
    with pytest.raises(errors.OverlapError, match="positions"):
        cuattn.rope(x, memory.view(np.int32)[:3], out=out)
    for name in ("cos", "sin"):
        with pytest.raises(errors.OverlapError, match=name):
            cuattn.rope(x, POSITIONS % 2, **{**tables(2), name: memory[:8].reshape(2, 4)}, out=out)


def test_bad_out(executor):
    x, empty = executor.array(normal(3, 1, 8)), executor.xp.empty
    with pytest.raises(errors.ShapeError, match=r"out has shape \(3, 1, 9\); the result has shape \(3, 1, 8\)"):
        cuattn.rope(x, POSITIONS, out=empty((3, 1, 9), np.float32))
    with pytest.raises(errors.ShapeError, match="out"):
        cuattn.rope(x, POSITIONS, out=empty((1, 3, 1, 8), np.float32))
    with pytest.raises(errors.DTypeError, match="out has dtype float16"):
        cuattn.rope(x, POSITIONS, out=empty((3, 1, 8), np.float16))
    with pytest.raises(errors.ArrayTypeError, match="out"):
        cuattn.rope(x, POSITIONS, out=[0.0])
    out = np.zeros((3, 1, 8), np.float32)
    out.flags.writeable = False
    with pytest.raises(errors.ArrayTypeError, match="read-only"):
        cuattn.rope(normal(3, 1, 8), POSITIONS, out=out)


# --- empty arrays ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 2, 8), (3, 0, 8), (0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)])
def test_empty(executor, shape):
    positions = np.zeros(shape[:-2], np.int32)
    out = executor.xp.empty(shape, np.float16)
    assert cuattn.rope(executor.xp.empty(shape, np.float16), positions, out=out) is out
    assert cuattn.rope(executor.xp.empty(shape, np.float16), positions).shape == shape


def test_empty_tables(executor):
    """Tables without a position are fine for no token, and for nothing else."""
    empty = {name: executor.array(table) for name, table in tables(0).items()}
    assert cuattn.rope(executor.xp.empty((0, 1, 8), np.float32), [], **empty).shape == (0, 1, 8)
    with pytest.raises(errors.ArgumentError, match=r"positions\[0\] is 0"):
        cuattn.rope(executor.array(normal(1, 1, 8)), [0], **empty)


# --- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int32, np.int64, np.uint64, ">i4"])
def test_positions_of_any_integer_type(executor, dtype):
    x = normal(3, 1, 8)
    assert_rope_close(executor.numpy(cuattn.rope(executor.array(x), POSITIONS.astype(dtype))), x, POSITIONS)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_positions_of_the_sequence_or_of_every_token(executor, dtype):
    x = normal(2, 3, 1, 8)
    both = np.stack([POSITIONS, POSITIONS + 7]).astype(dtype)
    for positions in (both, executor.array(both), executor.array(place(both, Layout(order=(1, 0), pad=(2, 1))))):
        assert_rope_close(executor.numpy(cuattn.rope(executor.array(x), positions)), x, both)
    for positions in (POSITIONS.tolist(), tuple(POSITIONS.tolist()), executor.array(POSITIONS.astype(dtype))):
        result = executor.numpy(cuattn.rope(executor.array(x), positions))
        assert_rope_close(result, x, np.broadcast_to(POSITIONS, (2, 3)))
    reverse = executor.array(both)[:, ::-1]
    assert_rope_close(executor.numpy(cuattn.rope(executor.array(x), reverse)), x, both[:, ::-1])


@pytest.mark.parametrize("shape", [(3, 1, 8), (2, 3, 1, 8)])
@pytest.mark.parametrize("positions", [[1, 2], [[1, 2, 3]], [[1], [2], [3]], [[[1]]], [[1, 2, 3]] * 3])
def test_positions_of_another_shape(executor, shape, positions):
    with pytest.raises(errors.ShapeError, match="positions has shape"):
        cuattn.rope(executor.array(normal(*shape)), positions)


@pytest.mark.parametrize("positions", [[1.0, 2.0, 3.0], np.array([True, False, True]), np.array(["a", "b", "c"])])
def test_positions_that_are_no_integers(executor, positions):
    with pytest.raises(errors.DTypeError, match=r"positions has dtype .* integers are allowed"):
        cuattn.rope(executor.array(normal(3, 1, 8)), positions)


def test_positions_that_are_no_array(executor):
    for positions in ([1, [2], 3], [None] * 3, "abc", 1, None):
        with pytest.raises(errors.ArrayTypeError):
            cuattn.rope(executor.array(normal(3, 1, 8)), positions)
    with pytest.raises(errors.ArgumentError, match="positions holds 18446744073709551615"):
        cuattn.rope(executor.array(normal(3, 1, 8)), np.array([0, 2**64 - 1, 0], np.uint64))


@pytest.mark.parametrize(("wrong", "index"), [(8, 1), (-1, 2), (2**40, 0)])
def test_a_position_that_the_tables_do_not_hold(executor, wrong, index):
    positions = np.array([0, 7, 3])
    positions[index] = wrong
    with pytest.raises(errors.ArgumentError, match=rf"positions\[{index}\] is {wrong}; cos and sin hold .* 0 to 7"):
        on_device = {name: executor.array(table) for name, table in tables().items()}
        cuattn.rope(executor.array(normal(3, 1, 8)), positions, **on_device)


@pytest.mark.parametrize("dtype", [np.float16, np.float64], ids=["float16", "float64"])
def test_a_position_that_only_the_kernel_sees(executor, dtype):
    """It reads nothing beside the tables (the mem checker is on) and turns into NaN; other tokens are right."""
    x, positions = normal(6, 2, 12, dtype=dtype), np.array([7, -1, 0, 8, 2**62, -(2**63)])
    given = tables()
    on_device = {name: executor.array(place(table)) for name, table in given.items()}
    result = executor.numpy(kernels.rope(executor.array(x), positions, **on_device, look=False))
    wrong = np.array([False, True, False, True, True, True])
    assert np.isnan(result[wrong][..., :8]).all()
    np.testing.assert_array_equal(result[wrong][..., 8:], x[wrong][..., 8:])
    assert_rope_close(result[~wrong], x[~wrong], positions[~wrong], **given)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotary_dim", [0, 3, -2, 10, 8.0, "8", True, np.float32(2)])
def test_bad_rotary_dim(executor, rotary_dim):
    with pytest.raises(errors.ArgumentError, match=r"rotary_dim is .* even"):
        cuattn.rope(executor.array(normal(3, 1, 8)), POSITIONS, rotary_dim=rotary_dim)


def test_an_odd_head_dim_needs_a_rotary_dim(executor):
    with pytest.raises(errors.ArgumentError, match="rotary_dim is 7; even numbers from 2 to the head dim, 7"):
        cuattn.rope(executor.array(normal(3, 1, 7)), POSITIONS)


@pytest.mark.parametrize("base", [0, 0.5, -10000.0, np.inf, np.nan, "10000", None, True, 1j])
def test_bad_base(executor, base):
    with pytest.raises(errors.ArgumentError, match="base is"):
        cuattn.rope(executor.array(normal(3, 1, 8)), POSITIONS, base=base)


@pytest.mark.parametrize("option", ["interleaved", "inverse"])
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_bad_flags(executor, option, value):
    with pytest.raises(errors.ArgumentError, match=f"{option} is"):
        cuattn.rope(executor.array(normal(3, 1, 8)), POSITIONS, **{option: value})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cos": None}, errors.ArgumentError, "sin is given without cos"),
        ({"sin": None}, errors.ArgumentError, "cos is given without sin"),
        ({"base": 5e5}, errors.ArgumentError, "base is 500000.0 beside cos and sin"),
        ({"rotary_dim": 6}, errors.ShapeError, "cos and sin have 4 columns and rotary_dim is 6"),
        ({"cos": normal(8)}, errors.ShapeError, r"cos has shape \(8,\)"),
        ({"cos": normal(8, 3)}, errors.ShapeError, r"cos is float32 of shape \(8, 3\) and sin .* \(8, 4\)"),
        ({"cos": normal(9, 4)}, errors.ShapeError, "must be alike"),
        ({"cos": normal(8, 4, dtype=np.float64)}, errors.DTypeError, "cos has dtype float64 .* float32 for float32"),
        ({"sin": normal(8, 4, dtype=np.float16)}, errors.DTypeError, "sin has dtype float16"),
        ({"sin": [[0.0] * 4] * 8}, errors.ArrayTypeError, "sin: .*list is no array"),
        ({"cos": normal(8, 5), "sin": normal(8, 5)}, errors.ArgumentError, "rotary_dim is 10; .* 8, are allowed"),
    ],
)
def test_bad_tables(change, error, message):
    with pytest.raises(error, match=message):
        cuattn.rope(normal(3, 1, 8), POSITIONS, **{**tables(), **change})


def test_float64_tables_of_both_kinds_must_agree():
    mixed = {"cos": normal(8, 4), "sin": normal(8, 4, dtype=np.float64)}
    with pytest.raises(errors.ShapeError, match=r"cos is float32 .* sin float64"):
        cuattn.rope(normal(3, 1, 8, dtype=np.float64), POSITIONS, **mixed)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (1, 1, 3, 1, 8)])
def test_bad_rank(executor, shape):
    with pytest.raises(errors.ShapeError, match="rank"):
        cuattn.rope(executor.array(normal(*shape)), POSITIONS)


@pytest.mark.parametrize("head_dim", [0, 514])
def test_bad_head_dim(executor, head_dim):
    with pytest.raises(errors.ShapeError, match=f"x has head dim {head_dim}; allowed are 1 to 512"):
        cuattn.rope(executor.array(normal(3, 1, head_dim)), POSITIONS)


def test_extent_beyond_32_bits():
    x = np.broadcast_to(np.zeros(1, np.float16), (1, 2**31, 8))
    with pytest.raises(errors.ShapeError, match=r"2147483648.*at most 2147483647"):
        cuattn.rope(x, [0])


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, ">f4" if np.little_endian else "<f4"])
def test_bad_dtype(dtype):
    with pytest.raises(errors.DTypeError, match=r"x.*float16, bfloat16, float32, float64"):
        cuattn.rope(np.zeros((3, 1, 8), dtype), POSITIONS)


@pytest.mark.parametrize("x", [[[[1.0, 2.0]]], 3.0, None, "x"])
def test_no_array(x):
    with pytest.raises(errors.ArrayTypeError, match="x"):
        cuattn.rope(x, [0])

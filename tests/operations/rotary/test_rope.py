"""rope against its formula, in every dtype, layout and way to pair; what a rotation is; positions of any size."""

from __future__ import annotations

import importlib
import mmap

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import host, reference
from cuattn.testing.arrays import Layout, place
from cuattn.testing.rotary_tolerance import TRIGONOMETRIC_ROUNDINGS, assert_rope_close, rope_bound
from cuattn.testing.rounding import unit_roundoff
from cuattn.testing.strategies import DTYPES, examples, fill, layouts, value_kinds

FARTHEST = 2**31 - 1
#: (head dim, rotary dim): whole 16-byte units in every dtype, in some, in none; nothing copied, a little, most.
DIMS = ((64, 64), (128, 128), (256, 256), (64, 32), (80, 16), (2, 2), (6, 6), (7, 4), (20, 10), (72, 24), (129, 2))


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@st.composite
def places(draw, shape):
    """Positions of any size, as the host or a device would give them."""
    high = draw(st.sampled_from((8, 5000, 10**6, FARTHEST)))
    low = -high if draw(st.booleans()) else 0
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    positions = rng.integers(low, high, shape, dtype=draw(st.sampled_from((np.int32, np.int64))))
    if positions.size and draw(st.booleans()):
        positions.flat[-1] = high
    return place(positions, draw(layouts(ndim=positions.ndim)))


@st.composite
def problems(draw):
    """x, positions and options, in any layout."""
    packed = draw(st.booleans())
    leading = (draw(st.integers(1, 40)),) if packed else (draw(st.integers(1, 3)), draw(st.integers(1, 17)))
    head_dim, rotary_dim = draw(st.sampled_from(DIMS))
    dtype = draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (*leading, draw(st.sampled_from((1, 2, 3, 4, 5, 9))), head_dim)
    x = place(fill(shape, dtype, draw(value_kinds()), rng), draw(layouts(ndim=len(shape))))
    options = {"interleaved": draw(st.booleans()), "inverse": draw(st.booleans())}
    if rotary_dim != head_dim or draw(st.booleans()):
        options["rotary_dim"] = rotary_dim
    if draw(st.booleans()):
        options["base"] = draw(st.sampled_from((1.0, 3.7, 500000.0, 1e12)))
    places_shape = leading[-1:] if draw(st.booleans()) else leading
    return x, draw(places(places_shape)), options


@examples(60)
@given(problem=problems(), data=st.data())
def test_against_the_formula(executor, problem, data):
    x, positions, options = problem
    out = executor.guarded(x.array.shape, x.array.dtype, data.draw(layouts(ndim=x.array.ndim)))
    result = cuattn.rope(executor.array(x), executor.array(positions), out=out.array, **options)
    assert result is out.array
    out.check()
    assert_rope_close(executor.numpy(result), x.array, positions.array, **options)


@examples(40)
@given(problem=problems(), data=st.data())
def test_with_tables(executor, problem, data):
    """Any tables are taken as they are; a misaligned or gapped one is read just as right."""
    x, positions, options = problem
    options.pop("base", None)
    dtype, limit = x.array.dtype, 50
    pairs = options.get("rotary_dim", x.array.shape[-1]) // 2
    wide = dtype == np.float64 and data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    for name in ("cos", "sin"):
        table = rng.uniform(-1.5, 1.5, (limit, pairs)).astype(np.float64 if wide else np.float32)
        options[name] = place(table, data.draw(layouts(ndim=2)))
    rows = np.abs(positions.array) % limit
    given = {name: executor.array(value) if name in ("cos", "sin") else value for name, value in options.items()}
    result = cuattn.rope(executor.array(x), rows.tolist(), **given)
    told = {name: value.array if name in ("cos", "sin") else value for name, value in options.items()}
    assert_rope_close(executor.numpy(result), x.array, rows, **told)


# --- how exact the angles are ----------------------------------------------------------------------------------------


def far_positions(seed=0):
    """Every size of position up to 2^31, both signs, with the largest."""
    rng = np.random.default_rng(seed)
    sizes = np.concatenate([rng.integers(2**k, 2 ** (k + 1), 12) for k in range(31)])
    return np.concatenate([[0, FARTHEST, -FARTHEST - 1], sizes, -sizes])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_angles_are_exact_at_every_position(executor, base, dtype, interleaved):
    """Of the pair (1, 0): the result is cosine and sine themselves."""
    positions, pairs = far_positions(), 64
    x = np.zeros((positions.size, 1, 2 * pairs), dtype)
    x[..., slice(0, None, 2) if interleaved else slice(0, pairs)] = 1
    out = executor.numpy(cuattn.rope(executor.array(x), positions, base=base, interleaved=interleaved))[:, 0]
    cos, sin = (out[:, 0::2], out[:, 1::2]) if interleaved else (out[:, :pairs], out[:, pairs:])
    angles = reference.rotary_angles(positions, 2 * pairs, base)
    # Proven are 2.5 roundings for all positions. What these reach is the same on every executor, to the bit.
    measured = {np.float32: 1.51, np.float64: 1.37}[dtype]
    assert measured < TRIGONOMETRIC_ROUNDINGS
    bound = measured * unit_roundoff(dtype)
    assert np.abs(cos - np.cos(angles)).max() <= bound
    assert np.abs(sin - np.sin(angles)).max() <= bound


def test_the_product_in_float32_would_be_wrong_by_radians():
    """What the kernel's integers are for: position times frequency, rounded, keeps nothing of the angle."""
    positions = np.array([10**6 + 1, FARTHEST])
    frequencies = 10000.0 ** (-np.arange(32) / 32)
    rounded = positions.astype(np.float32)[:, None] * frequencies.astype(np.float32)
    exact = reference.rotary_angles(positions, 64).astype(np.float64)
    error = np.abs(np.cos(rounded.astype(np.float64)) - np.cos(exact)).max(axis=1)
    assert error[0] > 0.01 and error[1] > 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_positions_of_64_bits(executor, dtype):
    """What is lost beyond 2^31 is as documented, and nothing wraps around at 2^32 or 2^63."""
    positions = np.array([2**32, 2**32 + 1, 2**40 + 12345, -(2**40) - 1, 2**33 - 1, -(2**33)])
    x = normal(positions.size, 2, 16, dtype=dtype)
    assert_rope_close(executor.numpy(cuattn.rope(executor.array(x), positions)), x, positions)
    extremes = np.array([2**63 - 1, -(2**63)])
    x = normal(2, 2, 16, dtype=np.float64)
    assert_rope_close(executor.numpy(cuattn.rope(executor.array(x), extremes)), x, extremes)


# --- what a rotation is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_position_0_changes_nothing(executor, dtype):
    x = normal(3, 2, 40, dtype=dtype)
    np.testing.assert_array_equal(executor.numpy(cuattn.rope(executor.array(x), [0, 0, 0])), x)


@examples(10)
@given(seed=st.integers(0, 99), high=st.sampled_from((10, 10**6, FARTHEST)), interleaved=st.booleans())
def test_norms_are_kept(executor, seed, high, interleaved):
    """Of every pair: a rotation and nothing else."""
    positions = np.random.default_rng(seed).integers(-high, high, 9)
    x = normal(9, 2, 32, seed=seed)
    out = executor.numpy(cuattn.rope(executor.array(x), positions, interleaved=interleaved)).astype(np.float64)

    def norms(values):
        pairs = values.reshape(9, 2, 16, 2) if interleaved else values.reshape(9, 2, 2, 16).swapaxes(2, 3)
        return np.sqrt((pairs.astype(np.float64) ** 2).sum(axis=-1))

    # Both elements are off by at most 4.5 u (|a| + |b|), and that is at most sqrt(2) norms: 4.5 u sqrt(2) sqrt(2).
    np.testing.assert_allclose(norms(out), norms(x), rtol=9.1 * 2**-24, atol=0)


@examples(10)
@given(seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES), interleaved=st.booleans())
def test_the_inverse_undoes(executor, seed, dtype, interleaved):
    positions = np.random.default_rng(seed).integers(0, FARTHEST, 7)
    x = normal(7, 3, 64, dtype=dtype, seed=seed)
    there = cuattn.rope(executor.array(x), positions, interleaved=interleaved)
    back = cuattn.rope(there, positions, interleaved=interleaved, inverse=True)
    # The second call is right for what the first one gave; that, turned back exactly, is x but for the first's error.
    _, first = rope_bound(x, positions, x.dtype, interleaved=interleaved)
    _, second = rope_bound(executor.numpy(there), positions, x.dtype, interleaved=interleaved, inverse=True)
    bound = second + 2 * first.max(axis=-1, keepdims=True)  # an error (e, f) turned: at most |e| + |f|
    assert (np.abs(executor.numpy(back).astype(np.float64) - x.astype(np.float64)) <= bound).all()


@examples(10)
@given(data=st.data())
def test_products_depend_on_the_distance_only(executor, data):
    """The property that rotary embedding is made for, however far out."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    distance, shift = data.draw(st.integers(-300, 300)), data.draw(st.sampled_from((1, 977, 10**6, 2**30)))
    start = data.draw(st.integers(-1000, 1000))
    q, k = (rng.standard_normal((1, 1, 64)) for _ in "qk")
    dots = []
    for at in (start, start + shift):
        turned = (cuattn.rope(executor.array(x), [p]) for x, p in ((q, at), (k, at + distance)))
        a, b = (executor.numpy(x).astype(np.longdouble) for x in turned)
        dots.append((a * b).sum())
    # Each of the two vectors of a product is off by 9 u of its norm (see above), in both products.
    assert abs(dots[0] - dots[1]) <= 4 * 9 * 2**-53 * np.linalg.norm(q) * np.linalg.norm(k)


@examples(10)
@given(seed=st.integers(0, 99), shift=st.sampled_from((1, -3, 4096, 2**30)))
def test_turning_twice_is_turning_by_the_sum(executor, seed, shift):
    positions = np.random.default_rng(seed).integers(0, 2**30, 5)
    x = normal(5, 2, 32, dtype=np.float64, seed=seed)
    twice = cuattn.rope(cuattn.rope(executor.array(x), positions), [shift] * 5)
    expected, bound = rope_bound(x, positions + shift, x.dtype)
    error = np.abs(executor.numpy(twice) - expected)
    assert (error <= bound + 2 * bound.max(axis=-1, keepdims=True)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_two_ways_to_pair_are_one_up_to_order(executor, dtype):
    """The same arithmetic: the same bits."""
    x, positions = normal(2, 5, 3, 48, dtype=dtype), far_positions()[:10].reshape(2, 5)
    order = np.arange(32).reshape(2, 16).T.ravel().tolist() + list(range(32, 48))  # half to interleaved
    interleaved = cuattn.rope(executor.array(x[..., order]), positions, interleaved=True, rotary_dim=32)
    half = cuattn.rope(executor.array(x), positions, rotary_dim=32)
    np.testing.assert_array_equal(executor.numpy(interleaved), executor.numpy(half)[..., order])


@pytest.mark.parametrize("tables", [False, True], ids=["computed", "tables"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_the_layout_changes_no_bit(executor, dtype, interleaved, tables):
    """16 bytes at a time or one element: one arithmetic."""
    x, positions = normal(3, 5, 2, 64, dtype=dtype), np.arange(5) + 100
    options = {"interleaved": interleaved, "rotary_dim": 32}
    if tables:
        cos, sin = cuattn.rope_frequencies(32, 200)
        options |= {"cos": executor.array(cos), "sin": executor.array(sin)}
    packed = executor.numpy(cuattn.rope(executor.array(x), positions, **options))
    guarded = place(x, Layout(pad=(0, 1, 0, 3), offset=1))
    np.testing.assert_array_equal(executor.numpy(cuattn.rope(executor.array(guarded), positions, **options)), packed)
    strided = executor.array(np.asfortranarray(x))  # a last axis that is not contiguous
    np.testing.assert_array_equal(executor.numpy(cuattn.rope(strided, positions, **options)), packed)


def test_tables_of_the_plain_frequencies_agree(executor):
    """Tables are rounded once from float64; computed, there are 2.5 roundings: apart by no more than both."""
    x, positions = normal(1, 64, 2, 32), np.arange(64) * 61
    cos, sin = cuattn.rope_frequencies(32, 4000, base=500000.0)
    looked_up = cuattn.rope(executor.array(x), positions, cos=executor.array(cos), sin=executor.array(sin))
    computed = cuattn.rope(executor.array(x), positions, base=500000.0)
    _, bound = rope_bound(x, positions, x.dtype, base=500000.0)
    assert (np.abs(executor.numpy(looked_up) - executor.numpy(computed)) <= 2 * bound).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_by_hand(executor, interleaved):
    """Two pairs, at angles that one can look up: 1 and 0.01 radians a position."""
    x = np.array([[[1, 2, 3, 4, 5]]], np.float64)
    c, s, d, t = np.cos(3), np.sin(3), np.cos(0.03), np.sin(0.03)
    if interleaved:
        expected = [1 * c - 2 * s, 2 * c + 1 * s, 3 * d - 4 * t, 4 * d + 3 * t, 5]
    else:
        expected = [1 * c - 3 * s, 2 * d - 4 * t, 3 * c + 1 * s, 4 * d + 2 * t, 5]
    result = executor.numpy(cuattn.rope(executor.array(x), [3], rotary_dim=4, interleaved=interleaved))
    np.testing.assert_allclose(result[0, 0], expected, rtol=0, atol=1e-14)


# --- work ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "offset"), [(np.float16, 0), (np.float32, 0), (np.float32, 1)], ids=["f16", "f32", "f32-element"]
)
def test_one_read_and_one_write(dtype, offset):
    """Counted bytes: x once, and for every group of four heads the positions and frequencies once more."""
    x = np.zeros(2 * 3 * 8 * 64 + offset, dtype)[offset:].reshape(2, 3, 8, 64)
    positions = np.arange(3, dtype=np.int32)
    with host.profile() as profile:
        cuattn.rope(x, positions, rotary_dim=32)
    pairs = 16 // x.itemsize if offset == 0 else 1
    threads = 2 * 3 * (8 // 4) * (16 // pairs)
    assert profile.launches == 1
    read = x.nbytes + threads * (positions.itemsize + 8 * pairs)
    assert profile.bytes["global"] == {"read": read, "write": x.nbytes}


def test_in_place_moves_only_what_is_turned():
    x = np.zeros((1, 6, 4, 64), np.float32)
    with host.profile() as profile:
        cuattn.rope(x, np.arange(6, dtype=np.int32), rotary_dim=16, out=x)
    assert profile.bytes["global"]["write"] == x.nbytes // 4


def test_same_bits_every_time(executor):
    x, positions = executor.array(normal(2, 40, 6, 64, dtype=ml_dtypes.bfloat16)), np.arange(40)
    first = executor.numpy(cuattn.rope(x, positions))
    for seed in range(2):
        with executor.active(asynchrony="random" if executor.name == "host" else "late", seed=seed):
            np.testing.assert_array_equal(executor.numpy(cuattn.rope(x, positions)), first)


def test_more_heads_than_groups_of_threads(executor):
    """1,001 heads: the last group has one head less than the others."""
    x = normal(2, 1001, 4)
    assert_rope_close(executor.numpy(cuattn.rope(executor.array(x), [5, -5])), x, np.array([5, -5]))


def test_fewer_ctas_than_work_take_turns(executor, monkeypatch):
    """As they would beyond 2^31 CTAs."""
    monkeypatch.setattr(importlib.import_module("cuattn.ops.rotary.rope_launch"), "MAX_GRID", (2, 1, 1))
    x, positions = normal(3, 50, 5, 40, dtype=np.float64), np.arange(50)
    assert_rope_close(
        executor.numpy(cuattn.rope(executor.array(x), positions, rotary_dim=20)), x, positions, rotary_dim=20
    )


def test_offsets_beyond_32_bits():
    """Tokens 2^31 elements apart, in address space of which only two pages are ever touched."""
    apart = 2**31
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    buffer = np.frombuffer(mmap.mmap(-1, 2 * (apart + 64), flags=flags), np.float16)
    x = np.lib.stride_tricks.as_strided(buffer, (2, 1, 32), (2 * apart, 2, 2), writeable=True)
    x[...] = values = normal(2, 1, 32, dtype=np.float16)
    with host.check():  # the checkers keep a state for every byte between the tokens
        assert_rope_close(cuattn.rope(x, [3, 7]), values, np.array([3, 7]))
        cuattn.rope(x, [3, 7], out=x)
        assert_rope_close(x, values, np.array([3, 7]))

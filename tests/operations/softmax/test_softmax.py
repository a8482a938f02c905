"""softmax, log_softmax and logsumexp against float64, in every kind of kernel, layout and value."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from softmax_variants import CONFIGS, VARIANTS, Variant, problems

import cuattn
from cuattn import compile as kernel_compiler
from cuattn.dtypes import ELEMENT_TYPES
from cuattn.ops.softmax import config as softmax_config
from cuattn.ops.softmax.config import SPLIT, SPLIT_LANES
from cuattn.testing import assert_softmax_close, kernels
from cuattn.testing.arrays import Layout, place
from cuattn.testing.strategies import AWKWARD_SEQLENS, DTYPES, examples

FUNCTIONS = {"softmax": cuattn.softmax, "log_softmax": cuattn.log_softmax, "logsumexp": cuattn.logsumexp}
ALGORITHMS = ("naive", "safe", "online")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_against_float64(executor, variant: Variant):
    @examples(8)
    @given(problem=problems(variant))
    def check(problem):
        x = executor.array(place(problem.values, problem.layout))
        axis, dtype, shape = problem.axis, variant.dtype, list(problem.values.shape)
        options = dict(axis=axis, algorithm=variant.algorithm, config=problem.config)
        if variant.output == "logsumexp":
            result = kernels.logsumexp(x, **options)
            assert result.shape == tuple(np.delete(shape, axis))
        else:
            guarded = executor.guarded(shape, dtype, problem.out_layout)
            result = getattr(kernels, variant.output)(x, out=guarded.array, **options)
            assert result is guarded.array
            guarded.check()
        assert_softmax_close(executor.numpy(result), problem.values, axis, variant.output)

    check()


def test_the_variants_cover_the_table():
    assert {v.config_name for v in VARIANTS} == set(CONFIGS)
    assert {v.dtype for v in VARIANTS} == set(DTYPES)
    assert {(v.output, v.algorithm) for v in VARIANTS} >= {
        *(("softmax", algorithm) for algorithm in ALGORITHMS),
        ("log_softmax", "online"),
        ("logsumexp", "online"),
    }
    shipped = {source for source, _ in softmax_config.variants()}
    assert shipped == {"softmax", "softmax_onchip", "softmax_split", "online_softmax_state"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_spills(arch, dtype):
    """Of the variants with the most registers; all of them are looked at ahead of a release, which takes minutes."""
    for source, constants in softmax_config.variants():
        widest = constants["NUM_THREADS"] in (256, 512) and not constants["LANES_SPAN_ROWS"]
        if (
            constants["Element"] == ELEMENT_TYPES[dtype.name]
            and widest
            and not constants["VECTORIZED"]
            and constants.get("OUTPUT", 0) == softmax_config.OUTPUTS["softmax"]
            and constants.get("ALGORITHM", 2) == softmax_config.ALGORITHMS["online"]
        ):
            binary = kernel_compiler.build(source, constants, arch=arch, kind="cubin")
            for entry, used in binary.resources.items():
                assert used.spill_stores == used.spill_loads == used.stack_bytes == 0, (source, entry, used)


@examples(25)
@given(data=st.data())
def test_any_rank_axis_and_strides(executor, data):
    """Through the public function: its own choice of kernels, every way that axes can lie in memory."""
    ndim = data.draw(st.integers(1, 6))
    shape = tuple(data.draw(st.sampled_from((1, 2, 3, 5, 9))) for _ in range(ndim))
    axis = data.draw(st.integers(-ndim, ndim - 1))
    layout = Layout(
        order=tuple(data.draw(st.permutations(range(ndim)))),
        pad=tuple(data.draw(st.sampled_from((0, 1, 4))) for _ in range(ndim)),
        offset=data.draw(st.sampled_from((0, 1))),
    )
    values = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal(shape).astype(np.float32)
    x = executor.array(place(values, layout))
    for dim in range(ndim):
        if data.draw(st.booleans()):
            flip = (slice(None),) * dim + (slice(None, None, -1),)
            x, values = x[flip], values[flip]
    guarded = executor.guarded(shape, np.float32, layout)
    cuattn.softmax(x, axis=axis, out=guarded.array)
    guarded.check()
    assert_softmax_close(executor.numpy(guarded.array), values, axis)
    lse = cuattn.logsumexp(x, axis=axis, keepdims=data.draw(st.booleans()))
    assert_softmax_close(executor.numpy(lse).reshape(np.delete(shape, axis)), values, axis, "logsumexp")


def test_broadcast_input(executor):
    """Stride 0 in rows and in columns."""
    row = np.arange(5, dtype=np.float32)
    x = np.broadcast_to(row[:, None, None], (5, 3, 4))
    for axis in range(3):
        result = cuattn.softmax(executor.xp.broadcast_to(executor.array(row)[:, None, None], (5, 3, 4)), axis=axis)
        assert_softmax_close(executor.numpy(result), x, axis)


@pytest.mark.parametrize("num_cols", [32 * 1024, 40_004])
def test_long_rows_take_several_ctas(executor, num_cols):
    assert softmax_config.select(num_rows=2, num_cols=num_cols, itemsize=4).path == "split"
    x = np.random.default_rng(0).standard_normal((2, num_cols)).astype(np.float32) * 5
    assert_softmax_close(executor.numpy(cuattn.softmax(executor.array(x))), x)


@examples(20)
@given(data=st.data())
def test_select_is_legal(data):
    """Whatever is chosen fits the row, and a grid."""
    num_rows = data.draw(st.one_of(st.integers(1, 300), st.integers(1, 2**40)))
    num_cols = data.draw(st.one_of(st.sampled_from(AWKWARD_SEQLENS), st.integers(1, 2**31 - 1)))
    itemsize = data.draw(st.sampled_from((2, 4, 8)))
    lanes = data.draw(st.booleans())
    algorithm = data.draw(st.sampled_from(ALGORITHMS))
    config = softmax_config.select(
        num_rows=num_rows, num_cols=num_cols, itemsize=itemsize, algorithm=algorithm, lanes_span_rows=lanes
    )
    assert config.lanes_span_rows == lanes
    assert config.path != "onchip" or (num_cols <= config.max_cols(itemsize) and algorithm == "online")
    if config.path == "split":
        chunk_cols = config.chunk_cols(num_cols)
        assert chunk_cols % 16 == 0
        assert 1 <= -(-num_cols // chunk_cols) <= softmax_config.MAX_CHUNKS
    if num_cols >= 1_000_000:
        assert config.path == "split"


# --- what a softmax is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@examples(6)
@given(num_cols=st.sampled_from((4, 32, 36, 100, 256, 1000)), seed=st.integers(0, 99))
def test_rows_sum_to_one(executor, algorithm, num_cols, seed):
    x = np.random.default_rng(seed).standard_normal((4, num_cols)).astype(np.float32)
    p = executor.numpy(cuattn.softmax(executor.array(x), algorithm=algorithm)).astype(np.float64)
    np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=0, atol=2**-24 * (2 + num_cols))
    assert (p >= 0).all()


@pytest.mark.parametrize("algorithm", ["safe", "online"])
@examples(6)
@given(shift=st.sampled_from((-1e4, -64.0, 1.0, 1000.0, 3e5)), seed=st.integers(0, 99))
def test_shift_invariance_is_exact(executor, algorithm, shift, seed):
    """Of integers, on which the shift and the subtraction of the maximum are exact: the same bits."""
    x = np.random.default_rng(seed).integers(-20, 20, (3, 100)).astype(np.float32)
    plain, shifted = (cuattn.softmax(executor.array(v), algorithm=algorithm) for v in (x, x + np.float32(shift)))
    np.testing.assert_array_equal(executor.numpy(plain), executor.numpy(shifted))


@pytest.mark.parametrize("num_cols", [1, 3, 32, 128, 1000])
@pytest.mark.parametrize("value", [0.0, -3.5e38, 3.4e38, 1e-45, 88.0])
def test_constant_rows_are_uniform(executor, value, num_cols):
    x = np.full((2, num_cols), np.clip(value, -3.4e38, 3.4e38), np.float32)
    p = executor.numpy(cuattn.softmax(executor.array(x)))
    np.testing.assert_array_equal(p, np.float32(1) / np.float32(num_cols))


def test_naive_overflows_where_the_others_do_not(executor):
    x = np.array([[100.0, 0.0, 100.0, -1.0]], np.float32)
    naive, safe, online = (
        executor.numpy(cuattn.softmax(executor.array(x), algorithm=algorithm)) for algorithm in ALGORITHMS
    )
    np.testing.assert_array_equal(naive, [[np.nan, 0, np.nan, 0]])
    assert_softmax_close(safe, x)
    assert_softmax_close(online, x)
    assert executor.numpy(cuattn.logsumexp(executor.array(x), algorithm="naive")) == np.inf


def test_naive_underflows_where_the_others_do_not(executor):
    """Every e^x is 0: the row looks empty, and is treated as such; never 0 / 0."""
    x = np.full((1, 4), -200, np.float32)
    assert (executor.numpy(cuattn.softmax(executor.array(x), algorithm="naive")) == 0).all()
    for function in (cuattn.log_softmax, cuattn.logsumexp):
        assert (executor.numpy(function(executor.array(x), algorithm="naive")) == -np.inf).all()
    assert_softmax_close(executor.numpy(cuattn.softmax(executor.array(x), algorithm="safe")), x)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_infinities(executor, algorithm):
    x = np.full((4, 4), -np.inf, np.float32)
    x[1, 1] = 0
    x[2], x[3] = [0, np.inf, 1, 2], [0, np.nan, 1, 2]
    p = executor.numpy(cuattn.softmax(executor.array(x), algorithm=algorithm))
    nan = np.nan
    plus = [0, nan, 0, 0] if algorithm == "naive" else [nan] * 4
    np.testing.assert_array_equal(p, [[0] * 4, [0, 1, 0, 0], plus, [nan] * 4])
    if algorithm == "safe":  # the same states as online
        return
    lse = executor.numpy(cuattn.logsumexp(executor.array(x), algorithm=algorithm))
    np.testing.assert_array_equal(lse, [-np.inf, 0, np.inf if algorithm == "naive" else nan, nan])
    log_p = executor.numpy(cuattn.log_softmax(executor.array(x[:2]), algorithm=algorithm))
    np.testing.assert_array_equal(log_p, [[-np.inf] * 4, [-np.inf, 0, -np.inf, -np.inf]])


def test_tiny_probabilities_keep_their_precision(executor):
    """Down to the smallest normal number, and below it: no flushing, no |x| ulp of error."""
    x = np.array([0.0, -1.0, -50.0, -80.0, -87.0, -90.0, -95.0, -100.0], np.float32)
    p = executor.numpy(cuattn.softmax(executor.array(x))).astype(np.float64)
    expected = cuattn.reference.softmax(x)
    assert (np.abs(p - expected) <= 4 * np.spacing(expected.astype(np.float32))).all()


# --- known defects of public material --------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_running_maximum_over_many_tiles(executor, algorithm):
    """Defect 1: the maximum of one block instead of the running one, and e^(+max) where a whole tile is masked."""
    x = np.random.default_rng(1).standard_normal((4, 1024)).astype(np.float32)
    x[0] = np.linspace(-60, 60, 1024)  # a new maximum in every tile
    x[1] = x[0, ::-1]  # never again
    x[2, :512] = -np.inf
    x[3, 256:] = -np.inf
    p = executor.numpy(cuattn.softmax(executor.array(x), algorithm=algorithm))
    assert np.isfinite(p).all()
    assert_softmax_close(p, x)


@pytest.mark.parametrize("config_name", ["onchip_128", "onchip_512", "stream", "split"])
def test_every_warp_is_summed(executor, config_name):
    """Defect 2: a reduction over warp 0 alone. One CTA-wide tile of equal elements, each counted once."""
    config = CONFIGS[config_name]
    num_cols = config.threads_per_row * 4
    for position in (0, 127, num_cols - 1):  # ... and the maximum found in whatever warp it lies
        x = np.zeros((1, num_cols), np.float32)
        x[0, position] = 30
        lse = executor.numpy(kernels.logsumexp(executor.array(x), config=config))
        assert_softmax_close(lse, x, -1, "logsumexp")
        lse = executor.numpy(kernels.logsumexp(executor.array(x * 0), config=config))
        np.testing.assert_allclose(lse, np.log(num_cols), rtol=2**-22)


# --- determinism -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 700), (2, 40_004)])
def test_same_bits_every_time(executor, shape):
    x = executor.array(np.random.default_rng(2).standard_normal(shape).astype(np.float32))
    first = executor.numpy(cuattn.softmax(x))
    for seed in range(2):
        with executor.active(asynchrony="random" if executor.name == "host" else "late", seed=seed):
            np.testing.assert_array_equal(executor.numpy(cuattn.softmax(x)), first)


def test_bfloat16_by_name(executor):
    x = np.zeros((2, 129), ml_dtypes.bfloat16)
    assert executor.numpy(cuattn.log_softmax(executor.array(x))).dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("config", [SPLIT, SPLIT_LANES], ids=["columns", "rows"])
def test_more_chunks_than_threads_of_a_row(executor, config):
    """Every thread merges the states of several chunks."""
    config = replace(config, min_chunk_cols=16)
    num_chunks = 3 * config.threads_per_row + 1
    lanes = config.lanes_span_rows
    shape = (16 * num_chunks, 9) if lanes else (2, 16 * num_chunks)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 4
    axis = 0 if lanes else 1
    out = kernels.softmax(executor.array(x), axis=axis, config=config)
    assert_softmax_close(executor.numpy(out), x, axis)

"""The decode kernels, on tensor cores and on CUDA cores: every path of each in few variants.

The smallest head dims, which compile quickly, and for each form the same problems: a few tokens in splits, a packed
batch with windows, every option at once, a prompt, and rows at any address.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cached_calls import assert_right

import cuattn
from cuattn.testing.arrays import Layout
from cuattn.testing.decode_problems import cached_problem
from cuattn.testing.options import make_sinks, make_slopes

F16, BF16, F32, F64 = map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
LENGTHS = (130, 2, 0, 65, 64)


def rng_of(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("num_splits", (1, 3, None))
@pytest.mark.parametrize("heads", ((6, 2), (16, 2), (17, 1)), ids=str)
def test_tokens_in_splits(executor, form, heads, num_splits):
    problem = cached_problem(
        rng_of(), lengths=LENGTHS, seqlens_q=2, heads=heads, page_size=16, sinks=make_sinks(rng_of(1), heads[0]), **form
    )
    assert_right(executor, problem, num_splits=num_splits)


@pytest.mark.parametrize("window", [(30, 2), (0, 0), (70, None)], ids=str)
def test_windows_of_packed_queries(executor, form, window):
    problem = cached_problem(
        rng_of(2), lengths=[130, 40, 7, 0, 66], seqlens_q=[7, 1, 0, 2, 3], heads=(6, 2), page_size=16, window=window,
        causal=False, **form,
    )  # fmt: skip
    for num_splits in (1, 4):
        assert_right(executor, problem, num_splits=num_splits)


@pytest.mark.parametrize("scale", (0.4, -0.3, 0.0))
def test_everything(executor, form, scale):
    rng = rng_of(3)
    problem = cached_problem(
        rng, lengths=LENGTHS, seqlens_q=3, heads=(6, 2), page_size=3, window=(50, 1), softcap=3.0, scale=scale,
        alibi_slopes=make_slopes(rng, (5, 6)), sinks=make_sinks(rng, 6), rope=cuattn.Rotary(rotary_dim=16),
        rotate_keys=True, **form,
    )  # fmt: skip
    for num_splits in (1, 3):
        assert_right(executor, problem, num_splits=num_splits)


@pytest.mark.parametrize("scale", (-0.5, 0.0))
def test_scales_alone(executor, form, scale):
    """Without other options the scale is multiplied with what is masked too: it must not make NaN of -inf."""
    problem = cached_problem(rng_of(11), lengths=LENGTHS, seqlens_q=3, heads=(4, 2), page_size=16, scale=scale, **form)
    assert_right(executor, problem, num_splits=2)


def test_a_prompt(executor, form):
    """Blocks that are full of rows, and blocks whose rows are not all there."""
    problem = cached_problem(rng_of(4), lengths=(130, 75), seqlens_q=35, heads=(4, 2), page_size=16, **form)
    for num_splits in (1, 2):
        assert_right(executor, problem, num_splits=num_splits)


def test_rows_at_any_address(executor, form):
    """Head dims that end within 16 bytes and pairs, in a contiguous cache that begins at an odd place."""
    layouts = Layout(offset=1), Layout(pad=(0, 1, 0, 2), offset=1), Layout(pad=(1, 0, 1, 0), offset=1)
    form["head_dims"] = (30, 18)
    problem = cached_problem(rng_of(5), lengths=LENGTHS, seqlens_q=2, heads=(6, 2), layouts=layouts, **form)
    for num_splits in (1, 3):
        assert_right(executor, problem, num_splits=num_splits)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [*((dtype, name) for dtype in (F16, BF16) for name in ("e4m3fn", "e5m2", "int8", "nvfp4", "mxfp4")),
     (F32, "e4m3fn"), (F32, "nvfp4")],
    ids=str,
)  # fmt: skip
def test_formats(executor, dtype, name):
    """Scales of a tensor or of heads, beside those of blocks."""
    problem = cached_problem(
        rng_of(6), lengths=(70, 3), seqlens_q=1, heads=(4, 2), head_dims=(64, 32), dtype=dtype, kv_format=name,
        scales="head", page_size=16,
    )  # fmt: skip
    for num_splits in (1, 2):
        assert_right(executor, problem, num_splits=num_splits)

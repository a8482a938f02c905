"""Every row of the table of backward kernels, at its head dims: right, and the same bits in any order; and every path
of each kernel in few variants.

For the latter, small head dims, which compile quickly, and for each format the same problems: plain, by position,
packed, and with every option at once.
"""

from __future__ import annotations

import numpy as np
import pytest
from backward_calls import (
    after_forward,
    after_reference,
    assert_gradients_right,
    assert_right,
    call_backward,
    same_bits,
)
from backward_formats import BF16, DIM, F16, F32, F64, FORMATS
from test_attention_backward import normal

from cuattn.ops.attention.backward.config import FLASH_BWD_CONFIGS
from cuattn.runtime.executor import executor_for
from cuattn.testing.arrays import Layout
from cuattn.testing.options import make_bias, make_mask, make_slopes

SCHEDULES = (("random", 2), ("eager", 4))


def pairs_of_rows(name):
    """Rows for queries and for keys, of one format: each row in one pair at least."""
    products, dtype, _ = FORMATS[name]
    rows = [row for row in FLASH_BWD_CONFIGS if row.products == products and row.itemsize == dtype.itemsize]
    queries, keys = ([row for row in rows if row.own == own] for own in ("queries", "keys"))
    number = max(len(queries), len(keys))
    return [(queries[min(i, len(queries) - 1)], keys[min(i, len(keys) - 1)]) for i in range(number)]


def seqlens_for(of_queries, of_keys):
    """More than one block that is owned, and more tiles of the other side than stages, of queries and of keys."""
    return (
        max(of_queries.block_own + 3, 2 * of_keys.block_other + 5),
        max(of_keys.block_own + 3, 2 * of_queries.block_other + 5),
    )


def in_any_schedule(executor, saved, expected, **extra):
    for asynchrony, seed in SCHEDULES:
        with executor.active(asynchrony=asynchrony, seed=seed):
            again = call_backward(executor, saved, **extra)
        assert same_bits(again, expected), (asynchrony, seed)


ROWS = [(name, pair) for name in FORMATS for pair in pairs_of_rows(name)]


@pytest.mark.parametrize(("name", "pair"), ROWS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(ROWS)])
def test_every_row(executor, name, pair):
    """Of the largest head dims that it is for: right, and the same bits in any schedule."""
    _, dtype, options = FORMATS[name]
    head_dim = min(row.max_head_dim for row in pair)
    limit = executor_for(q=executor.array(np.zeros(1, dtype))).smem_limit_bytes
    if not all(row.is_legal(head_dim, head_dim, limit) for row in pair):
        pytest.skip("needs more shared memory than there is")
    arrays = normal(dtype, 1, seqlens_for(*pair), (2, 1), (head_dim, head_dim))
    saved = after_reference(*arrays, **options)
    grads = call_backward(executor, saved, configs=pair)
    assert_gradients_right(grads, saved)
    in_any_schedule(executor, saved, grads, configs=pair)


@pytest.mark.parametrize(("dtype", "head_dims"), [(BF16, (96, 65)), (F16, (192, 129))], ids=str)
def test_other_buckets_of_head_dims(executor, dtype, head_dims):
    saved = after_reference(*normal(dtype, 1, (70, 70), (2, 1), head_dims))
    in_any_schedule(executor, saved, assert_right(executor, saved))


@pytest.mark.parametrize("dtype", (F16, BF16, F32, F64, "tf32"), ids=str)
def test_all_options_in_any_schedule(executor, dtype):
    """Also the gradients of a bias that was broadcast, and of the sinks: sums over blocks."""
    rng = np.random.default_rng(1)
    options = {
        "bias": make_bias(rng, (4, 70, 135), F32, "normal"),
        "mask": make_mask(rng, (1, 4, 70, 135), "blocks", 64),
        "alibi_slopes": make_slopes(rng, (4,)),
        "sinks": np.float32([0.0, 1.0, 2.0, 3.0]),
        "softcap": 5.0,
        "window": (50, 50),
        "dropout_p": 0.2,
    }
    if dtype == "tf32":
        dtype, options["precision"] = F32, "tf32"
    saved = after_forward(executor, *normal(dtype, 1, (70, 135), (4, 2), (32, 32)), dlse=True, **options)
    expected = assert_right(executor, saved, return_dbias=True)
    in_any_schedule(executor, saved, expected, return_dbias=True)


def test_all_options_at_the_largest_head_dims(executor):
    rng = np.random.default_rng(0)
    options = {
        "causal": True,
        "window": (60, None),
        "diagonal_offset": np.int32([35]),
        "softcap": 4.0,
        "bias": make_bias(rng, (2, 40, 70), F32, "infinities"),
        "mask": make_mask(rng, (40, 70), "blocks", 16),
        "alibi_slopes": make_slopes(rng, (2,)),
        "sinks": np.float32([0, 1]),
        "dropout_p": 0.2,
    }
    saved = after_forward(executor, *normal(F16, 1, (40, 70), (2, 1), (256, 256)), dlse=True, **options)
    assert_right(executor, saved)


LENGTHS = np.int32([0, 70, 70, 103]), np.int32([0, 90, 95, 159])


@pytest.mark.parametrize(
    ("seqlens", "options"),
    [
        ((70, 100), {}),
        ((130, 40), {}),
        ((150, 90), {"window": (20, 30)}),
        ((90, 150), {"window": (20, 30)}),
        ((150, 40), {"causal": True}),  # the first queries see nothing
        ((70, 100), {"causal": "top_left"}),  # the last keys are seen by nobody
        ((64, 64), {"window": (0, 0)}),
        ((65, 129), {"diagonal_offset": np.int32([-30, 100]), "causal": True}),
    ],
    ids=str,
)
def test_positions(executor, format_, seqlens, options):
    dtype, more = format_
    saved = after_forward(executor, *normal(dtype, 2, seqlens, (4, 2), DIM), dlse=True, **options, **more)
    assert_right(executor, saved)


@pytest.mark.parametrize(
    ("name", "head_dims"),
    [*((name, (30, 21)) for name in FORMATS), *(("float16", dims) for dims in ((32, 64), (64, 32))),
     ("tf32", (64, 32)), ("float32", (32, 64))],
    ids=str,
)  # fmt: skip
def test_head_dims(executor, name, head_dims):
    _, dtype, more = FORMATS[name]
    saved = after_forward(executor, *normal(dtype, 2, (40, 70), (2, 1), head_dims), dlse=True, **more)
    assert_right(executor, saved)


def test_float64(executor):
    saved = after_forward(executor, *normal(F64, 2, (40, 70), (2, 1), DIM), dlse=True, window=(30, 20))
    assert_right(executor, saved)


def test_gradients_of_k_and_v_in_two_launches(executor):
    assert_right(executor, after_forward(executor, *normal(F16, 1, (40, 70), (2, 1), (256, 200)), causal=True))


def test_nothing_but_the_gradients_is_written(executor, format_):
    """Where they lie in other strides than q, k and v."""
    dtype, more = format_
    saved = after_forward(executor, *normal(dtype, 2, (70, 45), (4, 2), (32, 24)), **more)
    layout = Layout(order=(0, 2, 1, 3), pad=(0, 3, 1, 8))
    targets = {
        name: executor.guarded(x.shape, dtype, layout)
        for name, x in zip(("dq", "dk", "dv"), saved.arrays[1:4], strict=True)
    }
    grads = call_backward(executor, saved, **{name: target.array for name, target in targets.items()})
    assert_gradients_right(grads, saved)
    for target in targets.values():
        target.check()


def every_option(dtype, rng, shape):
    """Options of every kind; of the tiles of the mask some are hidden, some open, some mixed."""
    batch, heads = shape[:2]
    real = F64 if dtype == F64 else F32
    return {
        "mask": make_mask(rng, shape, "blocks", 32),
        "alibi_slopes": make_slopes(rng, (batch, heads)).astype(real),
        "sinks": np.array([0.0, -np.inf, 2.0, 3.0][:heads], real),
        "softcap": 3.0,
        "window": (90, 80),
        "dropout_p": 0.2,
        "dropout_seed": 5,
    }


@pytest.mark.parametrize(
    "bias_shape",
    [(2, 4, 100, 150), (4, 1, 150), (2, 1, 100, 1), (2, 4, 1, 1), (1, 1, 100, 150), (1,)],
    ids=str,
)
def test_everything(executor, format_, bias_shape):
    dtype, more = format_
    rng = np.random.default_rng(3)
    options = every_option(dtype, rng, (2, 4, 100, 150)) | {"bias": make_bias(rng, bias_shape, F32, "normal")}
    saved = after_forward(executor, *normal(dtype, 2, (100, 150), (4, 2), DIM), dlse=True, **options, **more)
    assert_right(executor, saved, return_dbias=True)


@pytest.mark.parametrize("bias_shape", [(4, 1, 90), (3, 1, 70, 90), (1, 1)], ids=str)
def test_everything_packed(executor, format_, bias_shape):
    dtype, more = format_
    rng = np.random.default_rng(4)
    options = every_option(dtype, rng, (3, 4, 70, 90)) | {"bias": make_bias(rng, bias_shape, F32, "normal")}
    q, k, v = (x[0] for x in normal(dtype, 1, (103, 159), (4, 2), DIM))
    saved = after_forward(executor, q, k, v, *LENGTHS, dlse=True, max_seqlen_q=70, max_seqlen_k=90, **options, **more)
    assert_right(executor, saved, return_dbias=True)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_packed(executor, format_, on_device):
    dtype, more = format_
    q, k, v = (x[0] for x in normal(dtype, 1, (103, 159), (4, 2), DIM))
    saved = after_forward(executor, q, k, v, *LENGTHS, dlse=True, causal=True, **more)
    assert_right(executor, saved, schedule_on_device=on_device)


@pytest.mark.parametrize("kind", ["mask", "dropout", "bias", "softcap", "alibi"])
def test_one_option(executor, format_, kind):
    dtype, more = format_
    rng = np.random.default_rng(5)
    options = {
        "mask": {"mask": make_mask(rng, (2, 4, 140, 150), "blocks", 32)},
        "dropout": {"dropout_p": 0.4, "dropout_seed": 9, "dropout_offset": 3},
        "bias": {"bias": make_bias(rng, (2, 4, 140, 150), F32, "infinities")},
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": make_slopes(rng, (4,))},
    }[kind]
    saved = after_forward(executor, *normal(dtype, 2, (140, 150), (4, 2), DIM), **options, **more)
    assert_right(executor, saved)

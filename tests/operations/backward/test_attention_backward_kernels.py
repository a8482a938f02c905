"""Every row of the table of backward kernels, at its head dims: right, and the same bits in any order."""

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
from test_attention_backward import BF16, F16, F32, F64, normal

from cuattn.ops.attention.backward.config import FLASH_BWD_CONFIGS
from cuattn.runtime.executor import executor_for
from cuattn.testing.options import make_bias, make_mask, make_slopes

SCHEDULES = (("random", 2), ("eager", 4))
FORMATS = {"float16": ("mma", F16, {}), "tf32": ("mma", F32, {"precision": "tf32"}), "float32": ("fma", F32, {}),
           "float64": ("fma", F64, {})}  # fmt: skip


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

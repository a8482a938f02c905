"""Defects found in public attention code, each as a regression test; the numbers are those of the contract."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import cuattn
from cuattn.compat import flash_attn, scaled_dot_product_attention
from cuattn.errors import ArgumentError
from cuattn.head_dims import HEAD_DIM_BUCKETS
from cuattn.testing import assert_attention_close, assert_paged_close, assert_softmax_close, assert_varlen_close
from cuattn.testing.arrays import Layout, place

DTYPES = [np.dtype(dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)]


def normal(*shape, dtype=np.float16, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def poisoned(x):
    """``x`` with NaN before it, behind it and behind each of its rows."""
    return place(x, Layout(pad=(0,) * (x.ndim - 1) + (8,))).array


# --- 1. A "running max" that is only the block's max, or e^(+max) on fully masked tiles ------------------------------

# Logits of a few hundred, so that every rescaling with a maximum of another block overflows or vanishes.
TREND = np.concatenate([np.linspace(-300, 300, 512), np.linspace(300, -300, 512)])
HIDDEN_TILES = (
    {},
    {"causal": True},
    {"causal": "top_left", "diagonal_offset": -700},
    {"window": (40, 0)},
    {"window": (10, 5), "diagonal_offset": 700},
    {"mask": "blocks"},
)


def test_1_running_max_of_a_row(executor):
    rows = np.stack([TREND, -TREND, TREND * 0, np.where(np.arange(1024) < 640, -np.inf, TREND)]).astype(np.float32)
    for algorithm in ("safe", "online"):
        result = executor.numpy(cuattn.softmax(executor.array(rows), algorithm=algorithm))
        assert np.isfinite(result).all()
        assert_softmax_close(result, rows)
    state = cuattn.OnlineSoftmax((4,), np.float32)
    for start in range(0, 1024, 64):
        state.update(executor.array(rows[:, start : start + 64]))
    assert_softmax_close(executor.numpy(state.logsumexp()), rows, kind="logsumexp")
    assert_softmax_close(executor.numpy(state.probabilities(executor.array(rows))), rows)


@pytest.mark.parametrize("options", HIDDEN_TILES, ids=str)
@pytest.mark.parametrize("dtype", (np.float16, np.float32))
def test_1_running_max_of_attention(executor, dtype, options):
    """1024 keys whose logits rise and fall over the tiles, and tiles that are hidden, for some rows all of them."""
    q, k, v = (normal(1, 1024, 1, 32, dtype=dtype, seed=seed) for seed in range(3))
    q[..., 0], k[0, :, 0, 0] = 8, TREND / 8
    options = dict(options)
    given = dict(options)
    if "mask" in options:
        options["mask"] = (np.arange(1024)[None, :] // 64 + np.arange(1024)[:, None] // 64) % 3 == 0
        options["mask"][100:200] = False
        given["mask"] = executor.array(options["mask"])
    out, lse = cuattn.attention(*map(executor.array, (q, k, v)), scale=1.0, return_lse=True, **given)
    out, lse = executor.numpy(out), executor.numpy(lse)
    assert np.isfinite(out).all()
    assert not np.isnan(lse).any()
    assert_attention_close(out, q, k, v, lse=lse, scale=1.0, **options)


# --- 2. A reduction over warp 0 alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen_q", (1, 128))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_2_every_token_of_a_context_of_128_is_summed(executor, dtype, seqlen_q):
    """Equal logits and one-hot values: the output is the weight of each token, 1/128, exactly."""
    q, k = np.zeros((1, seqlen_q, 2, 128), dtype), normal(1, 128, 2, 128, dtype=dtype)
    v = np.broadcast_to(np.eye(128).astype(dtype)[None, :, None], (1, 128, 2, 128))
    out, lse = cuattn.attention(*map(executor.array, (q, k, np.ascontiguousarray(v))), return_lse=True)
    assert (executor.numpy(out) == np.full(out.shape, 1 / 128, dtype)).all()
    np.testing.assert_allclose(executor.numpy(lse), np.log(128), rtol=1e-6)


@pytest.mark.parametrize("num_splits", (1, 2, 5))
@pytest.mark.parametrize("page_size", (None, 16))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_2_every_token_of_a_cache_of_128_is_summed(executor, dtype, page_size, num_splits):
    """As above for one query token: 128 keys of 128 numbers, each key's weight is one of the results."""
    q = np.zeros((1, 1, 2, 128), dtype)
    k, v = normal(1, 128, 2, 128, dtype=dtype), np.eye(128).astype(dtype)[None, :, None].repeat(2, axis=2)
    options = {"num_splits": num_splits, "return_lse": True}
    if page_size is None:
        out, lse = cuattn.decode_attention(*map(executor.array, (q, k, v)), [128], **options)
    else:
        pages = [executor.array(x.reshape(128 // page_size, page_size, 2, 128)) for x in (k, v)]
        table = np.arange(128 // page_size).reshape(1, -1)
        out, lse = cuattn.paged_attention(executor.array(q), *pages, table, [128], **options)
    # Powers of two are exact but for the logarithms of parts, which several splits are weighed by.
    np.testing.assert_allclose(executor.numpy(out).astype(np.float64), 1 / 128, rtol=0 if num_splits == 1 else 1e-2)
    np.testing.assert_allclose(executor.numpy(lse), np.log(128), rtol=1e-6)


@pytest.mark.parametrize("num_cols", (128, 1024, 5000))
def test_2_every_element_of_a_row_is_summed(executor, num_cols):
    x = np.zeros((3, num_cols), np.float32)
    np.testing.assert_allclose(executor.numpy(cuattn.logsumexp(executor.array(x))), np.log(num_cols), rtol=1e-6)
    np.testing.assert_allclose(executor.numpy(cuattn.softmax(executor.array(x))), 1 / num_cols, rtol=1e-6)


# --- 3. `if sum_exp > 0` on an array ----------------------------------------------------------------------------------


def test_3_online_softmax_of_a_batch_with_two_updates(executor):
    """Rows in every state at the second update: nothing seen, only -inf, and something."""
    first = normal(4, 5, dtype=np.float32)
    first[1] = -np.inf
    second = normal(4, 7, dtype=np.float32, seed=1)
    second[2] = -np.inf
    first[3] = second[3] = -np.inf
    state = cuattn.OnlineSoftmax((4,), np.float32)
    state.update(executor.array(first))
    state.update(executor.array(second))
    rows = np.concatenate([first, second], axis=1)
    assert_softmax_close(executor.numpy(state.logsumexp()), rows, kind="logsumexp")
    assert_softmax_close(executor.numpy(state.probabilities(executor.array(rows))), rows)


# --- 4. K shorter than Q under causal masks; N = 1; M = 1; empty sequences --------------------------------------------


@pytest.mark.parametrize("causal", (True, "top_left"))
@pytest.mark.parametrize(
    "seqlens", ((70, 3), (300, 100), (65, 64), (1, 1), (1, 200), (200, 1), (5, 0), (0, 5)), ids=str
)
def test_4_short_keys_and_single_tokens(executor, seqlens, causal):
    seqlen_q, seqlen_k = seqlens
    q = normal(2, seqlen_q, 2, 40)
    k, v = (normal(2, seqlen_k, 1, 40, seed=seed) for seed in (1, 2))
    arrays = [executor.array(poisoned(x)) for x in (q, k, v)]
    out, lse = cuattn.attention(*arrays, causal=causal, return_lse=True)
    out, lse = executor.numpy(out), executor.numpy(lse)
    assert not np.isnan(out).any() and not np.isnan(lse).any()
    assert_attention_close(out, q, k, v, lse=lse, causal=causal)
    if causal is True and seqlen_q > seqlen_k:  # the first queries see nothing
        assert not out[:, : seqlen_q - seqlen_k].any()
        assert (lse[:, :, : seqlen_q - seqlen_k] == -np.inf).all()


@pytest.mark.parametrize("causal", (False, True))
def test_4_empty_sequences_among_others(executor, causal):
    """Empty queries, empty keys, both; a single token; keys shorter than queries."""
    lengths_q, lengths_k = (0, 1, 70, 0, 5, 9, 0), (3, 1, 20, 0, 0, 130, 0)
    cu_seqlens = [np.cumsum([0, *lengths]).astype(np.int32) for lengths in (lengths_q, lengths_k)]
    q = normal(sum(lengths_q), 2, 40)
    k, v = (normal(sum(lengths_k), 1, 40, seed=seed) for seed in (1, 2))
    arrays = [executor.array(poisoned(x)) for x in (q, k, v)]
    out, lse = cuattn.attention_varlen(*arrays, *map(executor.array, cu_seqlens), causal=causal, return_lse=True)
    out, lse = executor.numpy(out), executor.numpy(lse)
    assert not np.isnan(out).any() and not np.isnan(lse).any()
    assert_varlen_close(out, q, k, v, *cu_seqlens, lse=lse, causal=causal)


# --- 5. A head dim of 72 or 96 that is silently wrong or out of bounds ------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", (72, 96))
def test_5_head_dims_between_the_usual_ones(executor, head_dim, dtype):
    q, k, v = (normal(1, 67, 1, head_dim, dtype=dtype, seed=seed) for seed in range(3))
    out = cuattn.attention(*(executor.array(poisoned(x)) for x in (q, k, v)), causal=True)
    assert_attention_close(executor.numpy(out), q, k, v, causal=True)


#: Every remainder of 8 in every bucket, and both sides of each of its edges.
EDGES = (size + side for size in HEAD_DIM_BUCKETS[:-1] for side in (-1, 0, 1))
EVERY_THIRD = sorted({*range(2, 513, 3), *EDGES, 1, 512})


@pytest.mark.slow
def test_5_every_head_dim(executor):
    for head_dim in EVERY_THIRD:
        q, k, v = (normal(1, 3, 1, head_dim, seed=seed) for seed in range(3))
        out = cuattn.attention(*(executor.array(poisoned(x)) for x in (q, k, v)))
        assert_attention_close(executor.numpy(out), q, k, v)


# --- 6. A last page with more slots than a page has, or a block table with a tail of garbage --------------------------


@pytest.mark.parametrize("last_page_len", (-1, 0, 5, 2**31 - 1))
def test_6_a_last_page_longer_than_a_page_is_an_error(last_page_len):
    """Two pages of 4 slots; a sequence with pages has 1 to 4 keys on the last."""
    with pytest.raises(ArgumentError, match="last_page_len"):
        cuattn.block_tables_from_csr([0, 2], [0, 1], [last_page_len], 4)
    _, seqlens_k = cuattn.block_tables_from_csr([0, 2], [0, 1], [4], 4)
    assert seqlens_k.tolist() == [8]


@pytest.mark.parametrize("tail", (-1, 2**31 - 1, -(2**31), 3, 0), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_6_a_tail_of_garbage_is_never_read(executor, dtype, tail):
    """5 keys on pages of 2 slots: the table's fourth entry and the sixth slot are nobody's."""
    q, k, v = normal(1, 1, 2, 32, dtype=dtype), normal(4, 2, 1, 32, dtype=dtype), normal(4, 2, 1, 32, dtype=dtype)
    k[[1, 3]], v[[1, 3]] = np.nan, np.nan  # slot 5 is the second of page 1; page 3 is in no table
    k[1, 0], v[1, 0] = 1, 2
    tables = np.int32([[2, 0, 1, tail, tail]])
    arrays = [executor.array(x) for x in (q, k, v)]
    out, lse = cuattn.paged_attention(*arrays, tables, [5], return_lse=True)
    assert_paged_close(executor.numpy(out), q, k, v, tables, [5], lse=executor.numpy(lse))


@pytest.mark.parametrize("page", (-1, 4, 2**31 - 1))
def test_6_garbage_among_the_used_pages_is_an_error(executor, page):
    q, pages = normal(1, 1, 2, 32), normal(4, 2, 1, 32)
    arrays = [executor.array(x) for x in (q, pages, pages)]
    with pytest.raises(ArgumentError, match=r"block_tables\[0, 2\]"):
        cuattn.paged_attention(*arrays, np.int64([[2, 0, page, 1]]), [5])
    with pytest.raises(ArgumentError, match=r"seqlens_k\[0\]"):
        cuattn.paged_attention(*arrays, np.int32([[2, 0, 1, 1]]), [9])


# --- 7. lse in base 2 in one place and base e in another --------------------------------------------------------------

PACKED = np.array([0, 4], np.int32)
LSE_OF_SEVEN_KEYS = {
    "attention": lambda x, q, k: cuattn.attention(q, k, k, return_lse=True)[1],
    "attention, with options": lambda x, q, k: cuattn.attention(q, k, k, softcap=3.0, return_lse=True)[1],
    "standard_attention": lambda x, q, k: cuattn.standard_attention(q, k, k, return_lse=True)[1],
    "attention_varlen": lambda x, q, k: cuattn.attention_varlen(
        q[0], k[0], k[0], x(PACKED), x(np.array([0, 7], np.int32)), return_lse=True
    )[1],
    "flash_attn_func": lambda x, q, k: flash_attn.flash_attn_func(q, k, k, return_attn_probs=True)[1],
    "merge_states": lambda x, q, k: cuattn.merge_states(
        *cuattn.attention(q, k[:, :3], k[:, :3], return_lse=True),
        *cuattn.attention(q, k[:, 3:], k[:, 3:], return_lse=True),
    )[1],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", LSE_OF_SEVEN_KEYS)
def test_7_lse_is_natural_everywhere(executor, function, dtype):
    """Seven keys with logits of 0: ln 7 = 1.946, where log2 7 would be 2.807."""
    q, k = executor.array(np.zeros((1, 4, 2, 32), dtype)), executor.array(np.ones((1, 7, 2, 32), dtype))
    lse = LSE_OF_SEVEN_KEYS[function](executor.array, q, k)
    np.testing.assert_allclose(executor.numpy(lse), np.log(7), rtol=1e-6)


def test_7_lse_of_rows_is_natural(executor):
    x = executor.array(np.zeros((2, 7), np.float32))
    np.testing.assert_allclose(executor.numpy(cuattn.logsumexp(x)), np.log(7), rtol=1e-6)
    np.testing.assert_allclose(executor.numpy(cuattn.log_softmax(x)), -np.log(7), rtol=1e-6)
    state = cuattn.OnlineSoftmax((2,), np.float32)
    state.update(x)
    np.testing.assert_allclose(executor.numpy(state.logsumexp()), np.log(7), rtol=1e-6)


def test_7_a_sink_enters_lse_as_a_natural_logit(executor):
    q, k = executor.array(np.zeros((1, 4, 2, 32), np.float16)), executor.array(np.ones((1, 7, 2, 32), np.float16))
    sinks = executor.array(np.array([0.0, np.log(5.0)], np.float32))
    _, lse = cuattn.attention(q, k, k, sinks=sinks, return_lse=True)
    np.testing.assert_allclose(executor.numpy(lse)[0], np.log([[8.0] * 4, [12.0] * 4]), rtol=1e-6)


# --- 8. Two code paths that order query heads differently under GQA ---------------------------------------------------


def varlen(q, k, v):
    batch = q.shape[0]
    cu_seqlens = [np.arange(batch + 1, dtype=np.int32) * x.shape[1] for x in (q, k)]
    packed = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return cuattn.attention_varlen(*packed, *cu_seqlens).reshape(*q.shape[:3], v.shape[3])


HEAD_ORDERS = {
    "attention": cuattn.attention,
    "attention, with options": lambda q, k, v: cuattn.attention(q, k, v, window=(500, None), softcap=5.0),
    "standard_attention": cuattn.standard_attention,
    "attention_varlen": varlen,
    "flash_attn_func": flash_attn.flash_attn_func,
    "scaled_dot_product_attention": lambda q, k, v: scaled_dot_product_attention(
        *(x.swapaxes(1, 2) for x in (q, k, v)), enable_gqa=True
    ).swapaxes(1, 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen_q", (1, 70))
@pytest.mark.parametrize("function", HEAD_ORDERS)
def test_8_query_head_h_reads_key_head_h_over_group(executor, function, seqlen_q, dtype):
    """Every value of key/value head g is g, so an output says which head it came from."""
    q, k = normal(2, seqlen_q, 6, 32, dtype=dtype), normal(2, 5, 3, 32, dtype=dtype, seed=1)
    v = np.broadcast_to(np.arange(3).astype(dtype)[:, None], (2, 5, 3, 32))
    out = HEAD_ORDERS[function](*(executor.array(np.ascontiguousarray(x)) for x in (q, k, v)))
    expected = np.broadcast_to(np.array([0, 0, 1, 1, 2, 2])[:, None], (2, seqlen_q, 6, 32))
    np.testing.assert_allclose(executor.numpy(out).astype(np.float64), expected, atol=2**-6)


def test_8_options_by_head_follow_the_query_heads(executor):
    """Slopes and sinks of query head h, not of its key/value head or of another order of the heads."""
    q, k, v = normal(1, 9, 6, 32), normal(1, 9, 3, 32, seed=1), normal(1, 9, 3, 32, seed=2)
    options = {"alibi_slopes": np.float32([1, 0, 0.5, 0.25, 2, 0.125]), "sinks": np.float32([-1, 0, 1, 2, 3, 4])}
    given = {name: executor.array(x) for name, x in options.items()}
    out, lse = cuattn.attention(*map(executor.array, (q, k, v)), return_lse=True, **given)
    assert_attention_close(executor.numpy(out), q, k, v, lse=executor.numpy(lse), **options)

"""flash_attn_with_kvcache: what the package's documentation says, entry by entry in plain NumPy."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from cuattn import reference
from cuattn.compat.flash_attn import flash_attn_with_kvcache
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, NotSupportedError, ShapeError

HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM_V, CAPACITY = 4, 2, 8, 5, 12
SEQLENS, ENTRIES = np.array([3, 0, 7], np.int32), np.array([4, 0, 3], np.int32)
TOLERANCE = 1e-5  # float32, logits below 10 and at most 9 keys: 80 units, where the kernels' own tests count roundings
SLOPES = np.array([[0.5, 0.25, 0.1, 0.0], [0.0, 1.0, 0.3, 0.2], [0.7, 0.0, 0.0, 0.4]], np.float32)
ANGLES = np.arange(CAPACITY)[:, None] * np.array([1.0, 0.3, 0.05])
COS, SIN = np.cos(ANGLES).astype(np.float32), np.sin(ANGLES).astype(np.float32)  # six of eight elements


def problem(seqlen_q, seqlen_new, kind="batch", dtype=np.float32, seed=0):
    """q, k, v, both caches with NaN wherever nothing may be read, and the arguments that say where entries are."""
    rng = np.random.default_rng(seed)
    batch, where = len(SEQLENS), {"cache_seqlens": SEQLENS}
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    q = draw(batch, seqlen_q, HEADS, HEAD_DIM)
    k, v = draw(batch, seqlen_new, KV_HEADS, HEAD_DIM), draw(batch, seqlen_new, KV_HEADS, HEAD_DIM_V)
    shape = batch, CAPACITY
    if "pages of" in kind:
        size, rows = int(kind.split()[-1]), 5 if "rows" in kind else batch
        columns = -(-CAPACITY // size)
        order = rng.permutation(rows * columns + 2)[: rows * columns].astype(np.int32).reshape(rows, columns)
        used = np.zeros(rows, int)
        used[ENTRIES if "rows" in kind else slice(None)] = -(-(SEQLENS + seqlen_new) // size)
        order[np.arange(columns) >= used[:, None]] = -7
        where["block_table"], shape = order, (rows * columns + 2, size)
    elif kind in ("entries", "larger"):
        shape = 5, CAPACITY
    if kind == "entries" or "rows" in kind:
        where["cache_batch_idx"] = ENTRIES
    if "padded" in kind:
        where["cache_leftpad"] = np.array([2, 0, 5], np.int32)
    caches = [np.full((*shape, KV_HEADS, dim), np.nan, dtype) for dim in (HEAD_DIM, HEAD_DIM_V)]
    for b, seqlen in enumerate(SEQLENS):
        for j in range(int(where.get("cache_leftpad", SEQLENS * 0)[b]), seqlen):
            for cache in caches:
                cache[entry(where, shape, b, j)] = draw(*cache.shape[2:])
    return q, k, v, *caches, where


def entry(where, shape, b, j):
    """The place in a cache of entry j of sequence b."""
    row = int(where.get("cache_batch_idx", np.arange(len(SEQLENS)))[b])
    return (row, j) if "block_table" not in where else (int(where["block_table"][row, j // shape[1]]), j % shape[1])


def expected(q, k, v, k_cache, v_cache, where, rotary=None, causal=False, window_size=(-1, -1), **options):
    """The caches after the call, and what it returns; float64 but for the entries as they are stored."""
    caches, outs, lses = [k_cache.copy(), v_cache.copy()], [], []
    softcap, slopes = options.pop("softcap", None), options.pop("alibi_slopes", None)
    window = None if window_size == (-1, -1) else tuple(None if side < 0 else side for side in window_size)
    for b, seqlen in enumerate(map(int, where["cache_seqlens"])):
        first = int(where.get("rotary_seqlens", where["cache_seqlens"])[b])
        own_q, new_k = q[b : b + 1].astype(np.float64), k[b : b + 1]
        if rotary is not None:
            steps = np.arange(q.shape[1]) if causal or window is not None else np.zeros(q.shape[1], int)
            own_q = reference.rope(own_q, first + steps, **rotary)
            new_k = reference.rope(new_k, first + np.arange(k.shape[1]), **rotary).astype(k.dtype)
        for i in range(k.shape[1]):
            place = entry(where, k_cache.shape, b, seqlen + i)
            caches[0][place], caches[1][place] = new_k[0, i], v[b, i]
        seen = range(int(where.get("cache_leftpad", SEQLENS * 0)[b]), seqlen + k.shape[1])
        keys, values = (
            np.array([x[entry(where, k_cache.shape, b, j)] for j in seen]).reshape(1, len(seen), *x.shape[2:])
            for x in caches
        )
        own_slopes = slopes if slopes is None or slopes.ndim == 1 else slopes[b : b + 1]
        out, lse = reference.attention(
            own_q, keys, values, causal=causal, window=window, softcap=softcap, alibi_slopes=own_slopes, **options
        )
        outs.append(out[0])
        lses.append(lse[0])
    return *caches, np.stack(outs), np.stack(lses)


def check(executor, arrays, *, rotary=None, scale=None, **options):
    """Call it, and compare the result, the new entries, and all others, which must not have changed by a bit."""
    q, k, v, k_cache, v_cache, where = arrays
    want = expected(q, k, v, k_cache, v_cache, where, rotary, scale=scale, **options)
    on_executor = [executor.array(x.copy()) for x in (k_cache, v_cache)]
    given = [executor.array(x) for x in (k, v)] if k.shape[1] else [None, None]
    tables = []
    if rotary is not None:
        tables = [executor.array(rotary[name]) for name in ("cos", "sin")]
        options["rotary_interleaved"] = rotary["interleaved"]
    if "alibi_slopes" in options:
        options["alibi_slopes"] = executor.array(options["alibi_slopes"])
    options |= {"softmax_scale": scale, "return_softmax_lse": True, **where}
    out, lse = flash_attn_with_kvcache(executor.array(q), *on_executor, *given, *tables, **options)
    for got, wanted in zip(on_executor, want[:2], strict=True):
        np.testing.assert_allclose(executor.numpy(got), wanted, rtol=0 if rotary is None else 1e-6, atol=1e-6)
    np.testing.assert_allclose(executor.numpy(out), want[2], rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(executor.numpy(lse), want[3], rtol=TOLERANCE, atol=TOLERANCE)


KINDS = ("batch", "larger", "entries", "padded", "pages of 4", "pages of 1", "pages of 5")
KINDS += ("rows of pages of 4", "padded pages of 5", "padded rows of pages of 3")


def test_the_signature_is_that_of_the_package():
    parameters = inspect.signature(flash_attn_with_kvcache).parameters
    assert {name: p.default for name, p in parameters.items() if p.default is not p.empty} == {
        **dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad")),
        **{"block_table": None, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0},
        **{"rotary_interleaved": True, "alibi_slopes": None, "num_splits": 0, "return_softmax_lse": False},
    }
    assert list(parameters) == [
        *("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx"),
        *("cache_leftpad", "block_table", "softmax_scale", "causal", "window_size", "softcap", "rotary_interleaved"),
        *("alibi_slopes", "num_splits", "return_softmax_lse"),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seqlen_new", (0, 2), ids=("read", "append"))
def test_where_entries_are(executor, kind, seqlen_new):
    check(executor, problem(2, seqlen_new, kind), causal=True)


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"softcap": 1.5, "scale": 0.4},
        {"window_size": (2, 0)},
        {"window_size": (-1, 1), "causal": True},
        {"alibi_slopes": SLOPES, "causal": True},
        {"alibi_slopes": SLOPES[0]},
        {"causal": True, "window_size": (3, 5)},
    ),
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("seqlen_q", (1, 4))
def test_options(executor, options, seqlen_q):
    """More queries than new entries, and fewer: the last query is aligned with the last key."""
    check(executor, problem(seqlen_q, 2), **options)


@pytest.mark.parametrize("num_splits", (1, 3))
def test_splits(executor, num_splits):
    q, k, v, k_cache, v_cache, where = problem(2, 2)
    whole, parts = (
        flash_attn_with_kvcache(
            *(executor.array(x.copy()) for x in (q, k_cache, v_cache, k, v)), num_splits=number, causal=True, **where
        )
        for number in (0, num_splits)
    )
    np.testing.assert_allclose(executor.numpy(parts), executor.numpy(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interleaved", (True, False), ids=("interleaved", "halves"))
@pytest.mark.parametrize(
    ("options", "seqlen_q", "seqlen_new"),
    (
        ({"causal": True}, 2, 2),
        ({"causal": True}, 1, 2),
        ({"causal": True}, 3, 2),
        ({"window_size": (4, 1)}, 2, 2),
        ({}, 2, 2),
        ({}, 1, 1),
    ),
    ids=str,
)
def test_rotations(executor, options, seqlen_q, seqlen_new, interleaved):
    """Consecutive queries where the mask has a diagonal, else all where the first new entry is."""
    rotary = {"cos": COS, "sin": SIN, "interleaved": interleaved}
    check(executor, problem(seqlen_q, seqlen_new), rotary=rotary, **options)


@pytest.mark.parametrize("kind", ("entries", "padded", "pages of 5", "padded rows of pages of 4"))
def test_rotations_elsewhere(executor, kind):
    check(executor, problem(2, 2, kind), rotary={"cos": COS, "sin": SIN, "interleaved": True}, causal=True)


def test_half_precision(executor):
    """Tables in the dtype of q, as the package has them. The bound: eps of float16 is 1e-3, and three numbers meet."""
    rotary = {"cos": COS.astype(np.float16), "sin": SIN.astype(np.float16), "interleaved": True}
    q, k, v, k_cache, v_cache, where = problem(1, 1, dtype=np.float16)
    want = expected(q, k, v, k_cache, v_cache, where, rotary, causal=True)
    arrays = [executor.array(x) for x in (q, k_cache.copy(), v_cache.copy(), k, v, rotary["cos"], rotary["sin"])]
    out = flash_attn_with_kvcache(*arrays, **where, causal=True)
    np.testing.assert_allclose(executor.numpy(out).astype(np.float64), want[2], rtol=5e-3, atol=5e-3)


def test_without_lengths_the_cache_is_full(executor):
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((2, n, heads, HEAD_DIM)).astype(np.float32) for n, heads in ((1, 4), (6, 2), (6, 2)))
    out = flash_attn_with_kvcache(*map(executor.array, (q, k, v)))
    np.testing.assert_allclose(executor.numpy(out), reference.attention(q, k, v)[0], rtol=1e-5, atol=1e-6)
    out = flash_attn_with_kvcache(*map(executor.array, (q, k, v)), cache_seqlens=4)
    np.testing.assert_allclose(executor.numpy(out), reference.attention(q, k[:, :4], v[:, :4])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ("batch", "entries", "padded", "pages of 4", "padded rows of pages of 4"))
def test_lengths_and_tables_on_the_executor(executor, kind):
    arrays = problem(2, 2, kind)
    q, k, v, k_cache, v_cache, where = arrays
    want = expected(*arrays, causal=True)
    placed = {name: executor.array(x) for name, x in where.items()}
    caches = [executor.array(x.copy()) for x in (k_cache, v_cache)]
    new = [executor.array(x) for x in (k, v)]
    out = flash_attn_with_kvcache(executor.array(q), *caches, *new, causal=True, **placed)
    np.testing.assert_allclose(executor.numpy(out), want[2], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(executor.numpy(caches[1]), want[1])


def test_nothing_to_do(executor):
    q, k, v, k_cache, v_cache, where = problem(0, 0)
    assert flash_attn_with_kvcache(*map(executor.array, (q, k_cache, v_cache, k, v)), **where).shape == (3, 0, 4, 5)
    empty = [executor.array(x[:0]) for x in (q, k_cache, v_cache, k, v)]
    assert flash_attn_with_kvcache(*empty, cache_seqlens=0).shape == (0, 0, 4, 5)


TABLE = np.arange(9, dtype=np.int32).reshape(3, 3)


@pytest.mark.parametrize(
    ("kind", "change", "error", "message"),
    (
        ("batch", {"v": None}, ArgumentError, "k is given alone; give both of k and v"),
        ("batch", {"rotary_cos": COS}, ArgumentError, "rotary_cos is given alone"),
        ("batch", {"k": None, "v": None, "rotary_cos": COS, "rotary_sin": SIN}, ArgumentError, "without k and v"),
        ("batch", {"cache_seqlens": None}, ArgumentError, "k and v are given without cache_seqlens"),
        (
            "batch",
            {"cache_seqlens": [3, 11, 7]},
            ArgumentError,
            r"cache_seqlens\[1\] is 11; 0 to 10 are allowed, for 2",
        ),
        ("batch", {"cache_seqlens": -1}, ArgumentError, r"cache_seqlens\[0\] is -1"),
        ("batch", {"cache_seqlens": [3, 0]}, ShapeError, r"cache_seqlens has shape \[2\]"),
        ("batch", {"cache_seqlens": [3.0, 0.0, 1.0]}, DTypeError, "cache_seqlens has dtype float64"),
        ("entries", {"cache_batch_idx": [0, 5, 1]}, ArgumentError, r"cache_batch_idx\[1\] is 5; 0 to 4 are allowed"),
        ("entries", {"cache_batch_idx": [4, 2, 4], "cache_seqlens": 1}, ArgumentError, "holds slot 49 twice"),
        ("padded", {"cache_leftpad": [2, 3, 5]}, ArgumentError, r"cache_leftpad\[1\] is 3; 0 to 2 are allowed"),
        ("pages of 4", {"block_table": TABLE + 3}, ArgumentError, r"\[2, 2\] is 11, a page that the 9 keys"),
        ("pages of 4", {"block_table": TABLE[:2]}, ShapeError, r"block_table has shape \[2, 3\]"),
        ("pages of 4", {"block_table": TABLE + 3}, ArgumentError, r"block_table\[2, 2\] is 11"),
        ("pages of 4", {"cache_batch_idx": [0, 1, 3]}, ArgumentError, r"cache_batch_idx\[2\] is 3; 0 to 2"),
        ("pages of 4", {"cache_leftpad": [0, 3, 0]}, ArgumentError, r"cache_leftpad\[1\] is 3; 0 to 2"),
        ("pages of 4", {"cache_seqlens": [3, 0, 11]}, ArgumentError, r"is 11; .*; block_table has room for 12"),
        ("batch", {"cache_seqlens": 2**31}, ArgumentError, "cache_seqlens is 2147483648"),
        ("batch", {"num_splits": np.array([1, 2])}, ArgumentError, r"num_splits is an array of shape \[2\]"),
        ("batch", {"num_splits": -1}, ArgumentError, "num_splits is -1"),
        ("batch", {"causal": "top_left"}, ArgumentError, "causal is 'top_left'"),
        ("batch", {"window_size": (1, -2)}, ArgumentError, r"window_size is \(1, -2\)"),
        ("batch", {"return_softmax_lse": 1}, ArgumentError, "return_softmax_lse is 1"),
        (
            "batch",
            {"rotary_cos": COS[:8], "rotary_sin": SIN[:8]},
            ArgumentError,
            "cos and sin hold the positions 0 to 7",
        ),
        ("batch", {"rotary_cos": COS, "rotary_sin": SIN[:, :2]}, ShapeError, "cos is .* and sin"),
        ("batch", {"q": np.zeros((3, 2, 3, 8), np.float32)}, ShapeError, "q has 3 heads"),
        ("batch", {"q": np.zeros((3, 2, 8), np.float32)}, ShapeError, r"q has shape \(3, 2, 8\), rank 3"),
        ("batch", {"q": np.zeros((4, 2, 4, 8), np.float32)}, ShapeError, "and q has batch 4"),
        ("batch", {"v": np.zeros((3, 3, 2, 5), np.float32)}, ShapeError, r"v has shape \(3, 3, 2, 5\)"),
        (
            "batch",
            {"k": np.zeros((3, 2, 2, 8), np.float16), "v": np.zeros((3, 2, 2, 5), np.float16)},
            DTypeError,
            "k has",
        ),
        ("batch", {"k": [[[[1.0]]]]}, ArrayTypeError, "k: builtins.list is no array"),
    ),
)
def test_what_is_refused_has_changed_nothing(kind, change, error, message):
    q, k, v, k_cache, v_cache, where = problem(2, 2, kind)
    caches = k_cache.copy(), v_cache.copy()
    given = {"q": q, "k_cache": caches[0], "v_cache": caches[1], "k": k, "v": v, "causal": True, **where, **change}
    with pytest.raises(error, match=message):
        flash_attn_with_kvcache(**given)
    assert [x.tobytes() for x in caches] == [k_cache.tobytes(), v_cache.tobytes()]


def test_padding_needs_entries_that_follow_one_another():
    q, k, v, k_cache, v_cache, where = problem(2, 2, "padded")
    with pytest.raises(NotSupportedError, match=r"k_cache has strides.*with cache_leftpad its batch entries"):
        flash_attn_with_kvcache(q, np.concatenate([k_cache] * 2, 1)[:, :CAPACITY], v_cache, k, v, **where)


def test_numbers_in_arrays():
    """Lengths, windows and other numbers that a program computes with tensors are arrays of one element there."""
    q, k, v, k_cache, v_cache, _ = problem(2, 2)
    plain = {"cache_seqlens": 3, "window_size": (2, 0), "softcap": 1.5, "softmax_scale": 0.5, "num_splits": 2}
    wrapped = {
        **{"cache_seqlens": np.array(3), "window_size": np.array([2, 0]), "softcap": np.array([1.5], np.float32)},
        **{"softmax_scale": np.array(0.5), "num_splits": np.array(2)},
    }
    filled = [np.nan_to_num(x) for x in (k_cache, v_cache)]
    outs = [flash_attn_with_kvcache(q, *(x.copy() for x in filled), k, v, **each) for each in (plain, wrapped)]
    assert np.array_equal(*outs)

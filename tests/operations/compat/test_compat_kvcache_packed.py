"""flash_attn_with_kvcache of flash-attn 3: packed queries and entries, tables and padding together, 8-bit caches."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from simulated_cupy import ComputingCupy, installed
from test_compat_flash_attn_kvcache import COS, HEAD_DIM, HEADS, KV_HEADS, SEQLENS, SIN, TOLERANCE, problem
from test_compat_flash_attn_kvcache import expected as expected_of_one

from cuattn import reference
from cuattn.compat.flash_attn_interface import flash_attn_with_kvcache
from cuattn.errors import ArgumentError, DTypeError, NotSupportedError, ShapeError
from cuattn.ops.rotary.arguments import turn_words

STARTS_Q, STARTS_NEW = np.array([0, 2, 2, 5], np.int32), np.array([0, 1, 3, 5], np.int32)
PACKED = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k_new": STARTS_NEW}
MOST = 2  # new entries of a sequence
ROTARY = {"cos": COS, "sin": SIN, "interleaved": False}
SINKS = np.array([0.3, -1.0, 0.0, 2.0], np.float32)


def packed(kind):
    """As `problem`, with five queries and five new entries of three sequences, none of them of some."""
    _, _, _, k_cache, v_cache, where = problem(2, MOST, kind)
    rng = np.random.default_rng(9)
    shapes = (STARTS_Q[-1], HEADS, HEAD_DIM), *((STARTS_NEW[-1], KV_HEADS, x.shape[-1]) for x in (k_cache, v_cache))
    return *(rng.standard_normal(shape).astype(np.float32) for shape in shapes), k_cache, v_cache, where


def expected(q, k, v, k_cache, v_cache, where, **options):
    """Sequence by sequence, each with the cache that the one before has left."""
    outs, caches, everything = [], (k_cache, v_cache), dict(where)
    for b in range(len(SEQLENS)):
        own = {name: x[b : b + 1] for name, x in everything.items() if name != "block_table"}
        if "block_table" in everything:
            row = int(own.pop("cache_batch_idx", [b])[0])
            own["block_table"] = everything["block_table"][row : row + 1]
        else:
            own.setdefault("cache_batch_idx", np.array([b]))
        new = [x[None, STARTS_NEW[b] : STARTS_NEW[b + 1]] for x in (k, v)]
        *caches, out, _ = expected_of_one(q[None, STARTS_Q[b] : STARTS_Q[b + 1]], *new, *caches, own, **options)
        outs.append(out[0])
    return *caches, np.concatenate(outs)


def theirs(where):
    return {{"block_table": "page_table"}.get(name, name): x for name, x in where.items()}


@pytest.mark.parametrize(
    ("kind", "rotary", "options"),
    (
        ("entries", None, {"causal": True}),
        ("batch", ROTARY, {"causal": True}),
        ("padded", ROTARY, {"causal": True}),
        ("pages of 4", ROTARY, {}),
        ("padded rows of pages of 3", ROTARY, {"causal": True}),
        ("rows of pages of 1", None, {"softcap": 1.5}),
    ),
    ids=str,
)
@pytest.mark.parametrize("turned_elsewhere", (False, True), ids=("", "rotary_seqlens"))
def test_packed_queries_and_entries(executor, kind, rotary, options, turned_elsewhere):
    *arrays, where = packed(kind)
    if turned_elsewhere:
        where["rotary_seqlens"] = np.array([1, 4, 0], np.int32)
    want = expected(*arrays, where, rotary=rotary, **options)
    q, k, v, *caches = (executor.array(x.copy()) for x in arrays)
    given = options | PACKED | theirs(where) | {"max_seqlen_q": 3}
    if rotary is not None:
        given |= {f"rotary_{name}": executor.array(rotary[name]) for name in ("cos", "sin")}
        given["rotary_interleaved"] = False
    out, lse = flash_attn_with_kvcache(q, *caches, k, v, **given, return_softmax_lse=True, scheduler_metadata=object())
    for got, wanted in zip(caches, want[:2], strict=True):
        np.testing.assert_allclose(executor.numpy(got), wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(executor.numpy(out), want[2], rtol=TOLERANCE, atol=TOLERANCE)
    assert lse.shape == (HEADS, 5)


def test_packed_queries_of_a_full_cache(executor):
    """No new entries, entries of the cache in order, and a sink."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 4, 8), (3, 6, 2, 8), (3, 6, 2, 8)))
    out = flash_attn_with_kvcache(*map(executor.array, (q, k, v)), cu_seqlens_q=STARTS_Q, learnable_sink=SINKS)
    for b in range(3):
        rows = slice(STARTS_Q[b], STARTS_Q[b + 1])
        want = reference.attention(q[None, rows], k[b : b + 1], v[b : b + 1], sinks=SINKS)[0][0]
        np.testing.assert_allclose(executor.numpy(out)[rows], want, rtol=TOLERANCE, atol=TOLERANCE)


def quantized(x):
    return x.astype(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize("descaled", (False, True), ids=("", "descaled"))
@pytest.mark.parametrize("as_bytes", (False, True), ids=("float8", "uint8"))
def test_8_bits(descaled, as_bytes):
    """bfloat16 rounds the result once, to 1 in 2^9, and P before it to the type of q: 2^-7 covers both."""
    rng = np.random.default_rng(6)
    shapes = (3, 1, 4, 8), (3, 6, 2, 8), (3, 6, 2, 8), (3, 1, 2, 8), (3, 1, 2, 8)
    q, k_cache, v_cache, k, v = (quantized(rng.standard_normal(shape)) for shape in shapes)
    factors = rng.uniform(0.5, 2, (3, 3, 2)).astype(np.float32) if descaled else np.ones((3, 3, 2), np.float32)
    q_factor, k_factor, v_factor = factors
    given = dict(zip(("q_descale", "k_descale", "v_descale"), factors, strict=True)) if descaled else {}
    arrays = [x.copy() for x in (q, k_cache, v_cache, k, v)]
    if as_bytes:
        arrays, given = [x.view(np.uint8) for x in arrays], given | {"fp8_format": "e4m3fn"}
    out = flash_attn_with_kvcache(*arrays, cache_seqlens=4, **given)
    caches = k_cache.copy(), v_cache.copy()
    for cache, new in zip(caches, (k, v), strict=True):
        cache[:, 4] = new[:, 0]
    assert [x.tobytes() for x in arrays[1:3]] == [x.tobytes() for x in caches]
    keys, values = (
        x[:, :5].astype(np.float64) * y[:, None, :, None] for x, y in zip(caches, (k_factor, v_factor), strict=True)
    )
    queries = q.astype(np.float64) * np.repeat(q_factor, 2, 1)[:, None, :, None]
    assert out.dtype.name == "bfloat16"
    np.testing.assert_allclose(
        out.astype(np.float64), reference.attention(queries, keys, values)[0], rtol=2**-7, atol=2**-7
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"qv": np.zeros(3)}, NotSupportedError, "qv is given"),
        ({"attention_chunk": -7}, ArgumentError, "attention_chunk is -7"),
        ({"cu_seqlens_q": None}, ShapeError, r"q has shape \(5, 4, 8\), rank 3; rank 4 is needed"),
        ({"cu_seqlens_q": [0, 2, 5, 5]}, ArgumentError, r"max_seqlen_q is 2"),
        ({"cu_seqlens_q": [0, 2, 1, 5]}, ArgumentError, "cu_seqlens_q descends"),
        ({"cu_seqlens_q": [[0, 5]]}, ShapeError, "cu_seqlens_q has shape"),
        ({"cu_seqlens_q": []}, ShapeError, r"cu_seqlens_q has shape \[0\]"),
        ({"cu_seqlens_k_new": [0, 5]}, ShapeError, r"cu_seqlens_k_new has shape \[2\]"),
        ({"cu_seqlens_k_new": [0, 1, 3, 6]}, ArgumentError, "cu_seqlens_k_new ends at 6; it must span all 5 tokens"),
        ({"cu_seqlens_k_new": None}, ShapeError, "k has shape"),
        ({"k": None, "v": None}, ArgumentError, "cu_seqlens_k_new is given without k and v"),
        ({"cache_seqlens": [3, 11, 7]}, ArgumentError, r"cache_seqlens\[1\] is 11; 0 to 10 are allowed"),
        (
            {"page_table": [[0, 1, 2], [3, 4, 99], [5, 6, 7]], "cache_seqlens": 8},
            ArgumentError,
            r"page_table\[1, 2\] is 99",
        ),
        ({"page_table": [[0, 1, 2], [3, 4, 5]]}, ShapeError, r"page_table has shape \[2, 3\]"),
        ({"k_descale": np.ones((3, 2))}, ArgumentError, "k_descale is given and k_cache has dtype float32"),
        ({"q": np.zeros((5, 4, 8), np.uint8)}, DTypeError, "q has dtype uint8; fp8_format must be one of"),
        ({"q": quantized(np.zeros((5, 4, 8)))}, DTypeError, "q has dtype float8_e4m3fn and k_cache float32"),
        ({"rotary_seqlens": [0.5] * 3}, DTypeError, "rotary_seqlens has dtype float64"),
        ({"pack_gqa": 2}, ArgumentError, "pack_gqa is 2"),
    ),
)
def test_what_is_refused_has_changed_nothing(change, error, message):
    q, k, v, k_cache, v_cache, where = packed("pages of 4")
    caches = k_cache.copy(), v_cache.copy()
    given = {"q": q, "k_cache": caches[0], "v_cache": caches[1], "k": k, "v": v, "max_seqlen_q": 3}
    given |= theirs(where) | PACKED | change
    if "max_seqlen_q is" in message:
        given["max_seqlen_q"] = 2
    with pytest.raises(error, match=message):
        flash_attn_with_kvcache(**given)
    assert [x.tobytes() for x in caches] == [k_cache.tobytes(), v_cache.tobytes()]


@pytest.mark.parametrize("kind", ("entries", "padded rows of pages of 3"))
def test_on_a_device_nothing_waits(monkeypatch, kind):
    """The bits of the host; what does not fit is dropped there."""
    *arrays, where = packed(kind)
    rotary = {"rotary_cos": COS, "rotary_sin": SIN}
    on_host = [np.nan_to_num(x) for x in arrays]
    out = flash_attn_with_kvcache(
        on_host[0], *on_host[3:], *on_host[1:3], **rotary, **theirs(where), **PACKED, causal=True
    )
    with installed(monkeypatch, ComputingCupy) as cupy:
        on_device = [cupy.asarray(np.nan_to_num(x)) for x in arrays]
        lists = {name: cupy.asarray(x) for name, x in (theirs(where) | PACKED | rotary).items()}
        there = flash_attn_with_kvcache(on_device[0], *on_device[3:], *on_device[1:3], **lists, causal=True)
        beyond = lists | {"cache_seqlens": cupy.asarray(np.full(3, 12, np.int32))}
        before = [x.get() for x in on_device[3:]]
        cupy.num_synchronizations = 0
        flash_attn_with_kvcache(on_device[0], *on_device[3:], *on_device[1:3], **beyond, causal=True)
        assert cupy.num_synchronizations == 0
        after = [x.get() for x in on_device[3:]]
    turn_words.cache_clear()
    np.testing.assert_array_equal(there.get(), out)
    for cache, wanted, dropped in zip(before, on_host[3:], after, strict=True):
        np.testing.assert_array_equal(cache, wanted)
        np.testing.assert_array_equal(dropped, wanted)

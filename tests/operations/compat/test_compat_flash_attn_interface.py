"""cuattn.compat.flash_attn_interface: the names, argument orders and meanings of flash-attn 3."""

from __future__ import annotations

import inspect
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from simulated_cupy import ComputingCupy, installed

import cuattn
from cuattn import reference
from cuattn.compat import flash_attn_interface as fa3
from cuattn.errors import ArgumentError, DTypeError, NotSupportedError, ShapeError
from cuattn.testing import assert_attention_close, assert_gradients_close

SINKS = np.array([0.5, -1.0, 2.0, -np.inf], np.float32)
STARTS_Q, STARTS_K = np.array([0, 4, 4, 13], np.int32), np.array([0, 3, 9, 17], np.int32)
USED_Q, USED_K = np.array([2, 0, 9], np.int32), np.array([3, 4, 5], np.int32)
LISTS = STARTS_Q, STARTS_K, 9, 8

SIGNATURES = {
    "flash_attn_func": (
        *("q", "k", "v", "softmax_scale", "causal", "qv", "q_descale", "k_descale", "v_descale", "window_size"),
        *("attention_chunk", "softcap", "num_splits", "pack_gqa", "deterministic", "sm_margin", "return_attn_probs"),
    ),
    "flash_attn_varlen_func": (
        *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_q", "seqused_k"),
        *("softmax_scale", "causal", "qv", "q_descale", "k_descale", "v_descale", "window_size", "attention_chunk"),
        *("softcap", "num_splits", "pack_gqa", "deterministic", "sm_margin", "return_attn_probs"),
    ),
    "flash_attn_qkvpacked_func": (
        *("qkv", "softmax_scale", "causal", "q_descale", "k_descale", "v_descale", "window_size", "attention_chunk"),
        *("softcap", "deterministic", "num_heads_q", "sm_margin", "return_attn_probs"),
    ),
    "flash_attn_with_kvcache": (
        *("q", "k_cache", "v_cache", "k", "v", "qv", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx"),
        *("cache_leftpad", "page_table", "cu_seqlens_q", "cu_seqlens_k_new", "max_seqlen_q", "rotary_seqlens"),
        *("q_descale", "k_descale", "v_descale", "softmax_scale", "causal", "window_size", "attention_chunk"),
        *("softcap", "rotary_interleaved", "scheduler_metadata", "num_splits", "pack_gqa", "sm_margin"),
        "return_softmax_lse",
    ),
    "flash_attn_combine": ("out_partial", "lse_partial", "out", "out_dtype"),
}


def make(*, packed=False, dtype=np.float16, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((13, 4, 32), (17, 2, 32), (17, 2, 32)) if packed else ((2, 9, 4, 32), (2, 13, 2, 32), (2, 13, 2, 32))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_the_package(name):
    parameters = inspect.signature(getattr(fa3, name)).parameters.values()
    assert tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD) == SIGNATURES[name]
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} <= {"learnable_sink", "fp8_format"}
    assert set(fa3.__all__) == {*SIGNATURES, "flash_attn_func_backward", "flash_attn_varlen_func_backward"}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    (
        ({"softcap": 0.0, "attention_chunk": 0, "num_splits": 3, "pack_gqa": True, "sm_margin": 4}, {}),
        ({"causal": True, "window_size": np.array([3, -1])}, {"causal": True, "window": (3, None)}),
        ({"causal": True, "attention_chunk": 4}, {"causal": True, "chunk": 4}),
        (
            {"softmax_scale": 0.3, "softcap": 5.0, "learnable_sink": SINKS},
            {"scale": 0.3, "softcap": 5.0, "sinks": SINKS},
        ),
    ),
    ids=("without effect", "window", "chunk", "logits"),
)
def test_options_mean_what_they_say(executor, theirs, ours):
    q, k, v = make()
    out, lse = fa3.flash_attn_func(*map(executor.array, (q, k, v)), **theirs, return_attn_probs=True)
    assert_attention_close(executor.numpy(out), q, k, v, lse=executor.numpy(lse), **ours)


def test_packed_heads(executor):
    q, k, v = (x[:, :9] for x in make())
    qkv = executor.array(np.concatenate([q, k, v], 2))
    out = fa3.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=4)
    assert_attention_close(executor.numpy(out), q, k, v, causal=True)


def used(x, starts, counts, b):
    return x[None, starts[b] : starts[b] + counts[b]]


def test_used_tokens(executor):
    """Each sequence as if only its used tokens were there; the others give zeros, gradients too."""
    options = {"causal": True, "learnable_sink": SINKS}
    q, k, v = make(packed=True)
    dout = np.random.default_rng(3).standard_normal(q.shape).astype(np.float16)
    hidden = [x.copy() for x in (q, k, v)]
    for x, starts, counts in zip(hidden, (STARTS_Q, STARTS_K, STARTS_K), (USED_Q, USED_K, USED_K), strict=True):
        for first, last, count in zip(starts[:-1], starts[1:], counts, strict=True):
            x[first + count : last] = 77.0  # felt if anything looks at it
    arrays, lists = [executor.array(x) for x in hidden], [*map(executor.array, LISTS[:2]), *LISTS[2:]]
    where = *lists, executor.array(USED_Q), executor.array(USED_K)
    out, lse = fa3.flash_attn_varlen_func(*arrays, *where, **options, return_attn_probs=True)
    grads = fa3.flash_attn_varlen_func_backward(executor.array(dout), *arrays, out, lse, *where, **options)
    out, lse, *grads = map(executor.numpy, (out, lse, *grads))
    assert lse.shape == (4, 13) and grads[3].shape == (4,)
    ours = {"causal": True, "sinks": SINKS}
    untouched, total = [np.ones(len(x), bool) for x in (q, k, v)], np.zeros(4)
    for b in range(3):
        sides = (STARTS_Q, USED_Q), (STARTS_K, USED_K), (STARTS_K, USED_K)
        own = [used(x, *side, b) for x, side in zip((q, k, v), sides, strict=True)]
        for mask, (starts, counts) in zip(untouched, sides, strict=True):
            mask[starts[b] : starts[b] + counts[b]] = False
        if not USED_Q[b]:
            assert not any(used(x, STARTS_K, USED_K, b).any() for x in grads[1:3])
            continue
        first = STARTS_Q[b]
        own_lse = lse[None, :, first : first + USED_Q[b]]
        own_out, own_dout = (used(x, STARTS_Q, USED_Q, b) for x in (out, dout))
        assert_attention_close(own_out, *own, lse=own_lse, **ours)
        sink_gradients = reference.attention_backward(own_dout, *own, own_out, own_lse, **ours).dsinks
        total = total + sink_gradients
        own_grads = cuattn.AttentionGrads(
            *(used(x, *side, b) for x, side in zip(grads[:3], sides, strict=True)),
            None,
            sink_gradients.astype(np.float32),
        )
        assert_gradients_close(own_grads, own_dout, *own, own_out, own_lse, **ours)
    np.testing.assert_allclose(grads[3], total, rtol=1e-4, atol=1e-5)
    for x, mask in zip((out, grads[1], grads[2]), untouched, strict=True):
        assert not x[mask].any()


def test_factors_of_used_tokens():
    """[batch, kv_heads] of each sequence of the caller's, not of those that are made of it."""
    rng = np.random.default_rng(4)
    q, k, v = (x.astype(ml_dtypes.float8_e4m3fn) for x in make(packed=True))
    factors = {f"{x}_descale": rng.uniform(0.5, 2, (3, 2)).astype(np.float32) for x in "qkv"}
    out = fa3.flash_attn_varlen_func(q, k, v, *LISTS, seqused_k=USED_K, **factors)
    for b, (first, last) in enumerate(pairwise(STARTS_Q)):
        if first == last:
            continue
        own = {name: x[b : b + 1] for name, x in factors.items()}
        keys, values = (used(x, STARTS_K, USED_K, b) for x in (k, v))
        assert_attention_close(out[None, first:last], q[None, first:last], keys, values, **own)


@pytest.mark.parametrize("dtype", (None, "bfloat16", np.float16))
def test_combine(dtype):
    rng = np.random.default_rng(5)
    parts = rng.standard_normal((3, 2, 4, 5, 16)).astype(np.float32).swapaxes(2, 3)
    lses = rng.standard_normal((3, 2, 8, 5)).astype(np.float32).swapaxes(2, 3)[..., :4]
    lses[1:, 0] = -np.inf
    out, lse = fa3.flash_attn_combine(parts, lses, out_dtype=dtype)
    weights = np.exp(lses.astype(np.float64) - np.logaddexp.reduce(lses.astype(np.float64)))
    assert out.dtype.name == ("float32" if dtype is None else np.dtype(dtype).name)
    bound = 2.0**-8 if dtype == "bfloat16" else 2.0**-11 if dtype else 1e-6
    np.testing.assert_allclose(out.astype(np.float64), (weights[..., None] * parts).sum(0), rtol=bound, atol=bound)
    np.testing.assert_allclose(lse, np.logaddexp.reduce(lses.astype(np.float64)), rtol=1e-5, atol=1e-6)
    given = np.empty((2, 5, 4, 16), out.dtype)
    assert fa3.flash_attn_combine(parts, lses, given)[0] is given
    assert given.tobytes() == out.tobytes()


X, QKV = np.zeros((1, 2, 2, 32), np.float16), np.zeros((1, 2, 5, 32), np.float16)
PACKED = np.zeros((13, 2, 32), np.float16)


@pytest.mark.parametrize(
    ("name", "args", "change", "error", "message"),
    (
        ("func", (X, X, X), {"qv": X}, NotSupportedError, "qv is given"),
        ("func", (X, X, X), {"attention_chunk": -1}, ArgumentError, "attention_chunk is -1"),
        ("func", (X, X, X), {"attention_chunk": None}, ArgumentError, "attention_chunk is None"),
        ("func", (X, X, X), {"num_splits": -1}, ArgumentError, "num_splits is -1"),
        ("func", (X, X, X), {"num_splits": 1.5}, ArgumentError, r"num_splits is 1\.5"),
        ("func", (X, X, X), {"pack_gqa": 1}, ArgumentError, "pack_gqa is 1; allowed are None, False and True"),
        ("func", (X, X, X), {"sm_margin": True}, ArgumentError, "sm_margin is True"),
        ("func", (X, X, X), {"deterministic": 0}, ArgumentError, "deterministic is 0"),
        ("func", (X, X, X), {"causal": "top_left"}, ArgumentError, "causal is 'top_left'"),
        (
            "func",
            (X, X, X),
            {"learnable_sink": [0.0]},
            ShapeError,
            r"sinks has shape \[1\].*\(sinks is learnable_sink\)",
        ),
        ("qkvpacked_func", (QKV,), {}, ArgumentError, "num_heads_q is None"),
        ("qkvpacked_func", (QKV,), {"num_heads_q": 2}, ShapeError, "num_heads_q is 2"),
        ("qkvpacked_func", (QKV,), {"num_heads_q": 5}, ShapeError, "num_heads_q is 5"),
        ("qkvpacked_func", (PACKED,), {}, ShapeError, r"qkv has shape \(13, 2, 32\)"),
        (
            "varlen_func",
            (PACKED, PACKED, PACKED),
            {"seqused_q": [5, 0, 9]},
            ArgumentError,
            r"seqused_q\[0\] is 5; .* 0 to 4",
        ),
        ("varlen_func", (PACKED, PACKED, PACKED), {"seqused_k": [-1, 0, 9]}, ArgumentError, r"seqused_k\[0\] is -1"),
        ("varlen_func", (PACKED, PACKED, PACKED), {"seqused_k": [0, 9]}, ShapeError, r"seqused_k has shape \[2\]"),
        ("varlen_func", (PACKED, PACKED, PACKED), {"seqused_k": [0.5] * 3}, DTypeError, "seqused_k has dtype"),
        (
            "varlen_func",
            (PACKED, PACKED, PACKED),
            {"seqused_q": [4, 0, 9], "max_seqlen_q": 8},
            ArgumentError,
            "max_seqlen_q is 8, but seqused_q holds 9",
        ),
        ("combine", (X, X), {}, ShapeError, r"lse_partial has shape \(1, 2, 2, 32\); \(1, 2, 2\) is needed"),
        ("combine", (X[0], X[0, :, :, 0]), {}, ShapeError, r"out_partial has shape \(2, 2, 32\)"),
        ("combine", (X, X[..., 0]), {"out_dtype": "no dtype"}, DTypeError, "out_dtype is 'no dtype'"),
        ("combine", (X, X[..., 0]), {"out": X[0], "out_dtype": "float32"}, DTypeError, "out_dtype is float32 and out"),
    ),
)
def test_wrong_arguments(name, args, change, error, message):
    given = {}
    if name == "varlen_func":
        starts = np.array([0, 4, 4, 13], np.int32)
        given = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 9, "max_seqlen_k": 9}
    with pytest.raises(error, match=message):
        getattr(fa3, f"flash_attn_{name}")(*args, **given | change)


def test_used_tokens_on_a_device_are_not_waited_for(monkeypatch):
    """The same numbers as on the host, and more used tokens than there are count as all."""
    arrays = make(packed=True)
    expected = fa3.flash_attn_varlen_func(*arrays, *LISTS, USED_Q, STARTS_K[1:] - STARTS_K[:-1], causal=True)
    with installed(monkeypatch, ComputingCupy) as cupy:
        on_device = [cupy.asarray(x) for x in (*arrays, *LISTS[:2])]
        lists = cupy.asarray(USED_Q), cupy.asarray(np.full(3, 99, np.int32))
        out = fa3.flash_attn_varlen_func(*on_device, *LISTS[2:], *lists, causal=True)
        assert cupy.num_synchronizations == 0
        np.testing.assert_array_equal(out.get(), expected)

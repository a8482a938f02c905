"""cuattn.compat.flash_attn: the names, argument orders and meanings of the flash-attn package."""

from __future__ import annotations

import inspect
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

import cuattn
from cuattn.compat import flash_attn
from cuattn.errors import ArgumentError, DTypeError, NonFiniteError, NotSupportedError, ShapeError
from cuattn.testing import assert_attention_close, assert_varlen_close

REQUIRED = inspect.Parameter.empty
OPTIONS = [
    ("dropout_p", 0.0),
    ("softmax_scale", None),
    ("causal", False),
    ("window_size", (-1, -1)),
    ("softcap", 0.0),
    ("alibi_slopes", None),
    ("deterministic", False),
    ("return_attn_probs", False),
]
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
SIGNATURES = {
    "flash_attn_func": (["q", "k", "v"], OPTIONS),
    "flash_attn_qkvpacked_func": (["qkv"], OPTIONS),
    "flash_attn_kvpacked_func": (["q", "kv"], OPTIONS),
    "flash_attn_varlen_func": (["q", "k", "v", *LENGTHS], [*OPTIONS, ("block_table", None)]),
    "flash_attn_varlen_qkvpacked_func": (["qkv", "cu_seqlens", "max_seqlen"], OPTIONS),
    "flash_attn_varlen_kvpacked_func": (["q", "kv", *LENGTHS], OPTIONS),
}

# What a call of the package says, and what it says in the words of cuattn.
SAME = (
    ({}, {}),
    ({"softmax_scale": 0.3}, {"scale": 0.3}),
    ({"causal": True}, {"causal": True}),
    ({"window_size": (3, -1)}, {"window": (3, None)}),
    ({"window_size": (-1, 2)}, {"window": (None, 2)}),
    ({"window_size": [2, 1]}, {"window": (2, 1)}),
    ({"window_size": np.array([2, -1])}, {"window": (2, None)}),
    ({"window_size": (np.array(2), None)}, {"window": (2, None)}),
    ({"softcap": 0, "softmax_scale": np.array([0.3])}, {"scale": 0.3}),
    ({"window_size": (2**40, 2)}, {"window": (None, 2)}),
    ({"causal": True, "window_size": (4, 0)}, {"causal": True, "window": (4, 0)}),
    ({"causal": True, "window_size": (4, 3)}, {"causal": True, "window": (4, 3)}),
    ({"softcap": 5.0}, {"softcap": 5.0}),
    ({"softcap": -1.0}, {}),
    ({"deterministic": True}, {}),
    ({"alibi_slopes": [0.5, 0.25, 0.1, 0.0]}, {"alibi_slopes": np.array([0.5, 0.25, 0.1, 0.0], np.float32)}),
    (
        {"dropout_p": 0.3, "dropout_seed": 7, "dropout_offset": 2},
        {"dropout_p": 0.3, "dropout_seed": 7, "dropout_offset": 2},
    ),
)


def make(seqlen_q, seqlen_k, *, batch=2, heads=4, kv_heads=2, head_dim=32, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, seqlen_q, heads, head_dim)).astype(np.float16)
    kv = rng.standard_normal((batch, seqlen_k, 2, kv_heads, head_dim)).astype(np.float16)
    return q, kv


def arguments(executor, theirs):
    """The package's arguments, with an array of the executor for a list of slopes."""
    return {
        name: executor.array(np.array(value, np.float32)) if name == "alibi_slopes" else value
        for name, value in theirs.items()
    }


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_the_package(name):
    arrays, options = SIGNATURES[name]
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    positional = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [(array, REQUIRED) for array in arrays] + options
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == ["dropout_seed", "dropout_offset"]
    with_backward = {*SIGNATURES, *(f"{name}_backward" for name in SIGNATURES)}
    assert set(flash_attn.__all__) == {*with_backward, "flash_attn_with_kvcache"}


@pytest.mark.parametrize(("theirs", "ours"), SAME, ids=lambda options: "-".join(options) or "plain")
def test_options_mean_what_they_say(executor, theirs, ours):
    q, kv = make(9, 13)
    theirs = arguments(executor, theirs)
    out, lse, probabilities = flash_attn.flash_attn_func(
        *(executor.array(x) for x in (q, kv[:, :, 0], kv[:, :, 1])), **theirs, return_attn_probs=True
    )
    assert probabilities is None
    assert lse.shape == (2, 4, 9)
    assert_attention_close(executor.numpy(out), q, kv[:, :, 0], kv[:, :, 1], lse=executor.numpy(lse), **ours)


@pytest.mark.parametrize(("theirs", "ours"), SAME, ids=lambda options: "-".join(options) or "plain")
def test_options_of_packed_sequences(executor, theirs, ours):
    rng = np.random.default_rng(1)
    q = rng.standard_normal((12, 4, 32)).astype(np.float16)
    k, v = rng.standard_normal((2, 15, 2, 32)).astype(np.float16)
    cu_seqlens_q, cu_seqlens_k = np.array([0, 3, 3, 12], np.int32), np.array([0, 1, 8, 15], np.int32)
    theirs = arguments(executor, theirs)
    out, lse, probabilities = flash_attn.flash_attn_varlen_func(
        *(executor.array(x) for x in (q, k, v, cu_seqlens_q, cu_seqlens_k)), 9, 7, **theirs, return_attn_probs=True
    )
    assert probabilities is None
    assert lse.shape == (4, 12)
    lengths = cu_seqlens_q, cu_seqlens_k
    assert_varlen_close(executor.numpy(out), q, k, v, *lengths, lse=executor.numpy(lse), **ours)


@pytest.mark.parametrize(
    ("shape", "rows"),
    (((2, 5), ["11110", "11111"]), ((5, 2), ["00", "00", "00", "10", "11"])),
    ids=str,
)
def test_the_causal_mask_starts_at_the_bottom_right(executor, shape, rows):
    """The two pictures in the documentation of the package, of which the second has rows that see nothing."""
    seqlen_q, seqlen_k = shape
    q = np.zeros((1, seqlen_q, 1, 32), np.float32)
    k = np.zeros((1, seqlen_k, 1, 32), np.float32)
    v = np.eye(seqlen_k, dtype=np.float32).reshape(1, seqlen_k, 1, seqlen_k)
    out = flash_attn.flash_attn_func(*(executor.array(x) for x in (q, k, v)), causal=True)
    visible = executor.numpy(out)[0, :, 0] > 0
    assert ["".join("01"[int(bit)] for bit in row) for row in visible] == rows


def spy(monkeypatch, name):
    """Replaces the function that everything ends in, and gives the list of its calls."""
    calls = []

    def record(*args, **kwargs):
        calls.append((args, kwargs))
        return "out", "lse"

    monkeypatch.setattr(cuattn, name, record)
    return calls


def test_arguments_by_position(monkeypatch):
    calls = spy(monkeypatch, "attention")
    values = (0.1, 0.5, True, (3, -1), 2.0, "slopes", True, True)
    flash_attn.flash_attn_func("q", "k", "v", *values, dropout_seed=3, dropout_offset=4)
    ((args, kwargs),) = calls
    assert args == ("q", "k", "v")
    assert kwargs == {
        **{"dropout_p": 0.1, "dropout_seed": 3, "dropout_offset": 4, "scale": 0.5, "causal": True},
        **{"window": (3, None), "softcap": 2.0, "alibi_slopes": "slopes", "return_lse": True},
    }


def test_arguments_of_packed_sequences_by_position(monkeypatch):
    calls = spy(monkeypatch, "attention_varlen")
    values = (0.1, 0.5, True, (-1, 3), 2.0, "slopes", True, True, None)
    flash_attn.flash_attn_varlen_func("q", "k", "v", "cu_q", "cu_k", 5, 6, *values, dropout_seed=3)
    ((args, kwargs),) = calls
    assert args == ("q", "k", "v", "cu_q", "cu_k")
    assert kwargs == {
        **{"max_seqlen_q": 5, "max_seqlen_k": 6, "dropout_p": 0.1, "dropout_seed": 3, "dropout_offset": 0},
        **{"scale": 0.5, "causal": True, "window": (None, 3), "softcap": 2.0, "alibi_slopes": "slopes"},
        "return_lse": True,
    }


PACKED = {
    "flash_attn_qkvpacked_func": ((2, 6, 3, 4, 32), None, (), 2),
    "flash_attn_kvpacked_func": ((2, 7, 2, 2, 32), (2, 6, 4, 32), (), 2),
    "flash_attn_varlen_qkvpacked_func": ((6, 3, 4, 32), None, (np.array([0, 2, 6]), 4), 1),
    "flash_attn_varlen_kvpacked_func": ((7, 2, 2, 32), (6, 4, 32), (np.array([0, 2, 6]), np.array([0, 7, 7]), 4, 7), 1),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_arrays_are_read_where_they_are(monkeypatch, name):
    shape, q_shape, rest, axis = PACKED[name]
    calls = spy(monkeypatch, "attention_varlen" if "varlen" in name else "attention")
    packed = np.zeros(shape, np.float16)
    q = None if q_shape is None else np.zeros(q_shape, np.float16)
    options = {"softmax_scale": 0.5, "causal": True, "window_size": (2, 2), "softcap": 1.0, "alibi_slopes": "slopes"}
    leading = (packed,) if q is None else (q, packed)
    getattr(flash_attn, name)(*leading, *rest, **options, dropout_p=0.2, dropout_seed=9, dropout_offset=8)
    ((args, kwargs),) = calls
    views = args[:3] if q is None else args[1:3]
    assert q is None or args[0] is q
    for index, view in enumerate(views):
        expected = np.moveaxis(packed, axis, 0)[index]
        assert view.__array_interface__ == expected.__array_interface__
    wanted = {"scale": 0.5, "causal": True, "window": (2, 2), "softcap": 1.0, "alibi_slopes": "slopes"}
    wanted |= {"dropout_p": 0.2, "dropout_seed": 9, "dropout_offset": 8, "return_lse": False}
    if "varlen" in name:
        cu_seqlens = [x for x in rest if isinstance(x, np.ndarray)]
        assert all(x is y for x, y in zip(args[3:], (cu_seqlens[0], cu_seqlens[-1]), strict=True))
        wanted |= {"max_seqlen_q": 4, "max_seqlen_k": rest[-1]}
    assert kwargs == wanted


@pytest.mark.parametrize("name", ("flash_attn_qkvpacked_func", "flash_attn_kvpacked_func"))
def test_packed_arrays(executor, name):
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((3, 2, 11, 4, 64)).astype(np.float16)
    if name == "flash_attn_qkvpacked_func":
        out = flash_attn.flash_attn_qkvpacked_func(executor.array(np.stack([q, k, v], 2)), causal=True)
    else:
        k, v = k[:, :, :2], v[:, :, :2]
        out = flash_attn.flash_attn_kvpacked_func(executor.array(q), executor.array(np.stack([k, v], 2)), causal=True)
    assert_attention_close(executor.numpy(out), q, k, v, causal=True)


@pytest.mark.parametrize("name", ("flash_attn_varlen_qkvpacked_func", "flash_attn_varlen_kvpacked_func"))
def test_packed_arrays_of_packed_sequences(executor, name):
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((3, 11, 4, 64)).astype(np.float16)
    lengths = np.array([0, 4, 4, 11], np.int32)
    cu_seqlens = executor.array(lengths)
    if name == "flash_attn_varlen_qkvpacked_func":
        qkv = executor.array(np.stack([q, k, v], 1))
        out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 7, window_size=(2, 0))
    else:
        k, v = k[:, :2], v[:, :2]
        kv = executor.array(np.stack([k, v], 1))
        out = flash_attn.flash_attn_varlen_kvpacked_func(
            executor.array(q), kv, cu_seqlens, cu_seqlens, 7, 7, window_size=(2, 0)
        )
    assert_varlen_close(executor.numpy(out), q, k, v, lengths, lengths, window=(2, 0))


def test_dropout_needs_a_seed():
    q, kv = make(4, 4, heads=2)
    with pytest.raises(ArgumentError, match=r"dropout_p is 0\.1 and dropout_seed is None.*pass dropout_seed="):
        flash_attn.flash_attn_kvpacked_func(q, kv, 0.1)
    with pytest.raises(ArgumentError, match="dropout_p is 1/3 and dropout_seed is None"):
        flash_attn.flash_attn_kvpacked_func(q, kv, Fraction(1, 3))
    outs = [
        flash_attn.flash_attn_kvpacked_func(q, kv, 0.5, dropout_seed=seed, dropout_offset=offset)
        for seed, offset in ((1, 0), (1, 0), (2, 0), (1, 1))
    ]
    assert [np.array_equal(out, outs[0]) for out in outs] == [True, True, False, False]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"window_size": None}, ArgumentError, "window_size is None; a pair of integers"),
        ({"window_size": 3}, ArgumentError, "window_size is 3"),
        ({"window_size": "ab"}, ArgumentError, "window_size is 'ab'"),
        ({"window_size": (1, 2, 3)}, ArgumentError, r"window_size is \(1, 2, 3\)"),
        ({"window_size": (1.0, 2)}, ArgumentError, r"window_size is \(1\.0, 2\)"),
        ({"window_size": (True, 2)}, ArgumentError, r"window_size is \(True, 2\)"),
        ({"window_size": (-2, 2)}, ArgumentError, r"window_size is \(-2, 2\).*-1 \(unbounded\) or at least 0"),
        ({"softcap": "5"}, ArgumentError, "softcap is '5' of type str"),
        ({"softcap": None}, ArgumentError, "softcap is None"),
        ({"softcap": True}, ArgumentError, "softcap is True"),
        ({"softcap": float("nan")}, NonFiniteError, "softcap is nan"),
        ({"softmax_scale": float("inf")}, NonFiniteError, "softmax_scale is inf"),
        ({"softmax_scale": "1"}, ArgumentError, "softmax_scale is '1' of type str"),
        ({"softmax_scale": True}, ArgumentError, "softmax_scale is True"),
        ({"window_size": np.array([1.0, 2.0])}, ArgumentError, r"window_size is array\(\[1\., 2\.\]\)"),
        ({"window_size": np.array([1, 2, 3])}, ArgumentError, r"window_size is \(1, 2, 3\)"),
        ({"softcap": np.array([1.0, 2.0])}, ArgumentError, r"softcap is an array of shape \[2\]; one number"),
        ({"window_size": {1, 2}}, ArgumentError, r"window_size is \{1, 2\}"),
        ({"deterministic": 1}, ArgumentError, "deterministic is 1"),
        ({"return_attn_probs": None}, ArgumentError, "return_attn_probs is None"),
        ({"causal": 1}, ArgumentError, "causal is 1"),
        ({"dropout_p": 1.5, "dropout_seed": 0}, ArgumentError, "dropout_p is 1.5"),
        ({"dropout_p": "0.1"}, ArgumentError, "dropout_p is '0.1'"),
    ),
)
def test_wrong_arguments(options, error, message):
    q, kv = make(3, 3)
    with pytest.raises(error, match=message):
        flash_attn.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], **options)


def paged(page_size, *, spare=3, seed=7):
    """Packed queries, keys and values, the lists of both, and the same keys in pages with NaN everywhere else."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((12, 4, 32)).astype(np.float16)
    k, v = rng.standard_normal((2, 15, 2, 32)).astype(np.float16)
    starts_q, starts_k = np.array([0, 3, 3, 12], np.int32), np.array([0, 1, 8, 15], np.int32)
    used = -(-np.diff(starts_k) // page_size)
    order = rng.permutation(int(used.sum()) + spare).astype(np.int32)
    table = np.full((3, used.max() + 1), -5, np.int32)
    pages = np.full((2, order.size, page_size, 2, 32), np.nan, np.float16)
    for b, (first, last) in enumerate(pairwise(starts_k)):
        for token in range(first, last):
            at, slot = divmod(token - first, page_size)
            if not slot:
                table[b, at], order = order[0], order[1:]
            pages[:, table[b, at], slot] = k[token], v[token]
    return q, k, v, starts_q, starts_k, pages, table


@pytest.mark.parametrize("page_size", (1, 3, 16))
@pytest.mark.parametrize("options", ({"causal": True}, {"window_size": (2, 1), "softcap": 2.0}), ids=str)
def test_pages(executor, page_size, options):
    q, k, v, starts_q, starts_k, pages, table = paged(page_size)
    arrays = [executor.array(x) for x in (q, *pages, starts_q, starts_k)]
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        *arrays, 9, np.array(7), **options, block_table=executor.array(table), return_attn_probs=True
    )
    ours = {"window": options["window_size"], "softcap": 2.0} if "window_size" in options else options
    out, lse = executor.numpy(out), executor.numpy(lse)
    assert lse.shape == (4, 12)
    assert_varlen_close(out, q, k, v, starts_q, starts_k, lse=lse, **ours)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"block_table": np.zeros((2, 9), np.int32)}, ShapeError, r"cu_seqlens_k has shape \[4\]; \[batch \+ 1\]"),
        ({"block_table": np.zeros((3, 2), np.int32)}, ArgumentError, "gives sequence 1 7 keys; .* has room for 6"),
        ({"block_table": np.zeros(3, np.int32)}, ShapeError, "block_table has shape"),
        ({"block_table": [[0.5]]}, DTypeError, "block_table has dtype float64"),
        ({"max_seqlen_k": 6}, ArgumentError, "max_seqlen_k is 6, but a sequence of cu_seqlens_k has 7"),
        ({"max_seqlen_k": "7"}, ArgumentError, "max_seqlen_k is '7'"),
        ({"cu_seqlens_k": [0, 3, 1, 15]}, ArgumentError, "cu_seqlens_k descends"),
        ({"k": np.zeros((15, 2, 32), np.float16)}, ShapeError, r"k has shape \(15, 2, 32\); with block_table pages"),
        ({"dropout_p": 0.5, "dropout_seed": 0}, NotSupportedError, r"dropout_p is 0\.5 beside block_table"),
    ),
)
def test_wrong_pages(change, error, message):
    q, _, _, starts_q, starts_k, (k_pages, v_pages), table = paged(3)
    given = {"q": q, "k": k_pages, "v": v_pages, "cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k}
    given |= {"max_seqlen_q": 9, "max_seqlen_k": 7, "block_table": table} | change
    with pytest.raises(error, match=message):
        flash_attn.flash_attn_varlen_func(**given)


def test_wrong_packed_arrays():
    q, kv = make(3, 3)
    with pytest.raises(ShapeError, match=r"kv has shape \(2, 3, 2, 32\); \[batch, seqlen_k, 2, kv_heads, head_dim\]"):
        flash_attn.flash_attn_kvpacked_func(q, kv[:, :, 0])
    with pytest.raises(ShapeError, match=r"qkv has shape \(2, 3, 2, 2, 32\); \[batch, seqlen, 3, heads, head_dim\]"):
        flash_attn.flash_attn_qkvpacked_func(kv)
    with pytest.raises(ShapeError, match=r"qkv has shape \(3, 2, 2, 32\); \[total, 3, heads, head_dim\]"):
        flash_attn.flash_attn_varlen_qkvpacked_func(kv[0], [0, 3], 3)
    with pytest.raises(TypeError, match=r"kv: builtins\.list is no array"):
        flash_attn.flash_attn_kvpacked_func(q, kv.tolist())

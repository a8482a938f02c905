"""cuattn.compat.scaled_dot_product_attention: PyTorch's layout, argument names and mask meaning."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import cuattn
from cuattn.compat import scaled_dot_product_attention as sdpa
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, NonFiniteError, ShapeError
from cuattn.testing import assert_attention_close


def make(*shapes, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def heads_last(x):
    return x.swapaxes(-2, -3)


def test_the_signature_is_that_of_pytorch():
    parameters = inspect.signature(sdpa).parameters.values()
    told = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert told[:3] == [(name, inspect.Parameter.empty) for name in ("query", "key", "value")]
    assert told[3:] == [("attn_mask", None), ("dropout_p", 0.0), ("is_causal", False)]
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords == {"scale": None, "enable_gqa": False, "dropout_seed": None, "dropout_offset": 0}


@pytest.mark.parametrize("options", ({}, {"is_causal": True}, {"scale": 0.4}), ids=str)
def test_layout(executor, options):
    query, key, value = make((2, 3, 11, 32), (2, 3, 7, 32), (2, 3, 7, 16), dtype=np.float16)
    out = sdpa(*map(executor.array, (query, key, value)), **options)
    assert out.shape == (2, 3, 11, 16)
    assert heads_last(out).flags.c_contiguous  # merging the heads is free
    ours = {"causal": "top_left"} if options.pop("is_causal", False) else options
    assert_attention_close(heads_last(executor.numpy(out)), *map(heads_last, (query, key, value)), **ours)


def test_boolean_masks_say_where_to_attend(executor):
    query, key, value = make((2, 3, 5, 32), (2, 3, 7, 32), (2, 3, 7, 32))
    mask = np.random.default_rng(1).random((2, 1, 5, 7)) < 0.5
    mask[0, 0, 2] = False
    out = executor.numpy(sdpa(*map(executor.array, (query, key, value, mask))))
    assert_attention_close(heads_last(out), *map(heads_last, (query, key, value)), mask=mask)
    assert not out[0, :, 2].any()


def test_float_masks_are_added(executor):
    query, key, value, bias = make((2, 3, 5, 32), (2, 3, 7, 32), (2, 3, 7, 32), (3, 5, 7))
    bias[:, :, 3] = -np.inf
    out = executor.numpy(sdpa(*map(executor.array, (query, key, value, bias))))
    assert_attention_close(heads_last(out), *map(heads_last, (query, key, value)), bias=bias[None])


def test_grouped_query_attention(executor):
    query, key, value = make((2, 6, 5, 32), (2, 2, 7, 32), (2, 2, 7, 32))
    out = executor.numpy(sdpa(*map(executor.array, (query, key, value)), enable_gqa=True))
    repeated = [np.repeat(x, 3, axis=1) for x in (key, value)]
    assert_attention_close(heads_last(out), *map(heads_last, (query, *repeated)))


def test_dropout(executor):
    query, key, value = make((2, 3, 5, 32), (2, 3, 7, 32), (2, 3, 7, 32))
    dropout = {"dropout_p": 0.4, "dropout_seed": 5, "dropout_offset": 1}
    out = executor.numpy(sdpa(*map(executor.array, (query, key, value)), **dropout))
    assert_attention_close(heads_last(out), *map(heads_last, (query, key, value)), **dropout)
    with pytest.raises(ArgumentError, match=r"dropout_p is 0\.4 and dropout_seed is None"):
        sdpa(query, key, value, None, 0.4)


@pytest.mark.parametrize(
    ("query", "key", "value", "shape"),
    (
        ((5, 32), (7, 32), (7, 16), (5, 16)),
        ((3, 5, 32), (3, 7, 32), (3, 7, 16), (3, 5, 16)),
        ((2, 4, 3, 5, 32), (2, 4, 3, 7, 32), (2, 4, 3, 7, 16), (2, 4, 3, 5, 16)),
        ((2, 4, 3, 5, 32), (4, 3, 7, 32), (2, 1, 3, 7, 16), (2, 4, 3, 5, 16)),
        ((2, 3, 5, 32), (7, 32), (7, 16), (2, 3, 5, 16)),
        ((2, 3, 5, 32), (1, 3, 7, 32), (2, 1, 7, 16), (2, 3, 5, 16)),
        ((2, 1, 5, 32), (2, 3, 7, 32), (2, 3, 7, 16), (2, 3, 5, 16)),
        ((0, 3, 5, 32), (0, 3, 7, 32), (0, 3, 7, 16), (0, 3, 5, 16)),
        ((2, 0, 3, 5, 32), (2, 0, 3, 7, 32), (2, 0, 3, 7, 16), (2, 0, 3, 5, 16)),
        ((2, 3, 0, 32), (2, 3, 7, 32), (2, 3, 7, 16), (2, 3, 0, 16)),
        ((2, 3, 5, 32), (2, 3, 0, 32), (2, 3, 0, 16), (2, 3, 5, 16)),
    ),
    ids=str,
)
def test_leading_axes_broadcast(query, key, value, shape):
    arrays = make(query, key, value)
    out = sdpa(*arrays)
    assert out.shape == shape
    lead, (seqlen_q, head_dim_v) = shape[:-2], shape[-2:]
    seqlen_k, head_dim = key[-2:]
    tails = (seqlen_q, head_dim), (seqlen_k, head_dim), (seqlen_k, head_dim_v)
    if all(x.size for x in arrays):
        full = [np.broadcast_to(x, (*lead, *y)).reshape(-1, 1, *y) for x, y in zip(arrays, tails, strict=True)]
        assert_attention_close(heads_last(out.reshape(-1, 1, seqlen_q, head_dim_v)), *map(heads_last, full))
    else:
        assert not out.any()


MASKS = (7,), (5, 7), (1, 7), (5, 1), (3, 5, 7), (4, 1, 1, 7), (1, 4, 1, 5, 7), (2, 1, 3, 1, 1), (2, 4, 3, 5, 7)


@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("kind", ("mask", "bias"))
def test_masks_broadcast(kind, shape):
    query, key, value = make((2, 4, 3, 5, 32), (2, 4, 3, 7, 32), (2, 4, 3, 7, 32))
    (bias,) = make(shape, seed=3)
    mask = bias > -0.5 if kind == "mask" else bias
    out = sdpa(query, key, value, mask)
    folded = [x.reshape(8, *x.shape[2:]) for x in (query, key, value)]
    full = np.broadcast_to(mask, (2, 4, 3, 5, 7)).reshape(8, 3, 5, 7)
    assert_attention_close(heads_last(out.reshape(8, 3, 5, 32)), *map(heads_last, folded), **{kind: full})


def test_up_to_one_leading_axis_nothing_is_copied(monkeypatch):
    calls = []
    monkeypatch.setattr(cuattn, "attention", lambda *args, **kwargs: calls.append((args, kwargs)) or args[0])
    for lead in ((), (3,), (2, 3)):
        query, key, value, bias = make((*lead, 5, 32), (*lead, 7, 32), (*lead, 7, 32), (5, 7))
        sdpa(query, key, value, bias)
        args, kwargs = calls.pop()
        given = (query, key, value, bias)
        for array, x in zip((*args, kwargs["bias"]), given, strict=True):
            assert array.ndim == 4
            assert np.shares_memory(array, x)
        assert set(kwargs) >= {"bias", "scale", "causal"} and "mask" not in kwargs


def test_a_mask_for_several_leading_axes_stays_small(monkeypatch):
    calls = []
    monkeypatch.setattr(cuattn, "attention", lambda *args, **kwargs: calls.append(kwargs) or args[0])
    x, mask = np.zeros((2, 3, 4, 5, 32), np.float16), np.ones((1, 1, 1, 5, 5), bool)
    sdpa(x, x, x, mask)
    assert np.shares_memory(calls[0]["mask"], mask) and calls[0]["mask"].size == mask.size


Q, K, V = (2, 4, 5, 32), (2, 4, 7, 32), (2, 4, 7, 32)


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    (
        (((32,), K, V), {}, ShapeError, r"query has shape \(32,\); .*at least 2 axes"),
        ((Q, K, ()), {}, ShapeError, r"value has shape \(\)"),
        ((Q, (3, 4, 7, 32), V), {}, ShapeError, r"key has shape \(3, 4, 7, 32\).*do not broadcast"),
        ((Q, (2, 2, 7, 32), (2, 2, 7, 32)), {}, ShapeError, "query has 4 heads .* 2; .*without enable_gqa=True"),
        ((Q, (2, 3, 7, 32), (2, 3, 7, 32)), {"enable_gqa": True}, ShapeError, "query has 4 heads .* divide"),
        ((Q, (2, 8, 7, 32), (2, 8, 7, 32)), {"enable_gqa": True}, ShapeError, "query has 4 heads .* divide"),
        ((Q, (2, 4, 7, 32), (2, 2, 7, 32)), {}, ShapeError, "key has 4 heads and value has 2"),
        ((Q, (2, 4, 7, 32), (2, 3, 7, 32)), {"enable_gqa": True}, ShapeError, "value has 3; theirs must divide"),
        ((Q, (2, 4, 7, 16), V), {}, ShapeError, r"k has head dim 16 and q has head dim 32.*\(q is query, k is key\)"),
        ((Q, K, (2, 4, 8, 32)), {}, ShapeError, r"key has shape \(2, 4, 7, 32\) and value has shape \(2, 4, 8, 32\)"),
        ((Q[1:], K[1:], (4, 6, 32)), {}, ShapeError, "as many keys as values are needed"),
        ((Q, K, (2, 4, 6, 32)), {"attn_mask": np.ones((5, 7), bool)}, ShapeError, "without attn_mask, key may have"),
        ((Q, K, V), {"is_causal": 1}, ArgumentError, "is_causal is 1"),
        ((Q, K, V), {"enable_gqa": "yes"}, ArgumentError, "enable_gqa is 'yes'"),
        ((Q, K, V), {"scale": np.nan}, NonFiniteError, "scale is nan"),
        ((Q, K, V), {"attn_mask": np.ones((5, 7), np.int32)}, DTypeError, "attn_mask has dtype int32; bool and"),
        ((Q, K, V), {"attn_mask": np.ones((5, 6), bool)}, ShapeError, r"attn_mask has shape \(5, 6\).*\(2, 4, 5, 7\)"),
        ((Q, K, V), {"attn_mask": np.ones((1, 2, 4, 5, 7), bool)}, ShapeError, "attn_mask has shape"),
        ((Q, K, V), {"attn_mask": [[True] * 7] * 5}, ArrayTypeError, r"attn_mask: builtins\.list is no array"),
    ),
)
def test_wrong_arguments(shapes, options, error, message):
    with pytest.raises(error, match=message):
        sdpa(*make(*shapes), **options)


def test_arguments_that_are_no_arrays():
    query, key, value = make(Q, K, V)
    with pytest.raises(ArrayTypeError, match=r"key: builtins\.list is no array"):
        sdpa(query, key.tolist(), value)
    with pytest.raises(TypeError, match="positional"):
        sdpa(query, key, value, None, 0.0, False, 1.0)


# --- PyTorch itself, where it is installed ----------------------------------------------------------------------------

OPTIONS = (
    {},
    {"is_causal": True},
    {"scale": 0.3},
    {"enable_gqa": True},
    {"attn_mask": "bool"},
    {"attn_mask": "float", "scale": -0.2},
    {"attn_mask": "bool", "enable_gqa": True},
    {"is_causal": True, "enable_gqa": True, "scale": 1.5},
    {"attn_mask": "bool", "is_causal": True},
    {"attn_mask": "float", "is_causal": True, "enable_gqa": True},
)
SHAPES = (
    ((5, 16), (7, 16), (7, 8)),
    ((4, 5, 16), (4, 7, 16), (4, 7, 8)),
    ((2, 4, 9, 16), (2, 4, 6, 16), (2, 4, 6, 16)),
    ((2, 4, 5, 16), (1, 4, 7, 16), (2, 4, 7, 16)),
    ((3, 2, 4, 1, 16), (3, 2, 4, 7, 16), (3, 2, 4, 7, 24)),
)


# PyTorch wants a head axis for enable_gqa, and rank 4 for a mask beside is_causal.
CALLS = [
    *((x, y) for x in SHAPES for y in OPTIONS[:-2] if len(x[0]) > 2 or "enable_gqa" not in y),
    *((SHAPES[2], y) for y in OPTIONS[-2:]),
]


@pytest.mark.parametrize(("shapes", "options"), CALLS, ids=str)
def test_agrees_with_pytorch(shapes, options):
    """In float64, where both are exact to a few units in the last place."""
    torch = pytest.importorskip("torch")
    options = dict(options)
    if options.get("enable_gqa"):
        shapes = (shapes[0], *((*shape[:-3], 2, *shape[-2:]) for shape in shapes[1:]))
    query, key, value = make(*shapes, dtype=np.float64)
    kind = options.pop("attn_mask", None)
    tensors = dict(options)
    if kind is not None:
        (bias,) = make((query.shape[-2], key.shape[-2]), dtype=np.float64, seed=4)
        bias[0] = -1.0  # a row that sees nothing
        options["attn_mask"] = bias > -0.5 if kind == "bool" else bias
        tensors["attn_mask"] = torch.from_numpy(options["attn_mask"])
    expected = torch.nn.functional.scaled_dot_product_attention(*map(torch.from_numpy, (query, key, value)), **tensors)
    out = sdpa(query, key, value, **options)
    assert out.shape == tuple(expected.shape)
    np.testing.assert_allclose(out, expected.numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("heads", ((4, 2), (2, 4), (2, 1), (1, 2), (3, 2), (2, 3)), ids=str)
def test_heads_of_keys_and_of_values_as_in_pytorch(heads):
    torch = pytest.importorskip("torch")
    arrays = make((2, 12, 5, 16), (2, heads[0], 7, 16), (2, heads[1], 7, 16), dtype=np.float64)
    tensors = map(torch.from_numpy, arrays)
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    out = sdpa(*arrays, is_causal=True, enable_gqa=True)
    np.testing.assert_allclose(out, expected.numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("is_causal", (False, True))
def test_keys_without_a_value_as_in_pytorch(is_causal):
    torch = pytest.importorskip("torch")
    arrays = make((2, 3, 5, 16), (2, 3, 9, 16), (2, 3, 7, 16), dtype=np.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(*map(torch.from_numpy, arrays), is_causal=is_causal)
    np.testing.assert_allclose(sdpa(*arrays, is_causal=is_causal), expected.numpy(), rtol=1e-12, atol=1e-13)


def test_a_mask_beside_is_causal(executor):
    """Both hold, for every rank and where the mask is broadcast."""
    query, key, value = make((3, 5, 32), (3, 7, 32), (3, 7, 32))
    mask = np.random.default_rng(1).random((3, 1, 7)) < 0.6
    out = executor.numpy(sdpa(*map(executor.array, (query, key, value, mask)), is_causal=True))
    both = mask & np.tril(np.ones((5, 7), bool))
    assert_attention_close(heads_last(out[None]), *(heads_last(x[None]) for x in (query, key, value)), mask=both[None])


def test_takes_tensors():
    torch = pytest.importorskip("torch")
    query = torch.randn((2, 3, 5, 32), generator=torch.Generator().manual_seed(0)).bfloat16()
    out = sdpa(query, query, query, is_causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert out.dtype.name == "bfloat16"
    np.testing.assert_allclose(out.astype(np.float32), expected.float().numpy(), atol=2**-6)

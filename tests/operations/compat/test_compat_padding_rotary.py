"""cuattn.compat.flash_attn.bert_padding and layers.rotary: names, arguments and results of the package."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from simulated_cupy import ComputingCupy, installed

from cuattn import reference
from cuattn.compat.flash_attn import bert_padding
from cuattn.compat.flash_attn.layers import rotary
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, ShapeError

MASK = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]])
UNUSED = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
ANGLES = np.arange(9)[:, None] * np.array([1.0, 0.3, 0.05])
COS, SIN = np.cos(ANGLES).astype(np.float32), np.sin(ANGLES).astype(np.float32)


def parameters(function):
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.kind != p.KEYWORD_ONLY]


def test_signatures_are_those_of_the_package():
    required = inspect.Parameter.empty
    assert parameters(bert_padding.unpad_input) == [
        *((name, required) for name in ("hidden_states", "attention_mask")), ("unused_mask", None),
    ]  # fmt: skip
    assert parameters(bert_padding.pad_input) == [
        (name, required) for name in ("hidden_states", "indices", "batch", "seqlen")
    ]
    assert parameters(bert_padding.index_first_axis) == [("input", required), ("indices", required)]
    assert parameters(rotary.apply_rotary_emb) == [
        *((name, required) for name in ("x", "cos", "sin")), ("interleaved", False), ("inplace", False),
        *(("seqlen_offsets", 0), ("cu_seqlens", None), ("max_seqlen", None)),
    ]  # fmt: skip


@pytest.mark.parametrize("unused", (None, UNUSED), ids=("", "unused"))
@pytest.mark.parametrize("dtype", (np.int64, bool))
def test_padding(executor, unused, dtype):
    x = np.random.default_rng(0).standard_normal((3, 4, 2, 5)).astype(np.float32)
    either = MASK if unused is None else MASK + unused
    masks = [executor.array(mask.astype(dtype)) for mask in (MASK, unused) if mask is not None]
    tokens, indices, starts, longest, used = bert_padding.unpad_input(executor.array(x), *masks)
    where = np.flatnonzero(either)
    np.testing.assert_array_equal(executor.numpy(indices), where)
    np.testing.assert_array_equal(executor.numpy(tokens), x.reshape(12, 2, 5)[where])
    np.testing.assert_array_equal(executor.numpy(starts), np.cumsum([0, *either.sum(1)]))
    np.testing.assert_array_equal(executor.numpy(used), MASK.sum(1))
    assert (indices.dtype, starts.dtype, used.dtype, longest) == (np.int64, np.int32, np.int32, either.sum(1).max())
    padded = executor.numpy(bert_padding.pad_input(tokens, indices, 3, 4))
    np.testing.assert_array_equal(padded, x * either[..., None, None])
    order = executor.array(np.array([2, 0]))
    rows = executor.numpy(bert_padding.index_first_axis(tokens, order))
    np.testing.assert_array_equal(rows, executor.numpy(tokens)[[2, 0]])


def test_padding_in_any_order():
    x = np.arange(6.0).reshape(3, 2)
    padded = bert_padding.pad_input(x, [3, 0, 1], 2, 2)
    np.testing.assert_array_equal(padded, [[x[1], x[2]], [[0, 0], x[0]]])
    assert bert_padding.pad_input(x[:0], [], 1, 2).tolist() == [[[0, 0], [0, 0]]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    (
        (lambda x: bert_padding.unpad_input(x, [[1, 1]]), ArrayTypeError, r"attention_mask: builtins\.list"),
        (lambda x: bert_padding.unpad_input(x, np.ones((3, 4))), DTypeError, "attention_mask has dtype float64"),
        (lambda x: bert_padding.unpad_input(x, MASK, MASK[:2]), ShapeError, r"unused_mask has shape \(2, 4\)"),
        (lambda x: bert_padding.unpad_input(x[:2], MASK), ShapeError, r"x has shape.*\(x is hidden_states\)"),
        (lambda x: bert_padding.pad_input(x, [0, 1], 2, 2), ShapeError, r"indices has shape \(2,\); \[3\]"),
        (lambda x: bert_padding.pad_input(x, [0, 1, 4], 2, 2), ArgumentError, "indices holds 4; 0 to 3"),
        (lambda x: bert_padding.pad_input(x, [0, 1, -1], 2, 2), ArgumentError, "indices holds -1"),
        (lambda x: bert_padding.pad_input(x, [0, 1, 0.5], 2, 2), DTypeError, "indices has dtype float64"),
        (lambda x: bert_padding.pad_input(x, [0, 1, 2], 2.0, 2), ArgumentError, r"batch is 2\.0"),
        (lambda x: bert_padding.pad_input(x, [0, 1, 2], 2, -1), ArgumentError, "seqlen is -1"),
        (lambda x: bert_padding.index_first_axis(x, [[0]]), ShapeError, "indices has shape"),
        (lambda x: bert_padding.index_first_axis(x, [3]), ArgumentError, "indices holds 3; 0 to 2"),
        (lambda x: bert_padding.index_first_axis(x[0, 0, 0, 0], [0]), ArrayTypeError, "input"),
    ),
)
def test_wrong_padding(call, error, message):
    with pytest.raises(error, match=message):
        call(np.zeros((3, 4, 1, 2), np.float32))


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("offsets", (0, np.array(2), np.array([4, 1], np.int32)), ids=("zero", "number", "each"))
def test_rotations(executor, offsets, interleaved):
    x = np.random.default_rng(1).standard_normal((2, 3, 2, 8)).astype(np.float32)
    positions = np.broadcast_to(np.asarray(offsets).reshape(-1, 1), (2, 1)) + np.arange(3)
    want = reference.rope(x, positions, interleaved=interleaved, cos=COS, sin=SIN)
    tables = [executor.array(table) for table in (COS, SIN)]
    out = rotary.apply_rotary_emb(executor.array(x), *tables, interleaved, seqlen_offsets=offsets)
    np.testing.assert_allclose(executor.numpy(out), want, rtol=1e-5, atol=1e-6)
    given = executor.array(x.copy())
    assert rotary.apply_rotary_emb(given, *tables, interleaved, True, offsets) is given
    np.testing.assert_array_equal(executor.numpy(given), executor.numpy(out))
    back = rotary.apply_rotary_emb(given, *tables, interleaved, seqlen_offsets=offsets, conjugate=True)
    np.testing.assert_allclose(executor.numpy(back), x, rtol=1e-5, atol=1e-6)


def test_rotations_of_packed_sequences_and_of_keys():
    rng = np.random.default_rng(2)
    x, starts = rng.standard_normal((6, 2, 8)).astype(np.float16), np.array([0, 4, 4, 6], np.int32)
    tables = COS.astype(np.float16), SIN.astype(np.float16)
    offsets = np.array([1, 0, 5], np.int32)
    out = rotary.apply_rotary_emb(x, *tables, seqlen_offsets=offsets, cu_seqlens=starts, max_seqlen=4)
    want = reference.rope(x, np.array([1, 2, 3, 4, 5, 6]), cos=tables[0].astype(float), sin=tables[1].astype(float))
    np.testing.assert_allclose(out.astype(float), want, rtol=2e-3, atol=2e-3)
    kv = np.stack([x[None], x[None]], 2)
    assert rotary.apply_rotary_emb_kv_(kv, *tables) is kv
    np.testing.assert_array_equal(kv[:, :, 0], rotary.apply_rotary_emb(x[None], *tables))
    np.testing.assert_array_equal(kv[0, :, 1], x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"x": np.zeros((3, 2, 8), np.float32)}, ShapeError, r"x has shape \(3, 2, 8\); \[batch, seqlen"),
        ({"cu_seqlens": [0, 3]}, ShapeError, "beside cu_seqlens is needed"),
        ({"seqlen_offsets": [1]}, ShapeError, r"seqlen_offsets has shape \[1\]"),
        ({"seqlen_offsets": [0.5, 1]}, DTypeError, "seqlen_offsets has dtype float64"),
        ({"seqlen_offsets": 7}, ArgumentError, r"positions.* is 9; cos and sin hold the positions 0 to 8"),
        ({"seqlen_offsets": 2**31}, ArgumentError, "seqlen_offsets is 2147483648"),
        ({"interleaved": 1}, ArgumentError, "interleaved is 1"),
        ({"inplace": None}, ArgumentError, "inplace is None"),
        ({"conjugate": 0}, ArgumentError, "conjugate is 0"),
    ),
)
def test_wrong_rotations(change, error, message):
    with pytest.raises(error, match=message):
        rotary.apply_rotary_emb(**{"x": np.zeros((2, 3, 2, 8), np.float32), "cos": COS, "sin": SIN} | change)


def test_on_a_device(monkeypatch):
    """A mask is waited for once, as documented; nothing else is."""
    x = np.random.default_rng(3).standard_normal((3, 4, 2, 8)).astype(np.float32)
    tokens, indices, starts, *_ = bert_padding.unpad_input(x, MASK)
    turned = rotary.apply_rotary_emb(tokens, COS, SIN, seqlen_offsets=np.array([1, 0, 2]), cu_seqlens=starts)
    with installed(monkeypatch, ComputingCupy) as cupy:
        there, places, lists, *_ = bert_padding.unpad_input(cupy.asarray(x), cupy.asarray(MASK))
        assert cupy.num_synchronizations == 1
        tables = cupy.asarray(COS), cupy.asarray(SIN)
        out = rotary.apply_rotary_emb(there, *tables, seqlen_offsets=np.array([1, 0, 2]), cu_seqlens=lists)
        padded = bert_padding.pad_input(there, places, 3, 4)
        assert cupy.num_synchronizations == 1
    np.testing.assert_array_equal(places.get(), indices)
    np.testing.assert_array_equal(out.get(), turned)
    np.testing.assert_array_equal(padded.get(), bert_padding.pad_input(tokens, indices, 3, 4))

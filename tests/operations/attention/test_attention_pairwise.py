"""Every two options of attention, together: a pairwise covering array over all of them, dtypes, lengths and layouts."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from attention_calls import assert_right, prepare

import cuattn
from cuattn.testing import assert_attention_close
from cuattn.testing.arrays import Layout, place
from cuattn.testing.covering import covering_array, uncovered_pairs
from cuattn.testing.options import make_bias, make_descale, make_mask, make_sinks, make_slopes
from cuattn.testing.strategies import fill

F16, BF16, F32, F64 = map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))

#: dtype of q, k and v, and of a bias "of the same kind": float32 where another one would compile one more kernel for
#: nothing but its conversion.
FORMATS = {
    "float16": (F16, F16),
    "bfloat16": (BF16, BF16),
    "float32": (F32, F64),
    "tf32": (F32, F32),
    "float64": (F64, F32),
    "float8_e4m3fn": (np.dtype(ml_dtypes.float8_e4m3fn), F32),
    "float8_e5m2": (np.dtype(ml_dtypes.float8_e5m2), F32),
}

#: Layouts of q, k and v, and the head dims (D, E): all in the smallest bucket, for few compiled kernels.
LAYOUTS = {
    "contiguous": ((32, 32), Layout()),
    "heads_first": ((24, 16), Layout(order=(0, 2, 1, 3))),
    "odd": ((31, 17), Layout(pad=(0, 1, 0, 1), offset=1)),
}

FACTORS = {
    "format": list(FORMATS),
    "lengths": [(70, 135), (130, 130), (135, 70)],
    "heads": [(2, 2), (4, 2), (3, 1)],
    "layout": list(LAYOUTS),
    "scale": [None, -0.3],
    "causal": [False, True, "top_left"],
    "window": [None, (5, 40), (30, None), (None, 3)],
    "softcap": [None, 2.0],
    "bias": [None, "full", "same_kind", "row_of_keys"],
    "mask": [None, "blocks", "lengths"],
    "alibi_slopes": [None, "heads", "batch"],
    "sinks": [False, True],
    "dropout_p": [0.0, 0.25],
    "diagonal_offset": [None, -9, "batch"],
    "descale": [False, True],
    "out": [False, True],
}
ROWS = covering_array(FACTORS)


def problem(row, seed):
    """q, k, v and options of one row of the array."""
    rng = np.random.default_rng(seed)
    dtype, bias_dtype = FORMATS[row["format"]]
    (seqlen_q, seqlen_k), (heads, kv_heads) = row["lengths"], row["heads"]
    (head_dim, head_dim_v), layout = LAYOUTS[row["layout"]]
    shapes = (
        (2, seqlen_q, heads, head_dim),
        (2, seqlen_k, kv_heads, head_dim),
        (2, seqlen_k, kv_heads, head_dim_v),
    )
    arrays = [place(fill(shape, dtype, "normal", rng), layout) for shape in shapes]
    full = 2, heads, seqlen_q, seqlen_k
    options = {name: row[name] for name in ("scale", "causal", "window", "softcap")}
    if row["format"] == "tf32":
        options["precision"] = "tf32"
    if row["bias"] == "full":
        options["bias"] = make_bias(rng, full, np.float32, "infinities")
    elif row["bias"] == "same_kind":
        options["bias"] = place(make_bias(rng, full[1:], bias_dtype, "lowest"), Layout(offset=3)).array
    elif row["bias"] == "row_of_keys":
        options["bias"] = make_bias(rng, (2, 1, 1, seqlen_k), np.float32, "normal")
    if row["mask"] == "blocks":
        options["mask"] = make_mask(rng, full, "blocks", 64)
    elif row["mask"] == "lengths":
        options["mask"] = make_mask(rng, (2, 1, 1, seqlen_k), "lengths")
    if row["alibi_slopes"] is not None:
        options["alibi_slopes"] = make_slopes(rng, (heads,) if row["alibi_slopes"] == "heads" else (2, heads))
    if row["sinks"]:
        options["sinks"] = make_sinks(rng, heads)
    if row["dropout_p"]:
        options |= {"dropout_p": row["dropout_p"], "dropout_seed": 2**40 + seed, "dropout_offset": seed}
    offset = row["diagonal_offset"]
    options["diagonal_offset"] = np.int32([seqlen_k - seqlen_q + 5, -20]) if offset == "batch" else offset
    if row["descale"] and dtype.itemsize == 1:
        options |= {f"{name}_descale": make_descale(rng, (2, kv_heads)) for name in "qkv"}
    return arrays, options


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_options_together(executor, number):
    row = ROWS[number]
    arrays, options = problem(row, number)
    if not row["out"]:
        assert_right(executor, *arrays, **options)
        return
    q, k, v = (guarded.array for guarded in arrays)
    dtype = BF16 if q.dtype.itemsize == 1 else q.dtype
    target = executor.guarded((*q.shape[:3], v.shape[3]), dtype, LAYOUTS[row["layout"]][1])
    on_executor, moved = prepare(executor, arrays, options)
    result = cuattn.attention(*on_executor, out=target.array, **moved)
    assert result is target.array
    target.check()
    assert_attention_close(executor.numpy(result), q, k, v, **options)


@pytest.mark.parametrize(
    ("form", "head_dims"),
    [("float16", (256, 255)), ("tf32", (192, 256)), ("float64", (256, 256))],
    ids=str,
)
def test_all_options_at_the_largest_head_dims(executor, form, head_dims):
    """Where registers and shared memory are short, and rows of tiles are others."""
    rng = np.random.default_rng(0)
    q, k, v = (
        fill((1, n, heads, d), FORMATS[form][0], "normal", rng)
        for n, heads, d in ((70, 2, head_dims[0]), (135, 1, head_dims[0]), (135, 1, head_dims[1]))
    )
    options = {
        "causal": True,
        "window": (60, None),
        "diagonal_offset": np.int32([70]),
        "softcap": 4.0,
        "bias": make_bias(rng, (2, 70, 135), np.float32, "infinities"),
        "mask": make_mask(rng, (70, 135), "blocks", 64),
        "alibi_slopes": make_slopes(rng, (2,)),
        "sinks": np.float32([0, 1]),
        "dropout_p": 0.2,
        **({"precision": "tf32"} if form == "tf32" else {}),
    }
    assert_right(executor, q, k, v, **options)


def test_every_pair_is_there():
    assert uncovered_pairs(FACTORS, ROWS) == []
    assert len(ROWS) < 60

"""Gradients with every two options together: a pairwise covering array over all of them, as for forward."""

from __future__ import annotations

import numpy as np
import pytest
from backward_calls import after_forward, assert_right
from backward_formats import BF16, F16, F32, F64

from cuattn.testing.arrays import Layout, place
from cuattn.testing.covering import covering_array, uncovered_pairs
from cuattn.testing.options import make_bias, make_mask, make_sinks, make_slopes
from cuattn.testing.strategies import fill

#: (D, E), all in one bucket, and layouts, whose rows are aligned and are not.
EVEN = {"contiguous": ((32, 32), Layout()), "heads_first": ((24, 16), Layout(order=(0, 2, 1, 3)))}
ODD = {
    "odd": ((31, 17), Layout(pad=(0, 1, 0, 0), offset=1)),
    "odd_heads_first": ((17, 31), Layout(order=(0, 2, 1, 3), offset=3)),
}

#: dtype of q, options that belong to it, and layouts: each of these is a kernel of all options, and no more than these.
FORMATS = {
    "float16": (F16, {}, EVEN),
    "float16_odd": (F16, {}, ODD),
    "bfloat16": (BF16, {}, EVEN),
    "float32": (F32, {}, EVEN),
    "float32_odd": (F32, {}, ODD),
    "tf32": (F32, {"precision": "tf32"}, EVEN),
    "float64": (F64, {}, EVEN),
}

FACTORS = {
    "format": list(FORMATS),
    "lengths": [(70, 135), (130, 130), (135, 70)],
    "heads": [(2, 2), (4, 2), (3, 1)],
    "layout": [0, 1],
    "scale": [None, -0.3],
    "causal": [False, True, "top_left"],
    "window": [None, (5, 40), (30, None), (None, 3)],
    "softcap": [None, 2.0],
    "bias": [None, "full", "heads", "row_of_keys"],
    "mask": [None, "blocks", "lengths"],
    "alibi_slopes": [None, "heads", "batch"],
    "sinks": [False, True],
    "dropout_p": [0.0, 0.25],
    "diagonal_offset": [None, -9, "batch"],
    "dlse": [False, True],
    "return_dbias": [False, True],
    "given": [False, True],
}
ROWS = covering_array(FACTORS)


def problem(row, seed):
    """q, k, v, their layout and the options of one row of the array."""
    rng = np.random.default_rng(seed)
    dtype, options, of_format = FORMATS[row["format"]]
    (seqlen_q, seqlen_k), (heads, kv_heads) = row["lengths"], row["heads"]
    (head_dim, head_dim_v), layout = list(of_format.values())[row["layout"]]
    shapes = (
        (2, seqlen_q, heads, head_dim),
        (2, seqlen_k, kv_heads, head_dim),
        (2, seqlen_k, kv_heads, head_dim_v),
    )
    arrays = [place(fill(shape, dtype, "normal", rng), layout) for shape in shapes]
    full = 2, heads, seqlen_q, seqlen_k
    options = options | {name: row[name] for name in ("scale", "causal", "window", "softcap")}
    if row["bias"] == "full":
        options["bias"] = make_bias(rng, full, F32, "infinities")
    elif row["bias"] == "heads":
        options["bias"] = place(make_bias(rng, full[1:], F32, "lowest"), Layout(offset=3)).array
    elif row["bias"] == "row_of_keys":
        options["bias"] = make_bias(rng, (2, 1, 1, seqlen_k), F32, "normal")
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
    return arrays, layout, options


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_options_together(executor, number):
    row = ROWS[number]
    arrays, layout, options = problem(row, number)
    saved = after_forward(executor, *arrays, dlse=row["dlse"], layout=layout, seed=number, **options)
    extra = {"return_dbias": True} if row["return_dbias"] and row["bias"] else {}
    if not row["given"]:
        grads = assert_right(executor, saved, **extra)
        assert (grads.dbias is None) == (not extra) and (grads.dsinks is None) == (not row["sinks"])
        return
    targets = [executor.guarded(x.array.shape, x.array.dtype, layout) for x in arrays]
    given = dict(zip(("dq", "dk", "dv"), (target.array for target in targets), strict=True))
    assert_right(executor, saved, **extra, **given)
    for target, x in zip(targets, arrays, strict=True):
        target.check()
        assert executor.numpy(target.array).shape == x.array.shape


def test_every_pair_is_there():
    assert uncovered_pairs(FACTORS, ROWS) == []
    assert len(ROWS) < 60

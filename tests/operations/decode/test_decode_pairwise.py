"""Every two options of decoding, together: a pairwise covering array over options, dtypes, formats and caches."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cached_calls import FUNCTIONS, assert_right, check, prepare

import cuattn
from cuattn.testing.arrays import Layout
from cuattn.testing.covering import covering_array, uncovered_pairs
from cuattn.testing.decode_problems import cached_problem
from cuattn.testing.options import make_sinks, make_slopes

F16, BF16, F32, F64 = map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))

#: dtype of q, and format of the cache; where the scales of the format are, if it has a choice.
FORMATS = {
    "float16": (F16, None, "tensor"),
    "float32": (F32, None, "tensor"),
    "float64": (F64, None, "tensor"),
    "float16 of e4m3fn": (F16, "e4m3fn", "head"),
    "bfloat16 of int8": (BF16, "int8", "slot"),
    "float32 of int8": (F32, "int8", "head"),
    "float16 of nvfp4": (F16, "nvfp4", "tensor"),
    "bfloat16 of mxfp4": (BF16, "mxfp4", "tensor"),
    "float16 of mxfp4": (F16, "mxfp4", "tensor"),
}

#: Layouts of q, k and v, and the head dims (D, E): all in the smallest bucket, for few compiled kernels.
LAYOUTS = {
    "contiguous": ((32, 32), (None, None, None)),
    "heads_first": ((32, 16), (None, Layout(order=(0, 2, 1, 3)), Layout(order=(0, 2, 1, 3)))),
    "odd": ((30, 18), (Layout(offset=1), Layout(pad=(0, 1, 0, 3), offset=1), Layout(pad=(1, 0, 1, 0), offset=1))),
}

ROTATIONS = {
    None: {},
    "queries": {"rope": cuattn.Rotary(interleaved=True, rotary_dim=8)},
    "keys too": {"rope": cuattn.Rotary(base=100.0), "rotate_keys": True},
}

FACTORS = {
    "format": list(FORMATS),
    "cache": ["contiguous", "paged", "packed"],
    "tokens": [1, 3],
    "heads": [(1, 1), (6, 2), (17, 1)],
    "layout": list(LAYOUTS),
    "scale": [None, -0.3],
    "causal": [True, False, "top_left"],
    "window": [None, (5, 40), (30, None)],
    "softcap": [None, 2.0],
    "alibi_slopes": [None, "heads", "batch"],
    "sinks": [False, True],
    "rotation": list(ROTATIONS),
    "num_splits": [1, 3, None],
    "out": [False, True],
}
ROWS = covering_array(FACTORS)


def problem_of(row, seed):
    rng = np.random.default_rng(seed)
    dtype, kv_format, scales = FORMATS[row["format"]]
    head_dims, layouts = LAYOUTS[row["layout"]]
    packed, heads = row["cache"] == "packed", row["heads"]
    options = {name: row[name] for name in ("scale", "causal", "window", "softcap", "num_splits")}
    if row["alibi_slopes"] is not None:
        options["alibi_slopes"] = make_slopes(rng, heads[:1] if row["alibi_slopes"] == "heads" else (4, heads[0]))
    if row["sinks"]:
        options["sinks"] = make_sinks(rng, heads[0])
    if packed:
        layouts = (None if layouts[0] is None else Layout(offset=1), *layouts[1:])
    return cached_problem(
        rng,
        lengths=[130, 2, 0, 65],
        seqlens_q=[row["tokens"], 4, 0, 1] if packed else row["tokens"],
        heads=heads,
        head_dims=head_dims,
        dtype=dtype,
        kv_format=kv_format,
        scales=scales,
        page_size=None if row["cache"] == "contiguous" else int(rng.choice([1, 3, 16, 100])),
        layouts=layouts,
        **options,
        **ROTATIONS[row["rotation"]],
    )


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_options_together(executor, number):
    row = ROWS[number]
    problem = problem_of(row, number)
    if not row["out"]:
        assert_right(executor, problem)
        return
    q = problem.q.array
    layout = LAYOUTS[row["layout"]][1][1] if q.ndim == 4 else Layout(pad=(0, 1, 0))
    target = executor.guarded((*q.shape[:-1], problem.head_dim_v), q.dtype, layout)
    arrays, options = prepare(executor, problem)
    result = FUNCTIONS[problem.kind](*arrays, out=target.array, **options)
    assert result is target.array
    target.check()
    check(problem, executor.numpy(result))


@pytest.mark.parametrize("form", ("float16", "bfloat16 of int8"))
def test_all_options_at_the_largest_head_dims(executor, form):
    """Where registers and shared memory are short, and rows of tiles are others."""
    rng = np.random.default_rng(0)
    dtype, kv_format, scales = FORMATS[form]
    problem = cached_problem(
        rng, lengths=[135, 40], seqlens_q=3, heads=(6, 2), head_dims=(256, 254), dtype=dtype, kv_format=kv_format,
        scales=scales, page_size=16, window=(100, None), softcap=4.0, alibi_slopes=make_slopes(rng, (6,)),
        sinks=make_sinks(rng, 6), rope=cuattn.Rotary(), rotate_keys=True,
    )  # fmt: skip
    assert_right(executor, problem, num_splits=2)


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_rotation_from_tables(executor, dtype):
    """Cosines and sines that no frequency gives, as long-context models scale them."""
    rng = np.random.default_rng(0)
    angles = rng.uniform(-np.pi, np.pi, (80, 12))
    cos, sin = (np.float32(1.1 * part) for part in (np.cos(angles), np.sin(angles)))
    problem = cached_problem(
        rng, lengths=[80, 7], seqlens_q=2, heads=(4, 2), head_dims=(32, 32), dtype=dtype, page_size=16
    )
    given = {"rope": cuattn.Rotary(cos=executor.array(cos), sin=executor.array(sin)), "rotate_keys": True}
    arrays, options = prepare(executor, problem, **given)
    out, lse = cuattn.paged_attention(*arrays, return_lse=True, **options)
    told = {"rope": cuattn.Rotary(cos=cos, sin=sin), "rotate_keys": True}
    check(problem, executor.numpy(out), executor.numpy(lse), **told)


def test_every_pair_is_there():
    assert uncovered_pairs(FACTORS, ROWS) == []
    assert len(ROWS) < 50

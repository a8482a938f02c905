"""Calls of the decode functions with problems of NumPy arrays, on any executor."""

from __future__ import annotations

import numpy as np

import cuattn
from cuattn.testing import assert_decode_close, assert_paged_close, assert_paged_varlen_close, kernels
from cuattn.testing.decode_tolerance import decode_bounds
from cuattn.testing.tolerance import assert_within

FUNCTIONS = {
    "decode": cuattn.decode_attention,
    "paged": cuattn.paged_attention,
    "varlen": cuattn.paged_attention_varlen,
}
OF_ANY_SHAPE = {
    "decode": kernels.decode_attention,
    "paged": kernels.paged_attention,
    "varlen": kernels.paged_attention_varlen,
}
CHECKS = {"decode": assert_decode_close, "paged": assert_paged_close, "varlen": assert_paged_varlen_close}

WITH_CACHE = ("k_scale", "v_scale", "k_block_scales", "v_block_scales")  # these must lie where the cache lies


def prepare(executor, problem, **more):
    """Arguments and options of a call: the cache and its scales moved to the executor in the layout that they have."""
    heads = [problem.q, problem.k, problem.v]
    options = {**problem.options, **more}
    if executor.name != "host":  # CuPy has no narrow dtypes: bytes, and their format
        heads = [as_bytes(x) for x in heads]
    for name in WITH_CACHE:
        if np.ndim(options.get(name, 0)) >= 3:
            x = options[name]
            options[name] = executor.array(x if executor.name == "host" or x.itemsize > 1 else x.view(np.uint8))
    return (*map(executor.array, heads), *problem.arrays[3:]), options


def as_bytes(guarded):
    """An array of a narrow float format as one of uint8."""
    if guarded.array.dtype.itemsize > 1 or guarded.array.dtype.kind in "iu":
        return guarded
    return type(guarded)(guarded.root, guarded.array.view(np.uint8), guarded.byte_offset)


def call(executor, problem, **more):
    """(out, lse) of the function that the problem is for, as NumPy arrays; with `config`, of a kernel of that shape."""
    arrays, options = prepare(executor, problem, **more)
    function = (OF_ANY_SHAPE if "config" in options else FUNCTIONS)[problem.kind]
    out, lse = function(*arrays, return_lse=True, **options)
    return executor.numpy(out), executor.numpy(lse)


def check(problem, out, lse=None, **more):
    """The result agrees with the reference."""
    CHECKS[problem.kind](out, *problem.arrays, lse=lse, **{**problem.options, **more})


def assert_right(executor, problem, **more):
    """The call agrees with the reference; the result is returned."""
    out, lse = call(executor, problem, **more)
    more.pop("config", None)
    check(problem, out, lse, **more)
    return out, lse


def assert_same(problem, result, expected):
    """Two right answers to one problem, (out, lse) each, differ by the two bounds at most."""
    packed = problem.kind == "varlen"
    for where, _, bound, _, bound_lse in decode_bounds(problem.reference_arrays, problem.options):
        (out, lse), (want, want_lse) = (
            (out[where], lse[:, where] if packed else lse[where]) for out, lse in (result, expected)
        )
        assert_within(out, want.astype(np.float64), 2 * bound.reshape(want.shape), "out")
        assert_within(lse, want_lse.astype(np.float64), 2 * bound_lse.reshape(want_lse.shape), "lse")


def assert_equal(result, expected):
    """Bit for bit."""
    for got, want in zip(result, expected, strict=True):
        assert got.shape == want.shape and got.tobytes() == want.tobytes()

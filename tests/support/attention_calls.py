"""Calls of the attention functions with NumPy arrays, on any executor."""

from __future__ import annotations

import numpy as np

import cuattn
from cuattn.testing import assert_attention_close, assert_varlen_close
from cuattn.testing.arrays import Guarded, place
from cuattn.testing.strategies import FLOAT8_DTYPES
from cuattn.testing.tolerance import assert_within, attention_bound

OF_LOGITS = ("bias", "mask")  # these must lie where q lies; smaller arrays may lie on the host


def prepare(executor, arrays, options):
    """q, k and v and the options, with large arrays moved to the executor in the layout that they have."""
    arrays = [x.array if isinstance(x, Guarded) and executor.name == "host" else x for x in arrays]
    options = {name: executor.array(value) if name in OF_LOGITS and value is not None else value
               for name, value in options.items()}  # fmt: skip
    first = arrays[0].array if isinstance(arrays[0], Guarded) else arrays[0]
    if executor.name != "host" and first.dtype in FLOAT8_DTYPES:  # CuPy has no such dtype: bytes and their format
        options["fp8_format"] = first.dtype.name.removeprefix("float8_")
        arrays = [place((x.array if isinstance(x, Guarded) else x).view(np.uint8)) for x in arrays]
    return [executor.array(x) for x in arrays], options


def call(executor, q, k, v, **options):
    """(out, lse) of `cuattn.attention` as NumPy arrays, from NumPy arrays in any layout."""
    arrays, options = prepare(executor, (q, k, v), options)
    out, lse = cuattn.attention(*arrays, return_lse=True, **options)
    return executor.numpy(out), executor.numpy(lse)


def assert_right(executor, q, k, v, **options):
    """The call agrees with the reference; the result is returned."""
    out, lse = call(executor, q, k, v, **options)
    arrays = [x.array if isinstance(x, Guarded) else x for x in (q, k, v)]
    assert_attention_close(out, *arrays, lse=lse, **options)
    return out, lse


def same_kernel(executor, *calls):
    """Whether one kernel computes all of them, each an (arrays, options) pair of a forward.

    On compute capability 9.0 that depends on options and strides; results of two kernels differ by rounding.
    """
    kernels = set()
    for (q, k, v, *starts), options in calls:
        arrays, options = prepare(executor, (q, k, v), options)
        kernels.add(cuattn.forward_path(*arrays, *starts, **options).kernel)
    return len(kernels) == 1


def call_varlen(executor, q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
    """(out, lse) of `cuattn.attention_varlen` as NumPy arrays, from NumPy arrays in any layout."""
    arrays, options = prepare(executor, (q, k, v), options)
    out, lse = cuattn.attention_varlen(*arrays, cu_seqlens_q, cu_seqlens_k, return_lse=True, **options)
    return executor.numpy(out), executor.numpy(lse)


def assert_varlen_right(executor, q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
    """The packed call agrees with the reference; the result is returned."""
    out, lse = call_varlen(executor, q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    arrays = [x.array if isinstance(x, Guarded) else x for x in (q, k, v)]
    assert_varlen_close(out, *arrays, cu_seqlens_q, cu_seqlens_k, lse=lse, **options)
    return out, lse


def assert_same(result, expected, q, k, v, **options):
    """Two right answers to one problem differ by the two bounds at most; `result` and `expected` are (out, lse)."""
    _, bound, _, bound_lse = attention_bound(q, k, v, **options)
    assert_within(result[0], expected[0].astype(np.float64), 2 * bound, "out")
    assert_within(result[1], expected[1].astype(np.float64), 2 * bound_lse, "lse")

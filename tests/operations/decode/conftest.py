"""Fixtures of the tests of decoding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cuattn.runtime import executor as executors

F16, BF16, F32, F64 = map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
#: dtype of q, and the cache: tensor cores, then CUDA cores.
FORMS = {
    "float16": (F16, {}),
    "bfloat16 of int8": (BF16, {"kv_format": "int8", "scales": "slot"}),
    "float16 of nvfp4": (F16, {"kv_format": "nvfp4"}),
    "float32": (F32, {}),
    "float32 of e4m3fn": (F32, {"kv_format": "e4m3fn", "scales": "slot"}),
    "float64": (F64, {}),
}


@pytest.fixture(params=FORMS)
def form(request):
    """dtype, format and head dims of a `cached_problem`: the smallest head dims, which compile quickly."""
    dtype, more = FORMS[request.param]
    return {"dtype": dtype, "head_dims": (32, 32), **more}


@pytest.fixture
def nothing_is_launched(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(executors.Executor, "launch", refuse)
